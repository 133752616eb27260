"""Where a stored chunk reaches across many reads, these go through windows; who reads in their order decodes nothing twice."""

import json
import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import tensorstore as ts

import convert
from layouts.orbax.reader import OrbaxReader
from layouts.reader import ReadLimits
from layouts.through import RenamedReader
from layouts.windows import Windows, window_shape
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import cut, store_again

RANDOM = np.random.default_rng(0)
SHAPE = (8, 6, 20, 12)
"""(E, L, K, N)"""
ONE = (1, 1, 20, 12)
"""An expert of a layer."""


@pytest.mark.parametrize(
    ("chunk", "limit", "wanted"),
    [
        (ONE, 10**6, None),
        ((1, 1, 5, 12), 10**6, None),
        ((2, 6, 20, 12), 10**6, (2, 6, 20, 12)),
        ((2, 6, 20, 12), 2 * 6 * 240, (2, 6, 20, 12)),
        ((2, 6, 20, 12), 2 * 6 * 240 - 1, (1, 6, 20, 12)),
        ((2, 6, 20, 12), 6 * 240 - 1, (1, 5, 20, 12)),
        ((8, 6, 5, 12), 10**6, (8, 6, 20, 12)),
        ((8, 6, 5, 12), 3 * 6 * 240, (3, 6, 20, 12)),
        ((2, 6, 5, 12), 5 * 6 * 240, (2, 6, 20, 12)),
        ((8, 6, 5, 12), 240, ONE),
        ((8, 6, 5, 12), 239, None),
    ],
)
def test_windows_hold_whole_chunks_if_they_can_and_whole_reads_in_any_case(chunk, limit, wanted):
    assert window_shape(SHAPE, chunk, ONE, ONE, limit) == wanted


def test_a_window_holds_what_is_read_in_turn_before_it_holds_chunks():
    unit, read = (8, 1, 20, 12), (2, 1, 20, 12)
    assert window_shape(SHAPE, (4, 6, 20, 12), unit, read, 8 * 3 * 240) == (8, 3, 20, 12)
    assert window_shape(SHAPE, (4, 6, 20, 12), unit, read, 7 * 240) == (6, 1, 20, 12)


@pytest.mark.parametrize("chunk", [(2, 6, 20, 12), (8, 6, 5, 12), (3, 4, 7, 12), (8, 6, 20, 12), (5, 5, 20, 5)])
@pytest.mark.parametrize("limit", [240, 1000, 5000, 10**6])
def test_every_read_lies_in_one_window(chunk, limit):
    shape = window_shape(SHAPE, chunk, ONE, ONE, limit)
    assert math.prod(shape) <= limit
    array, loads = RANDOM.integers(0, 1 << 16, SHAPE, np.uint16), []

    def load(name, slices):
        loads.append(slices)
        return array[slices]

    windows = Windows(shapes={"x": shape}, limit=2 * math.prod(shape))
    points = sorted(np.ndindex(SHAPE[:2]), key=lambda at: tuple(i // w for i, w in zip(at, shape, strict=False)))
    for e, layer in points:
        slices = (slice(e, e + 1), slice(layer, layer + 1), slice(0, 20), slice(0, 12))
        assert np.array_equal(windows.read("x", slices, 2, load), array[slices])
    assert len(loads) == len(set(map(str, loads))), "in their order, each is loaded once"
    assert windows.read("x", (slice(0, 8), slice(0, 6), slice(0, 20), slice(0, 12)), 2, load) is None or shape == SHAPE
    assert windows.read("y", slices, 2, load) is None


def test_arrays_under_other_names_are_read_through_windows_as_well():
    array, loads, inner = np.arange(64), [], SimpleNamespace()
    inner.hold = lambda _, windows: setattr(inner, "windows", windows)
    reader = RenamedReader(inner=inner, names={"here": "stored"})
    reader.hold(ReadLimits(), Windows(shapes={"here": (16,)}, limit=1 << 20))
    for start in (0, 4, 8):
        part = inner.windows.read("stored", (slice(start, start + 4),), 8, lambda name, cut: loads.append(name) or array[cut])
        assert np.array_equal(part, array[start : start + 4])
    assert loads == ["stored"]
    assert reader.windows.number("here", (slice(20, 24),)) == (1,)


def test_threads_wait_for_the_one_that_loads():
    array, loads, begun = np.arange(64), [], threading.Barrier(4)

    def load(name, slices):
        loads.append(slices)
        return array[slices]

    windows = Windows(shapes={"x": (16,)}, limit=1 << 20)

    def read(start):
        begun.wait()
        return windows.read("x", (slice(start, start + 4),), 8, load)

    with ThreadPoolExecutor(4) as pool:
        assert [list(found) for found in pool.map(read, (16, 20, 24, 28))] == [list(range(i, i + 4)) for i in (16, 20, 24, 28)]
    assert loads == [(slice(16, 32),)]


def test_who_waits_for_a_window_learns_that_it_cannot_be_loaded():
    def fail(name, slices):
        raise convert.InputError("broken")

    windows = Windows(shapes={"x": (16,)}, limit=1 << 20)
    for _ in range(2):
        with pytest.raises(convert.InputError, match="broken"):
            windows.read("x", (slice(0, 4),), 8, fail)


CHUNKS = {"experts": cut(0, 4), "rows": cut(2, 4), "columns": cut(3, 4), "one": lambda shape: shape}


@pytest.fixture
def loaded(monkeypatch):
    """The windows that are loaded, and the blocks that are read without one."""
    found, load = [], OrbaxReader._load

    def noted(reader, name, slices, some=0):
        found.append((str(reader.path), name, str(slices), "window" if some else "block"))
        return load(reader, name, slices, some)

    monkeypatch.setattr(OrbaxReader, "_load", noted)
    return found


def often(loaded):
    """How often each window was loaded, at most; experts that are read without one are not wanted."""
    assert not [entry for entry in loaded if entry[-1] == "block" and ".wi" in entry[1] and "_bias" not in entry[1]]
    return max(Counter(entry for entry in loaded if entry[-1] == "window").values())


@pytest.mark.parametrize(
    ("scan_axis", "streams"),
    [(0, True), (1, False), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, False), (1, True)))],
)
@pytest.mark.parametrize("name", CHUNKS)
def test_a_stack_saved_on_many_devices_becomes_hugging_face_with_each_window_loaded_once(
    name, scan_axis, streams, tmp_path, monkeypatch, loaded
):
    if streams:
        monkeypatch.setattr("convert.orbax.budget.STREAM", 8)
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=8, layers=6)
    convert.reformat(tmp_path / "in", tmp_path / "tree", to="orbax", scan_axis=scan_axis)
    store_again(tmp_path / "tree" / "0" / "items", CHUNKS[name])
    for jobs in (1, 4):
        loaded.clear()
        convert.reformat(tmp_path / "tree", tmp_path / str(jobs), to="hf", scan_axis=scan_axis, jobs=jobs)
        assert {entry[1].rpartition(".")[2] for entry in loaded} >= {"wi_0", "wi_1", "wo"}
        assert often(loaded) == 1
        files = {file.name: file.read_bytes() for file in (tmp_path / "in").glob("*.safetensors")}
        assert {file.name: file.read_bytes() for file in (tmp_path / str(jobs)).glob("*.safetensors")} == files


