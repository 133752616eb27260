"""Our bfloat16 values are those of transformers, wherever its rule holds: blocks that divide the matrix."""

import numpy as np
import pytest

from layouts.dequantize import dequantized
from tests.layouts.test_dequantize import fp8, reader

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("shape", [(128, 128), (256, 512), (1536, 128)])
def test_fp8_blocks_as_transformers_computes_them(shape):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors, _ = fp8(*shape)
    data = torch.from_numpy(tensors["x.weight"][1].copy()).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(tensors["x.weight_scale_inv"][1].view("f4").copy())
    theirs = Fp8Dequantize(None)._dequantize_one(data, scales, torch.bfloat16).view(torch.uint16).numpy()
    ours = dequantized(reader(tensors)).read("x.weight", (slice(None), slice(None)))
    number = (theirs & 0x7FFF) <= 0x7F80  # the payload of a NaN is nobody's promise
    assert np.array_equal(ours[number], theirs[number])
    assert ((ours[~number] & 0x7FFF) > 0x7F80).all()


def test_mxfp4_as_transformers_computes_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (4, 24, 3, 16), dtype="u1"), rng.integers(90, 160, (4, 24, 3), dtype="u1")
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales)).view(torch.uint16).numpy()
    tensors = {"x_blocks": ("U8", blocks), "x_scales": ("U8", scales)}
    ours = dequantized(reader(tensors, {"quantization_config": {}})).read("x", (slice(None),) * 3)
    assert np.array_equal(ours, theirs)
