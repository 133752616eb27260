"""FP8 blocks and MXFP4 as bfloat16: every value against one computed by hand, at the edges of both formats too."""

import json
import shutil
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.errors import InputError, PlanError
from layouts.checkpoint import open_checkpoint
from layouts.computing import Values, computing
from layouts.dequantize import dequantized
from layouts.dequantize.compute import compute
from layouts.dequantize.values import FP4
from layouts.disk.pread import InputFile
from layouts.reader import scattered_of
from layouts.tensors import TensorSpec
from tests.tiny import MemoryReader

BF16 = ml_dtypes.bfloat16
CONFIG = {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def reader(tensors, config=CONFIG) -> MemoryReader:
    """Arrays with codes: name -> (code, bits)."""
    found = MemoryReader({name: array for name, (_, array) in tensors.items()}, config=config)
    for name, (code, array) in tensors.items():
        found.tensors[name] = TensorSpec(name=name, dtype=code, shape=array.shape)
    return found


def fp8(n: int, k: int, code="F32", seed: int = 0):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n, k), dtype="u1")
    grid = rng.standard_normal((-(-n // 128), -(-k // 128))).astype("f4")
    stored = {
        "F32": grid.view("u4"),
        "BF16": grid.astype(BF16).view("u2"),
        "F8_E8M0": rng.integers(0, 255, grid.shape, dtype="u1"),
    }
    scales = {
        "F32": grid,
        "BF16": grid.astype(BF16).astype("f4"),
        "F8_E8M0": np.exp2(stored["F8_E8M0"].astype("f4") - 127).astype("f4"),
    }
    wanted = np.empty((n, k), BF16)
    with np.errstate(all="ignore"):
        for i in range(n):
            row = data[i].view(ml_dtypes.float8_e4m3fn).astype("f4")
            wanted[i] = (row * scales[code][i // 128, np.arange(k) // 128]).astype(BF16)
    return {"x.weight": ("F8_E4M3", data), "x.weight_scale_inv": (code, stored[code])}, wanted.view("u2")


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
@pytest.mark.parametrize("code", ["F32", "BF16", "F8_E8M0"])
@pytest.mark.parametrize("shape", [(128, 256), (192, 256), (576, 300), (1, 1), (130, 129)])
def test_fp8_blocks(shape, code):
    tensors, wanted = fp8(*shape, code=code)
    plain = dequantized(reader(tensors))
    assert plain.tensors == {"x.weight": TensorSpec(name="x.weight", dtype="BF16", shape=shape)}
    assert np.array_equal(plain.read("x.weight", (slice(None), slice(None))), wanted)
    rng = np.random.default_rng(1)
    for _ in range(20):
        rows, columns = (sorted(rng.integers(0, size + 1, 2)) for size in shape)
        cut = (slice(*map(int, rows)), slice(*map(int, columns)))
        assert np.array_equal(plain.read("x.weight", cut), wanted[cut])


def test_what_is_computed_besides_goes_where_it_is_wanted_as_well():
    tensors, wanted = fp8(130, 129)
    both = computing(dequantized(reader(tensors)), Values(factors={"x.weight": 1.0}))
    place = np.empty((129, 130), "u2").T
    assert "x.weight" in scattered_of(both)
    with np.errstate(all="ignore"):
        found = both.read("x.weight", (slice(None), slice(None)), lambda *_: place)
    assert found is place
    assert np.array_equal(np.isnan(found.view(BF16)), np.isnan(wanted.view(BF16)))


def test_large_reads_are_computed_in_parts(monkeypatch):
    monkeypatch.setattr("layouts.dequantize.compute.TILE", 1000)
    monkeypatch.setattr("layouts.dequantize.reader._READ", 7000)
    tensors, wanted = fp8(200, 300)
    assert np.array_equal(dequantized(reader(tensors)).read("x.weight", (slice(3, 199), slice(5, 300))), wanted[3:199, 5:])


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_mxfp4_pairs_are_turned_into_columns():
    rng = np.random.default_rng(2)
    e, rows, groups = 3, 10, 4
    pairs, scales = rng.integers(0, 256, (e, rows, groups, 16), dtype="u1"), rng.integers(0, 255, (e, rows, groups), dtype="u1")
    wanted = np.empty((e, groups * 32, rows), BF16)
    for x, r, g, b in np.ndindex(pairs.shape):
        power = np.float32(2.0) ** np.float32(int(scales[x, r, g]) - 127)
        for half, nibble in enumerate((pairs[x, r, g, b] & 15, pairs[x, r, g, b] >> 4)):
            wanted[x, g * 32 + b * 2 + half, r] = BF16(np.float32(FP4[nibble]) * power)
    tensors = {"x.gate_up_proj_blocks": ("U8", pairs), "x.gate_up_proj_scales": ("U8", scales)}
    plain = dequantized(reader(tensors, {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}))
    assert "quantization_config" not in plain.config
    assert plain.tensors["x.gate_up_proj"].shape == (e, groups * 32, rows)
    assert np.array_equal(plain.read("x.gate_up_proj", (slice(None),) * 3), wanted.view("u2"))
    cut = (slice(1, 3), slice(33, 70), slice(2, 9))
    assert np.array_equal(plain.read("x.gate_up_proj", cut), wanted.view("u2")[cut])
    narrow = {"x.down_proj_blocks": ("U8", pairs[:, :, :1]), "x.down_proj_scales": ("U8", scales[:, :, :1])}
    plain = dequantized(reader(narrow, {"model_type": "gpt_oss"}))
    for cut in ((slice(0, 3), slice(9, 32), slice(2, 9)), (slice(0, 1), slice(0, 5), slice(0, 1))):  # of one group
        assert np.array_equal(plain.read("x.down_proj", cut), wanted[:, :32].view("u2")[cut])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x.weight_scale_inv": None}, InputError, "x.weight .* has no x.weight_scale_inv beside it"),
        ({"x.weight": None}, InputError, "x.weight_scale_inv .* is for x.weight, which is not there"),
        ({"x.weight_scale_inv": ("F32", np.zeros((2, 3), "u4"))}, InputError, "is no grid of blocks"),
        ({"x.weight": ("F8_E5M2", np.zeros((192, 256), "u1"))}, PlanError, "is F8_E5M2 with F32 .* no such format"),
        ({"x.weight": None, "x.weight_scale_inv": None}, PlanError, "nothing to dequantise"),
        ({"y_blocks": ("U8", np.zeros((1, 2, 3, 16), "u1"))}, InputError, "has no y_scales beside it"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, words):
    tensors = {**fp8(192, 256)[0], "norm": ("BF16", np.zeros(3, "u2")), **change}
    with pytest.raises(error, match=words):
        dequantized(reader({name: entry for name, entry in tensors.items() if entry}))


@pytest.mark.parametrize("config", [{}, {"quantization_config": {}}, {"quantization_config": {"weight_block_size": [128]}}])
def test_a_block_size_that_nobody_states_is_not_guessed(config):
    with pytest.raises(PlanError, match=r"states no quantization_config\.weight_block_size"):
        dequantized(reader(fp8(256, 128)[0], config))


@pytest.fixture
def source(tmp_path) -> Path:
    """A small FP8 DeepSeek: experts, attention in FP8 and norms in BF16."""
    rng = np.random.default_rng(3)
    arrays = {"model.norm.weight": rng.standard_normal(8).astype(BF16)}
    names = [f"model.layers.1.mlp.experts.{e}.{w}_proj" for e in range(4) for w in ("gate", "up", "down")]
    for name in [*names, "model.layers.1.self_attn.o_proj"]:
        shape = (256, 128) if name.endswith(("gate_proj", "up_proj")) else (128, 256)
        arrays[f"{name}.weight"] = rng.integers(0, 127, shape, dtype="u1").view(ml_dtypes.float8_e4m3fn)
        arrays[f"{name}.weight_scale_inv"] = rng.random((shape[0] // 128, shape[1] // 128)).astype("f4")
    (tmp_path / "in").mkdir()
    save_file(arrays, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "in"


def test_computed_values_are_another_content(source, tmp_path):
    with pytest.raises(convert.UsageError, match="so the output holds another content than the input"):
        convert.prefuse(source, tmp_path / "out", dequantize="bf16", content=True)
    assert not (tmp_path / "out").exists()


def test_on_the_disk_and_in_the_manifest(source, tmp_path):
    convert.prefuse(source, tmp_path / "out", dequantize="bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    with closing(dequantized(open_checkpoint(source))) as plain:
        gate, up = (plain.read(f"model.layers.1.mlp.experts.3.{w}_proj.weight", (slice(None),) * 2) for w in ("gate", "up"))
    assert np.array_equal(found["model.layers.1.mlp.experts.wi"][3].view("u2"), np.concatenate((gate.T, up.T), -1))
    assert found["model.layers.1.self_attn.o_proj.weight"].dtype == BF16
    assert not any("scale" in name for name in found)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    manifest = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
    assert manifest["computed"].startswith("bf16")
    assert "original" not in manifest
    assert not manifest["sources"]
    assert convert.verify(tmp_path / "out").equal
    convert.split(tmp_path / "out", tmp_path / "split")
    again = load_file(tmp_path / "split" / "model.safetensors")
    assert np.array_equal(again["model.layers.1.mlp.experts.3.up_proj.weight"].view("u2"), up)


def test_what_else_says_that_it_is_quantised(source, tmp_path):
    """DeepSeek-V4's config says it of experts beside quantization_config; Mistral's own config is carried over, and told of."""
    (source / "config.json").write_text(json.dumps(CONFIG | {"expert_dtype": "fp4", "text_config": {"expert_dtype": "fp4"}}))
    (source / "params.json").write_text('{"dim": 4096}')
    assert not any(
        "params.json" in told for told in convert.plan(source, tmp_path / "out", prefuse=True, dequantize="bf16").remarks
    )
    (source / "params.json").write_text('{"quantization": {"qformat_weight": "fp8_e4m3"}}')
    plan = convert.prefuse(source, tmp_path / "out", dequantize="bf16").plan
    assert any("take 'quantization' out" in told for told in plan.remarks)
    assert "expert_dtype" not in (tmp_path / "out" / "config.json").read_text()


def test_every_value_is_computed_once(source, tmp_path, monkeypatch):
    """Digests of what sources would be would take it twice, and no manifest has them."""
    seen = []
    monkeypatch.setattr("layouts.dequantize.reader.compute", lambda *given: seen.append(given[2].size) or compute(*given))
    convert.prefuse(source, tmp_path / "out", dequantize="bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(seen) == sum(array.size for name, array in found.items() if name != "model.norm.weight")


@pytest.mark.parametrize(
    "more", [{}, *({"layout": each} for each in ("transformers", "interleaved", "glu32")), {"layout": "per-shard", "shards": 2}]
)
def test_every_byte_is_read_once_and_no_value_is_copied(source, tmp_path, monkeypatch, more):
    """Whatever part of its rows a strip takes; bytes are read that lie between them."""
    seen = []
    monkeypatch.setattr("convert.engine.blocks.copy_block", None)
    monkeypatch.setattr("convert.engine.budget.STRIP", 16 << 10)
    monkeypatch.setattr(InputFile, "read", lambda *given, read=InputFile.read: seen.append(len(given[1])) or read(*given))
    convert.prefuse(source, tmp_path / "out", dequantize="bf16", jobs=1, **more)
    with closing(open_checkpoint(source)) as opened:
        assert sum(seen) <= 1.02 * sum(spec.nbytes for spec in opened.tensors.values())


def test_the_same_again_computes_all_and_compares(source, tmp_path):
    assert convert.prefuse(source, tmp_path / "out", dequantize="bf16").written
    assert not convert.prefuse(source, tmp_path / "out", dequantize="bf16").written
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(convert.OutputError, match=r"was made from another input: .* differs"):
        convert.prefuse(source, tmp_path / "out", dequantize="bf16")


def test_without_the_flag_nothing_is_computed(source, tmp_path):
    convert.prefuse(source, tmp_path / "out")
    with closing(open_checkpoint(tmp_path / "out")) as opened:
        assert opened.tensors["model.layers.1.mlp.experts.wi"].dtype == "F8_E4M3"
    assert "computed" not in json.loads((tmp_path / "out" / "convert_manifest.json").read_text())


def test_refusals_of_the_command(source, tmp_path, capsys):
    assert main(["--split", str(source), str(tmp_path / "out"), "--dequantize", "bf16", "--quiet"]) == 2
    convert.prefuse(source, tmp_path / "fused")
    assert main(["--prefuse", str(tmp_path / "fused"), str(tmp_path / "out"), "--dequantize", "bf16", "--quiet"]) == 4
    assert "split it first" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "fused")
    assert main(["--prefuse", str(source), str(tmp_path / "out"), "--dequantize", "bf16", "--dry-run"]) == 0
    assert "computed, not only moved" in capsys.readouterr().out
