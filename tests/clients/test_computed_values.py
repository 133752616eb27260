"""Our bfloat16 values are those of transformers and of compressed-tensors, wherever their rules hold."""

import numpy as np
import pytest

from layouts.dequantize import dequantized
from tests.layouts.test_dequantize import fp8, reader
from tests.layouts.test_dequantize_formats import ZEROS, N, equal, made, with_zeros

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


_GROUP = {"type": "int", "strategy": "group", "group_size": 32}
_NVFP4 = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
_MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
SCHEMES = {
    "int4": ("pack_quantized", "PackedQuantizationCompressor", {"num_bits": 4, **_GROUP}),
    "int8 in words": ("pack_quantized", "PackedQuantizationCompressor", {"num_bits": 8, **_GROUP}),
    "fp8 channels": ("naive_quantized", "NaiveQuantizationCompressor", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8 tensor in brackets": (
        "naive_quantized", "NaiveQuantizationCompressor", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "int8": ("naive_quantized", "NaiveQuantizationCompressor", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "nvfp4 of compressed-tensors": ("nvfp4", "NVFP4PackedCompressor", {"num_bits": 4, "type": "float", **_NVFP4}),
    "mxfp4 of compressed-tensors": ("mxfp4", "MXFP4PackedCompressor", {"num_bits": 4, "type": "float", **_MX}),
    "mxfp8": ("mxfp8", "MXFP8QuantizationCompressor", {"num_bits": 8, "type": "float", **_MX}),
}  # fmt: skip
"""Our cases, and the compressor that reads them; those whose scales are F32 or BF16: theirs rounds F16 twice."""


@pytest.mark.parametrize("case", SCHEMES)
def test_as_compressed_tensors_decompresses(case):
    pytest.importorskip("compressed_tensors")
    import importlib

    from compressed_tensors.quantization import QuantizationScheme

    module, name, weights = SCHEMES[case]
    tensors, config, _ = made(case)
    if case == "int8 in words":
        tensors["x.weight_scale"] = ("BF16", np.random.default_rng(3).integers(0x3C00, 0x4000, (N, 2)).astype("u2"))
    theirs = {word.removeprefix("x.").replace("_scale_inv", "_scale"): as_torch(*entry) for word, entry in tensors.items()}
    theirs.pop("input_scale")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = getattr(importlib.import_module(f"compressed_tensors.compressors.{module}.base"), name)
    found = compressor.decompress(theirs, scheme)["weight"].to(torch.bfloat16).view(torch.uint16).numpy()
    equal(dequantized(reader(tensors, config)).read("x.weight", (slice(None), slice(None))), found)


@pytest.mark.parametrize("case", [case for case in ZEROS if case in SCHEMES or case == "int4 of channels"])
def test_zero_points_as_compressed_tensors_takes_them(case):
    pytest.importorskip("compressed_tensors")
    import importlib

    from compressed_tensors.quantization import QuantizationScheme

    channels = ("pack_quantized", "PackedQuantizationCompressor", {"num_bits": 4, "type": "int", "strategy": "channel"})
    module, name, weights = SCHEMES.get(case, channels)
    tensors, config, _ = with_zeros(case)
    if case == "int8 in words":
        tensors["x.weight_scale"] = ("BF16", np.random.default_rng(3).integers(0x3C00, 0x4000, (N, 2)).astype("u2"))
    theirs = {word.removeprefix("x."): as_torch(*entry) for word, entry in tensors.items() if word != "x.input_scale"}
    if case == "int4":  # it cannot take one single word of rows apart
        theirs["weight_zero_point"] = theirs["weight_zero_point"].repeat(2, 1)
    scheme = QuantizationScheme(targets=["Linear"], weights={**weights, "symmetric": False})
    compressor = getattr(importlib.import_module(f"compressed_tensors.compressors.{module}.base"), name)
    found = compressor.decompress(theirs, scheme)["weight"].to(torch.bfloat16).view(torch.uint16).numpy()
    equal(dequantized(reader(tensors, config)).read("x.weight", (slice(None), slice(None))), found)


def as_torch(code, array):
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32, "I32": torch.int32, "I8": torch.int8,
             "I64": torch.int64, "U8": torch.uint8}  # fmt: skip
    return torch.from_numpy(np.ascontiguousarray(array).copy()).view(kinds[code])
