"""Every backend is a grouped GEMM, on one device and on many: the same rows as plain NumPy, whatever the groups are."""

import json
from pathlib import Path

import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import save_file

import convert
from convert.cli import main
from convert.errors import UsageError
from convert.verifier.bits.logical import blocks
from convert.verifier.gemms import backends, mesh
from convert.verifier.gemms.backends import BACKENDS, choose
from convert.verifier.gemms.operands import load
from convert.verifier.gemms.probes import tokens
from convert.verifier.gemms.routing import SILU
from layouts.checkpoint import open_checkpoint
from layouts.matching.describe import describe
from scripts.make_checkpoint import make_checkpoint

USUAL = ("ragged_dot", "megablox", "moegemm")
LAYOUTS = {"concat": {}, "vllm": {}, "interleaved": {}, "per-shard": {"shards": 4, "align": 3}}


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize("sizes", [(3, 0, 5), (0, 0, 1), (8, 0, 0), (1, 1, 1)])
@pytest.mark.parametrize("name", USUAL)
def test_a_grouped_gemm(name, sizes, rows_first):
    check(name, sizes, rows_first)


@pytest.mark.clients
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rows_first", [False, True])
def test_a_grouped_gemm_by_tokamax(folder, rows_first):
    pytest.importorskip("tokamax")
    check("tokamax", (3, 0, 5), rows_first)
    assert convert.verify(folder / "qwen3_moe", folder / "per-shard", backend="tokamax").equal


def check(name, sizes, rows_first):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((sum(sizes), 16)).astype(np.float32)
    w = rng.standard_normal((3, 16, 24)).astype(np.float32)
    stored = np.ascontiguousarray(w.swapaxes(1, 2)) if rows_first else w
    found = BACKENDS[name].gmm(jnp.asarray(x), jnp.asarray(stored), jnp.asarray(sizes, jnp.int32), rows_first)
    wanted = np.stack([row @ w[e] for row, e in zip(x, np.repeat(np.arange(3), sizes), strict=True)])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["ragged_dot", "moegemm"])
def test_values_of_any_size_are_read_back(tmp_path, backend):
    """Random bits: from subnormal ones, which XLA takes for zero, to the largest."""
    make_checkpoint(tmp_path / "in", family="qwen3_moe", layers=1)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert convert.verify(tmp_path / "in", tmp_path / "out", backend=backend).equal


def test_an_unknown_backend_and_one_that_is_not_installed_say_so(monkeypatch):
    with pytest.raises(UsageError, match="no backend is called 'cuda'; known: ragged_dot, megablox, tokamax, moegemm, all"):
        choose("cuda")
    backends._missing.cache_clear()
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install tokamax"):
        choose("tokamax")
    found, missing = choose("all")
    assert [backend.name for backend in found] == list(USUAL)
    assert missing == ("backend tokamax is not installed: pip install tokamax",)
    backends._missing.cache_clear()


def test_a_backend_that_cannot_run_here_says_why(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device\nand a long story")

    backends._missing.cache_clear()
    monkeypatch.setitem(backends.BACKENDS, "megablox", backends.Backend(name="megablox", gmm=broken))
    with pytest.raises(UsageError, match=r"^backend megablox cannot run here: no such device$"):
        choose("megablox")
    backends._missing.cache_clear()


def gpt_oss(folder: Path) -> None:
    """One layer, with biases, and gate and up in turns."""
    rng = np.random.default_rng(2)
    shapes = {
        "gate_up_proj": (16, 32, 32),
        "gate_up_proj_bias": (16, 32),
        "down_proj": (16, 16, 32),
        "down_proj_bias": (16, 32),
    }
    tensors = {f"model.layers.0.mlp.experts.{n}": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "num_local_experts": 16, "num_hidden_layers": 1}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("backends")
    make_checkpoint(root / "qwen3_moe", family="qwen3_moe", experts=16, embed=32, mlp=16, layers=2, values="normal")
    gpt_oss(root / "gpt_oss")
    for layout, choices in LAYOUTS.items():
        convert.prefuse(root / "qwen3_moe", root / layout, layout=layout, **choices)
    return root


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("sizes", [{"expert": 4, "model": 2}, {"expert": 8}, {"model": 4}, {"expert": 2, "model": 4}])
@pytest.mark.parametrize("layout", ["qwen3_moe", *LAYOUTS, "gpt_oss"])
def test_many_devices_give_what_one_gives(folder, layout, sizes):
    reader = open_checkpoint(folder / layout)
    block = next(iter(blocks(reader, describe(reader)).values()))
    weights, ragged_dot = load(block, range(8)), BACKENDS["ragged_dot"]
    x, groups = tokens(range(8), 32, 2)
    one = weights.run(x, groups, ragged_dot)
    assert np.abs(one).max() > 1e-3
    many = mesh.run(x, weights, groups, mesh.make_mesh(sizes), ragged_dot, SILU)
    np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-5 * np.abs(one).max())


@pytest.mark.slow
def test_the_command_with_a_mesh_and_all_backends(folder, capsys):
    arguments = ["--verify", str(folder / "qwen3_moe"), str(folder / "concat"), "--quiet", "--json", "--backend", "all"]
    assert main([*arguments, "--mesh", "expert=4,model=2", "--layers", "1"]) == 0
    levels = {level["name"]: level for level in json.loads(capsys.readouterr().out)["levels"]}
    assert {"mesh", "identity", "identity/megablox", "gemm/moegemm", "layer/moegemm", "gradients/megablox"} <= set(levels)
    assert "gradients/moegemm" not in levels  # NumPy has none
    assert "4 (expert) x 2 (model)" in levels["mesh"]["covered"]


def test_a_mesh_that_cannot_be_had(folder, capsys):
    arguments = ["--verify", str(folder / "qwen3_moe"), str(folder / "concat"), "--quiet"]
    assert main([*arguments, "--mesh", "expert=64"]) == 2
    assert "64 devices, but JAX has begun with 8" in capsys.readouterr().err
    assert main([*arguments, "--mesh", "rows=2"]) == 2
    assert "a mesh has the axes expert and model; found rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--mesh", "model"])
    assert "'model' is not a mesh such as expert=4,model=2" in capsys.readouterr().err
    assert main([*arguments, "--backend", "cuda"]) == 2


def test_experts_that_do_not_divide_among_devices_are_named(folder, tmp_path, capsys):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=9, embed=32, mlp=16, layers=1, values="normal")
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    arguments = ["--verify", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet", "--mesh", "expert=4,model=2"]
    assert main(arguments) == 0
    assert "not some experts, as 1 experts do not divide by 4" in capsys.readouterr().out


def test_the_cost_is_told_before(folder, capsys):
    arguments = ["--verify", str(folder / "qwen3_moe"), str(folder / "concat"), "--dry-run"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "32 in 2 MoE layers" in text
    assert "FLOP" in text
    assert "by 16 of the first experts" in text


def test_less_memory_takes_fewer_experts_at_a_time(folder):
    """And finds the same."""
    from convert.verifier.gemms.gemm import How, experts_per_call

    one, other = (
        next(iter(blocks(r, describe(r)).values())) for r in map(open_checkpoint, (folder / "concat", folder / "vllm"))
    )
    assert experts_per_call((one, other), How()) == 8
    few = 3 * 40 * 3 * 32 * 16
    assert experts_per_call((one, other), How(memory=few)) == 3
    assert experts_per_call((one, other), How(memory=1)) == 1
    assert convert.verify(folder / "concat", folder / "vllm", memory=few).equal
    one.reader.close()
    other.reader.close()