def test_fused_experts_of_hugging_face_are_made_from_windows_of_both_halves(tmp_path, loaded):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=8, layers=6)
    convert.reformat(tmp_path / "in", tmp_path / "tree", to="orbax")
    store_again(tmp_path / "tree" / "0" / "items", CHUNKS["rows"])
    convert.prefuse(tmp_path / "tree", tmp_path / "fused", to="hf")
    assert often(loaded) == 1
    convert.split(tmp_path / "fused", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts"] == 8
    assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal


SMALL = 1 << 15
"""For windows of 64 KB in all, which a stack of these does not fit into."""


@pytest.mark.parametrize("part", [pytest.param(8, id="large", marks=pytest.mark.slow), pytest.param(SMALL, id="small")])
@pytest.mark.parametrize("name", CHUNKS)
def test_stacks_are_verified_with_each_window_loaded_once_for_bits_and_once_for_probes(
    name, part, tmp_path, monkeypatch, loaded
):
    monkeypatch.setattr("convert.verifier.bits.order.PART", part)
    make_checkpoint(tmp_path / "hf", family="qwen3_moe", experts=8, layers=6)
    convert.reformat(tmp_path / "hf", tmp_path / "tree", to="orbax")
    store_again(tmp_path / "tree" / "0" / "items", CHUNKS[name])
    convert.prefuse(tmp_path / "tree", tmp_path / "fused")
    for one, other in (("hf", "tree"), ("tree", "fused"), ("fused", "hf")):
        for gemm in (False, True):
            loaded.clear()
            verdict = convert.verify(tmp_path / one, tmp_path / other, gemm=gemm)
            assert verdict.equal
            assert len(verdict.levels) == (8 if gemm else 4)
            assert often(loaded) <= 1 + gemm


@pytest.mark.parametrize("name", CHUNKS)
def test_what_is_read_through_windows_is_compared(name, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.verifier.bits.order.PART", SMALL)
    make_checkpoint(tmp_path / "hf", family="qwen3_moe", experts=8, layers=6, values="normal")
    for tree in ("tree", "damaged"):
        convert.reformat(tmp_path / "hf", tmp_path / tree, to="orbax")
    item = tmp_path / "damaged" / "0" / "items"
    path = "params.params.decoder.layers.moe_block.wi_1/"
    store = ts.open({"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": f"file://{item}/", "path": path}}).result()
    store[5, 4, 3, 2].write(store[5, 4, 3, 2].read().result() * -1).result()
    for tree in ("tree", "damaged"):
        store_again(tmp_path / tree / "0" / "items", CHUNKS[name])
    verdict = convert.verify(tmp_path / "tree", tmp_path / "damaged")
    failed = {level.name for level in verdict.levels if level.differences}
    assert {"exact", "gemm"} <= failed <= {"exact", "identity", "gemm", "layer", "gradients"}
    (difference,) = next(level.differences for level in verdict.levels if level.name == "exact")
    assert "scanned 4, expert 5, up (wi_1): 1 of" in difference
    across = convert.verify(tmp_path / "hf", tmp_path / "damaged", gemm=False)
    assert [line.split()[0] for level in across.levels for line in level.differences] == [
        "model.layers.4.mlp.experts.5.up_proj.weight"
    ]
