"""Small experts are compared many at a time; what is found, and what is said of it, is what looking at each by itself gives."""

import json
import shutil

import pytest

import convert
from convert.options import Verification
from convert.verifier.bits import exact
from convert.verifier.bits.logical import Scope, blocks
from convert.verifier.bits.together import consecutive
from convert.verifier.content import tensors
from convert.verifier.content.sides import content_of
from layouts.checkpoint import open_checkpoint
from layouts.dequantize import dequantized
from layouts.matching.describe import describe
from scripts.benchmark_many import make

EXPERTS = 5
"""Of each of two layers, all with scales: 60 tensors a layer."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "in"
    make(folder, 2, EXPERTS)
    return folder


def _level(a, b, scope=None, read=open_checkpoint):
    sides = [blocks(reader, describe(reader)) for reader in map(read, (a, b))]
    return exact.compare_experts(*sides, lambda _: None, scope or Scope())


def _both(monkeypatch, *given):
    """What is said of runs; the same is said of experts one by one."""
    found = _level(*given)
    with monkeypatch.context() as patch:
        patch.setattr(exact, "TOGETHER", 0)
        assert _level(*given) == found
    return found


def _flip(folder, name):
    """The last bit of a tensor that `folder` holds."""
    for path in folder.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        size = 8 + int.from_bytes(data[:8], "little")
        if entry := json.loads(data[8:size]).get(name):
            data[size + entry["data_offsets"][1] - 1] ^= 128
            path.write_bytes(data)
            return
    raise LookupError(name)


@pytest.mark.parametrize(
    ("made", "flipped", "said"),
    [
        ({"layout": "concat"}, "{}.wi", "expert 4, up (wi_1)"),
        ({"layout": "interleaved"}, "{}.wi_scale", "expert 4, up (wi_1) scale"),
        ({"layout": "vllm"}, "{}.w13_weight_scale_2", "expert 4, up (wi_1) scale_2"),
        ({"layout": "concat"}, "{}.wo_input_scale", "expert 4, down (wo) input_scale"),
        (None, "{}.0.up_proj.weight_scale", "expert 0, up (wi_1) scale"),
        (None, "{}.3.down_proj.weight_scale_2", "expert 3, down (wo) scale_2"),
    ],
)
def test_one_bit_is_found_in_a_run_and_told_as_by_itself(plain, tmp_path, monkeypatch, made, flipped, said):
    if made is None:
        shutil.copytree(plain, tmp_path / "out")
    else:
        convert.prefuse(plain, tmp_path / "out", **made)
    equal = _both(monkeypatch, plain, tmp_path / "out")
    assert (equal.state, equal.compared) == ("equal", 2 * EXPERTS * 3 * (16 * 16 + 16 * 2 + 4 + 4))
    _flip(tmp_path / "out", flipped.format("model.layers.1.mlp.experts"))
    found = _both(monkeypatch, plain, tmp_path / "out")
    (line,) = found.differences
    assert line.startswith(f"layer 1, {said}: 1 of "), line
    assert found.compared == equal.compared
    some = Scope(experts=frozenset({0, 2, 3}))
    assert len(_both(monkeypatch, plain, tmp_path / "out", some).differences) == ("expert 4" not in said)


@pytest.mark.parametrize("layout", [None, "concat", "interleaved", "vllm"])
def test_digests_of_runs_are_those_of_experts_one_by_one(plain, tmp_path, monkeypatch, layout):
    out = plain
    if layout:
        convert.prefuse(plain, out := tmp_path / "out", layout=layout)
    found = content_of(out, Verification())
    assert (found.model.tensors, found) == (4 + 2 * EXPERTS * 12, content_of(plain, Verification()))
    monkeypatch.setattr(tensors, "TOGETHER", 0)
    assert content_of(out, Verification()) == found


def test_a_self_test_sees_a_bit_in_the_middle_of_a_run(plain, tmp_path):
    convert.prefuse(plain, tmp_path / "out")
    found = convert.verify(plain, tmp_path / "out", gemm=False, self_test=True, content=True)
    assert [trial.unseen for trial in found.self_test] == [()] * len(found.self_test)
    assert any({"exact", "content"} <= set(trial.seen) for trial in found.self_test)


def test_a_self_test_sees_that_runs_are_not_looked_at(plain, tmp_path, monkeypatch):
    convert.prefuse(plain, tmp_path / "out")
    monkeypatch.setattr(exact, "equal_in", lambda *_: 1)
    found = convert.verify(plain, tmp_path / "out", gemm=False, self_test=True)
    assert any("exact" in trial.unseen for trial in found.self_test)
    assert not found.equal


def test_computed_tensors_are_compared_in_runs_too(plain, tmp_path, monkeypatch):
    def read(path):
        return dequantized(open_checkpoint(path))

    shutil.copytree(plain, tmp_path / "out")
    assert _both(monkeypatch, plain, tmp_path / "out", None, read).state == "equal"
    _flip(tmp_path / "out", "model.layers.1.mlp.experts.3.up_proj.weight")
    (line,) = _both(monkeypatch, plain, tmp_path / "out", None, read).differences
    assert line == f"layer 1, expert 3, up (wi_1): 1 of {16 * 32} elements, first at (k, n) = (31, 15)"


@pytest.mark.parametrize(
    ("experts", "most", "runs"),
    [
        ([], 3, []),
        ([4], 3, [(4, 5)]),
        (range(7), 3, [(0, 3), (3, 6), (6, 7)]),
        ([0, 1, 4, 5, 6, 9], 8, [(0, 2), (4, 7), (9, 10)]),
        (range(3), 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_runs_are_of_neighbours(experts, most, runs):
    assert [(run.start, run.stop) for run in consecutive(experts, most)] == runs
