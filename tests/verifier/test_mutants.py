"""The verifier must not be vacuous: every kind of damage is caught, and by exactly the levels that can see it.

The bits of the weights (`exact`) see everything in the experts; one-hot tokens (`identity`) the rows that they read; random
tokens (`gemm`) what is more than rounding; the whole layer only experts that its router sends tokens to.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from scripts.make_checkpoint import make_checkpoint

K, N, E = 32, 16, 12  # 2N == K: a transposed matrix has the same shape
IDLE, BUSY = 5, 7
"""An expert of layer 1 that gets no token of the whole layer's probe, and one that gets six."""
LAYER = "model.layers.1.mlp.experts"
FUSED, SHARDED = "concat", "per-shard"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mutants")
    make_checkpoint(root / "in", family="qwen3_moe", experts=E, embed=K, mlp=N, layers=2, values="normal")
    convert.prefuse(root / "in", root / FUSED)
    convert.prefuse(root / "in", root / SHARDED, layout="per-shard", shards=4, align=4)
    return root


def stored(folder: Path, name: str) -> Any:
    """A tensor's bits, to be changed in place."""
    for path in folder.glob("*.safetensors"):
        size = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + size])
        if name in header:
            return np.memmap(path, np.uint16, "r+", 8 + size + header[name]["data_offsets"][0], tuple(header[name]["shape"]))
    raise LookupError(name)


def gate_for_up(wi, wo):
    wi[BUSY] = np.concatenate((wi[BUSY, :, N:], wi[BUSY, :, :N]), -1)


def gate_for_up_everywhere(wi, wo):
    wi[:] = np.concatenate((wi[:, :, N:], wi[:, :, :N]), -1)


def experts_exchanged(wi, wo):
    wi[[3, 10]], wo[[3, 10]] = wi[[10, 3]], wo[[10, 3]]


def sorted_as_text(wi, wo):
    order = np.argsort(np.argsort([str(e) for e in range(E)]))
    wi[:], wo[:] = wi[order], wo[order]


def transposed_square(wi, wo):
    wi[BUSY] = wi[BUSY].T.copy()


def shard_boundary_off_by_one(wi, wo):
    wi[:] = np.roll(wi, 1, axis=-1)


def rows_of_wo_off_by_one(wi, wo):
    wo[BUSY] = np.roll(wo[BUSY], 1, axis=0)


def idle_expert_zeroed(wi, wo):
    wi[IDLE], wo[IDLE] = 0, 0


def busy_expert_zeroed(wi, wo):
    wi[BUSY], wo[BUSY] = 0, 0


def one_bit(wi, wo):
    wi[BUSY, 0, 3] ^= 0x0040  # the top bit of a mantissa


def lowest_bit_between(wi, wo):
    wi[IDLE, 1, 3] ^= 1  # in a row that the one-hot tokens do not read


def sign_of_zero(wi, wo):
    wi[BUSY, 0, 3] = 0x8000


def not_a_number_made_zero(wi, wo):
    wi[IDLE, 0, 0] = 0


EXACT, IDENTITY, GEMM, WHOLE = "exact", "identity", "gemm", "layer"
ALL = {EXACT, IDENTITY, GEMM, WHOLE}
MUTANTS = [
    (gate_for_up, FUSED, ALL, {BUSY}),
    (gate_for_up_everywhere, FUSED, ALL, set(range(E))),
    (experts_exchanged, FUSED, ALL, {3, 10}),
    (sorted_as_text, FUSED, ALL, set(range(2, E))),
    (transposed_square, FUSED, ALL, {BUSY}),
    (shard_boundary_off_by_one, SHARDED, ALL, set(range(E))),
    (rows_of_wo_off_by_one, FUSED, ALL, {BUSY}),
    (idle_expert_zeroed, FUSED, ALL - {WHOLE}, {IDLE}),
    (busy_expert_zeroed, FUSED, ALL, {BUSY}),
    (one_bit, FUSED, ALL, {BUSY}),
    (lowest_bit_between, FUSED, {EXACT, GEMM}, {IDLE}),
]


@pytest.fixture
def damaged(root, tmp_path) -> Callable[..., Path]:
    def make(change: Callable[[Any, Any], None], layout: str = FUSED) -> Path:
        copy = shutil.copytree(root / layout, tmp_path / "damaged")
        change(stored(copy, f"{LAYER}.wi"), stored(copy, f"{LAYER}.wo"))
        return copy

    return make


def found(a: Path, b: Path, **options: Any) -> dict[str, tuple[str, ...]]:
    return {level.name: level.differences for level in convert.verify(a, b, **options).levels if level.differences}


@pytest.mark.parametrize(("change", "layout", "levels", "experts"), MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mutant_is_caught_by_the_levels_that_can_see_it_and_named(root, damaged, change, layout, levels, experts):
    differences = found(root / "in", damaged(change, layout))
    assert set(differences) == levels
    for level in levels - {WHOLE}:
        assert all(line.startswith("layer 1, expert ") for line in differences[level])
        assert {int(line.split("expert ")[1].split(",")[0].split(":")[0]) for line in differences[level]} == experts
    assert len(differences.get(WHOLE, ())) == (WHOLE in levels)


def test_minus_zero_is_not_zero(root, damaged, tmp_path):
    """No GEMM can tell; the bits can."""
    one = damaged(sign_of_zero)
    other = shutil.copytree(one, tmp_path / "other")
    stored(other, f"{LAYER}.wi")[BUSY, 0, 3] = 0
    assert set(found(one, other)) == {EXACT}


def test_nan_made_zero_is_caught_and_nan_equals_itself(root, damaged, tmp_path):
    zero = damaged(not_a_number_made_zero)
    poisoned = shutil.copytree(zero, tmp_path / "poisoned")
    stored(poisoned, f"{LAYER}.wi")[IDLE, 0, 0] = 0x7FC1
    convert.split(poisoned, tmp_path / "split")
    assert not found(tmp_path / "split", poisoned)
    assert set(found(tmp_path / "split", zero)) >= {EXACT, IDENTITY, GEMM}


def test_a_dropped_layer_is_caught(root, tmp_path):
    make_checkpoint(tmp_path / "short", family="qwen3_moe", experts=E, embed=K, mlp=N, layers=1, values="normal")
    differences = found(root / FUSED, tmp_path / "short")
    assert set(differences) == {EXACT, "others", "files"}
    assert differences[EXACT] == ("layer 1: only one of the two has this MoE layer",)


@pytest.mark.parametrize("backend", [pytest.param("megablox", marks=pytest.mark.slow), "moegemm"])
def test_other_backends_catch_them_too(root, damaged, backend):
    assert set(found(root / "in", damaged(gate_for_up), backend=backend)) == ALL


@pytest.mark.slow
def test_all_backends_report_each_for_itself(root, damaged):
    differences = found(root / "in", damaged(idle_expert_zeroed), backend="all")
    levels = {f"{level}{suffix}" for level in (IDENTITY, GEMM) for suffix in ("", "/megablox", "/moegemm")}
    assert set(differences) - {f"{level}/tokamax" for level in (IDENTITY, GEMM)} == {EXACT} | levels
