"""Every backend is a grouped GEMM, on one device and on many: the same rows as plain NumPy, whatever the groups are."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jax import numpy as jnp
from safetensors.numpy import save_file

import convert
from convert.cli import main
from convert.errors import UsageError
from convert.verifier.bits.logical import blocks
from convert.verifier.gemms import backends, calls, gemm, mesh
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


@pytest.mark.parametrize("rows_first", [False, True])
@pytest.mark.parametrize(("sizes", "most"), [((3, 0, 5), 5), ((0, 0, 1), 4), ((1, 1, 1), 1)])
def test_by_group_whatever_is_known_of_the_most_rows(sizes, most, rows_first):
    check("ragged_dot", sizes, rows_first, most)


def test_groups_that_are_larger_than_was_said_lose_no_row(folder):
    """A router may send all tokens to one expert."""
    reader = open_checkpoint(folder / "qwen3_moe")
    block = next(iter(blocks(reader, describe(reader)).values()))
    weights, backend = load(block, range(2)), BACKENDS["ragged_dot"]
    x = np.random.default_rng(1).standard_normal((9, block.groups["wi", ""].total("k"))).astype(np.float32)
    np.testing.assert_allclose(weights.run(x, (8, 1), backend, most=3), weights.run(x, (8, 1), backend), atol=1e-5)
    reader.close()


@pytest.mark.clients
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("rows_first", [False, True])
def test_a_grouped_gemm_by_tokamax(folder, rows_first):
    pytest.importorskip("tokamax")
    check("tokamax", (3, 0, 5), rows_first)
    assert convert.verify(folder / "qwen3_moe", folder / "per-shard", backend="tokamax").equal


def check(name, sizes, rows_first, most=0):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((sum(sizes), 16)).astype(np.float32)
    w = rng.standard_normal((3, 16, 24)).astype(np.float32)
    stored = np.ascontiguousarray(w.swapaxes(1, 2)) if rows_first else w
    found = BACKENDS[name].gmm(jnp.asarray(x), jnp.asarray(stored), jnp.asarray(sizes, jnp.int32), rows_first, most)
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
@pytest.mark.parametrize(
    "sizes",
    [
        {"expert": 4, "model": 2},
        {"expert": 8},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"model": 4}, {"expert": 2, "model": 4})),
    ],
)
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
    levels = {level["name"]: level for level in json.loads(capsys.readouterr().out)["result"]["levels"]}
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


def sides_of(folder: Path, *layouts: str):
    return tuple(next(iter(blocks(r, describe(r)).values())) for r in (open_checkpoint(folder / each) for each in layouts))


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_less_memory_takes_fewer_experts_at_a_time_then_does_not_read_ahead_then_nothing(folder, monkeypatch):
    sides = sides_of(folder, "concat", "vllm")
    monkeypatch.setattr(calls, "values", lambda _: 1 << 20)
    found = [calls.fit(sides, calls.BASE + (mib << 20)) for mib in (400, 100, 7, 5, 3)]
    assert [each and (each.experts, each.ahead, each.together) for each in found] == [
        (8, True, True),
        (8, True, False),
        (1, True, False),
        (1, False, False),
        None,
    ]
    among = [calls.fit(sides, calls.BASE + (mib << 20), ways=4) for mib in (60, 30, 20, 10)]
    assert [each and (each.experts, each.ahead) for each in among] == [(8, True), (4, True), (4, False), None]


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize(("experts", "sizes"), [(128, [8] * 16), (60, [6] * 10), (13, [7, 6]), (9, [5, 4]), (3, [3])])
def test_calls_are_of_the_same_size_where_they_can_be(folder, experts, sizes):
    one = SimpleNamespace(experts=experts, reader=open_checkpoint(folder / "concat"))
    assert list(map(len, calls.calls((one, one), 8))) == sizes


@pytest.mark.parametrize("layout", ["concat", "per-shard", "gpt_oss"])
@pytest.mark.parametrize(("ahead", "together"), [(True, False), (False, False)])
def test_a_verification_in_little_memory_finds_the_same(folder, tmp_path, monkeypatch, layout, ahead, together):
    """One expert at a time, one side at a time; gradients, which need both, say that they were not run."""
    base = folder / ("gpt_oss" if layout == "gpt_oss" else "qwen3_moe")
    other = folder / layout
    if layout == "gpt_oss":
        convert.prefuse(base, other := tmp_path / "fused")
    monkeypatch.setattr(gemm, "fit", lambda *_: calls.Fit(experts=1, ahead=ahead, together=together))
    found = convert.verify(base, other)
    states = {level.name: (level.state, level.not_run) for level in found.levels}
    assert found.equal
    assert states.pop("gradients") == ("not run", "--memory does not hold an expert of both sides for that")
    assert {state for name, (state, _) in states.items() if name not in ("others", "recorded")} == {"equal"}


def test_experts_that_memory_does_not_hold_are_not_run_and_that_is_no_equal(folder, capsys):
    arguments = ["--verify", str(folder / "qwen3_moe"), str(folder / "concat"), "--quiet", "--memory", "300MiB"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "an expert takes 401 MiB, and --memory is 300 MiB" in text
    assert "INCOMPLETE" in text
    assert main([*arguments, "--allow-not-run"]) == 0
    assert main([*arguments, "--no-gemm"]) == 0
