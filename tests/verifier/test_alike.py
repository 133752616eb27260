"""Bits are compared part by part, on several threads, within a bound of memory; what is found does not depend on that."""

import itertools
import threading
import time

import numpy as np
import pytest

import convert
from convert.verifier.bits import exact
from convert.verifier.bits.alike import Difference, differing
from convert.verifier.bits.logical import Scope, blocks
from convert.verifier.bits.work import Scratch, Work, in_order
from convert.verifier.verdict import Level
from layouts.checkpoint import open_checkpoint
from layouts.matching.describe import describe
from scripts.make_checkpoint import make_checkpoint
from tests.verifier.test_mutants import stored

K, N = 32, 40


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (1, 300, 1), (513, 700), (3, 200, 300), (70, 3, 50, 40)])
def test_one_bit_is_found_wherever_it_is_and_however_the_axes_lie(shape, dtype):
    dice = np.random.default_rng(len(shape))
    x = dice.integers(0, 200, shape).astype(dtype)
    for order in itertools.islice(itertools.permutations(range(len(shape))), 6):
        y = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order)).copy(order="K") if shape else x.copy()
        assert differing(x, y) is None
        for at in {tuple(int(dice.integers(n)) for n in shape) for _ in range(4)} if x.size else ():
            y[at] ^= 1
            assert differing(x, y) == differing(y, x) == Difference(1, at)
            y[at] ^= 1


def test_all_that_differ_are_counted_and_the_first_in_logical_order_is_told():
    x = np.zeros((600, 500), np.uint16)
    y = np.zeros((500, 600), np.uint16).T
    y[599, 1] = y[4, 499] = y[5, 0] = 1
    assert differing(x, y) == Difference(3, (4, 499))


def test_another_shape_is_an_error_and_no_broadcast():
    with pytest.raises(ValueError, match=r"\(3, 1\) in one, \(3, 4\)"):
        differing(np.zeros((3, 1), np.uint8), np.zeros((3, 4), np.uint8))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    made = tmp_path_factory.mktemp("plain") / "in"
    make_checkpoint(made, family="qwen3_moe", experts=4, embed=K, mlp=N, layers=2)
    return made


@pytest.mark.parametrize(
    ("layout", "wo"), [("concat", "wo"), ("per-shard", "wo"), ("interleaved", "wo"), ("transformers", "down_proj")]
)
@pytest.mark.parametrize("each", [1 << 30, 7000, 520])
def test_parts_of_an_expert_and_threads_find_the_same(plain, tmp_path, layout, wo, each):
    """An expert is read in parts as one that memory cannot hold would be; here memory is of 7,000 and of 500 bytes."""
    sizes = {"shards": 2, "align": 24} if layout == "per-shard" else {}
    convert.prefuse(plain, tmp_path / "out", layout=layout, **sizes)
    found = stored(tmp_path / "out", f"model.layers.1.mlp.experts.{wo}")
    found[(3, N - 1, K - 1) if wo == "wo" else (3, K - 1, N - 1)] ^= 1
    found[(3, 2, 3) if wo == "wo" else (3, 3, 2)] ^= 1
    found.flush()
    whole, parts = (_exact(plain, tmp_path / "out", work) for work in (Work(each=1 << 30), Work(jobs=3, each=each)))
    assert whole == parts
    assert whole.differences == (f"layer 1, expert 3, down (wo): 2 of {N * K} elements, first at (n, k) = (2, 3)",)


def test_padding_is_looked_at_in_parts_too(plain, tmp_path):
    convert.prefuse(plain, tmp_path / "out", layout="per-shard", shards=2, align=24)
    found = stored(tmp_path / "out", "model.layers.0.mlp.experts.wi")
    found[2, 5, -1] = 1
    found.flush()
    (line,) = _exact(plain, tmp_path / "out", Work(jobs=2, each=520)).differences
    assert line.startswith("layer 0, expert 2, gate (wi_0) and up (wi_1): there is more than zeros behind")


def _exact(a, b, work) -> Level:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "within", lambda *_: work)
        sides = [blocks(reader, describe(reader)) for reader in map(open_checkpoint, (a, b))]
        return exact.compare_experts(*sides, lambda _: None, Scope())


def test_each_thread_has_memory_of_its_own():
    scratch, gate = Scratch(), threading.Barrier(3)

    def fill(number: int) -> bool:
        scratch.rewind()
        block = scratch.empty((1000,), np.dtype("u2"))
        block[...] = number
        gate.wait()
        return bool((block == number).all())

    assert list(in_order(fill, range(3), 3)) == [True] * 3


def test_what_is_raised_ends_the_work():
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 2:
            raise ValueError("two")
        time.sleep(0.001)
        return number

    with pytest.raises(ValueError, match="two"):
        list(in_order(work, range(10_000), 2))
    assert len(begun) < 10_000


@pytest.mark.parametrize("count", [0, 1, 3, 2_000])
@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_those_before_an_error_come(count, jobs):
    assert list(in_order(lambda number: number, range(count), jobs)) == list(range(count))
    found = in_order(lambda number: number + 0 * (1 // (count - number)), range(count + 5), jobs)
    assert list(itertools.islice(found, count)) == list(range(count))
    with pytest.raises(ZeroDivisionError):
        next(found)
