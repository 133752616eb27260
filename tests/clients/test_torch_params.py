"""PyTorch's tensors in memory: moved by PyTorch, bit for bit, with its own derivative."""

from collections import OrderedDict

import numpy as np
import pytest

import convert
from scripts.make_checkpoint import make_checkpoint

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.clients
E, K, N = 3, 6, 8


def state_dict(dtype):
    width = torch.empty(0, dtype=dtype).element_size()
    made = OrderedDict()
    rng = np.random.default_rng(0)
    for e in range(E):
        for word, shape in {"gate_proj": (N, K), "up_proj": (N, K), "down_proj": (K, N)}.items():
            bits = torch.from_numpy(rng.integers(0, 256, (*shape, width), dtype="u1"))
            made[f"model.layers.0.mlp.experts.{e}.{word}.weight"] = bits.view(dtype).reshape(shape)
    return made


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("layout", ["concat", "flashinfer", "interleaved", "per-shard", "fused-moe"])
def test_bits_are_those_of_numpy(dtype, layout):
    params = state_dict(dtype)
    options = {"family": "qwen3_moe", "layout": layout, **({"shards": 2} if layout == "per-shard" else {})}
    params._metadata = "kept"
    arrays = {name: np.frombuffer(raw(t), f"u{t.element_size()}").reshape(t.shape) for name, t in params.items()}
    fused = convert.prefuse_params(params, **options)
    assert isinstance(fused, OrderedDict)
    assert fused._metadata == "kept"
    if dtype is not torch.int8:  # one byte without a sign is packed, to the tables
        wanted = convert.prefuse_params({name: a.view(f"i{a.itemsize}") for name, a in arrays.items()}, **options)
        assert {name: raw(t) for name, t in fused.items()} == {name: a.tobytes() for name, a in wanted.items()}
    record = convert.layout_of(params, **options)
    again = convert.split_params(fused, record)
    assert {name: raw(t) for name, t in again.items()} == {name: raw(t) for name, t in params.items()}


def test_gradients_and_shapes_alone():
    gate, up = (torch.rand(E, K, N, requires_grad=True) for _ in "gu")
    wi = convert.prefuse_params({"wi_0": gate, "wi_1": up}, layout="interleaved")["wi"]
    (wi**2).sum().backward()
    assert torch.equal(gate.grad, 2 * gate)
    assert torch.equal(up.grad, 2 * up)
    shapes = {"wi_0": gate.detach().to("meta"), "wi_1": up.detach().to("meta")}
    meta = convert.prefuse_params(shapes, layout="gmm-ep")
    assert meta["wi"].device.type == "meta"
    assert meta["wi"].shape == (E, K, 256)
    assert convert.split_params(meta, "gmm-ep", sizes={"n": N})["wi_1"].shape == (E, K, N)
    with pytest.raises(convert.PlanError, match="several libraries"):
        convert.prefuse_params({"wi_0": gate, "wi_1": np.zeros((E, K, N), "f4")})


@pytest.mark.parametrize(("dtype", "word"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_a_state_dict_of_tensors_is_saved(tmp_path, dtype, word):
    source = make_checkpoint(tmp_path / "hf", family="qwen3_moe", dtype=word)
    params = {}
    for name, array in convert.load(source, layout="vllm").items():
        flat = torch.from_numpy(np.asarray(array).view(f"i{array.dtype.itemsize}").copy())
        params[name] = torch.nn.Parameter(flat.view(getattr(torch, dtype)))
    convert.save(params, tmp_path / "out", like=source, layout="vllm")
    for file in source.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    params[name] = params[name].to("meta")
    with pytest.raises(convert.UsageError, match="it holds no data"):
        convert.save(params, tmp_path / "none", like=source, layout="vllm")
