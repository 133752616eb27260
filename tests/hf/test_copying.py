"""Bytes that go as they lie: the runs are the same bytes as the block, and a kernel that cannot copy them changes nothing."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import xxhash

import convert
from convert.engine import copying
from convert.engine.blocks import assembled
from convert.engine.runs import runs
from convert.options import Choices
from convert.planning.planner import make_plan
from layouts.tables.families import FAMILIES
from layouts.tables.targets import TARGETS
from tests.tiny import checkpoint, config, memory, tensors, tree

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")


@pytest.mark.parametrize("limit", [1, 5, 24, 48, 100, 10_000])
@pytest.mark.parametrize(
    ("layout", "straight"), [("transformers", True), ("flashinfer", True), ("concat", False), (None, True)]
)
def test_runs_are_the_bytes_of_the_block(layout, straight, limit):
    reader = memory(QWEN, TARGETS["transformers"] if layout is None else None, n=8)
    plan = make_plan(reader, Path("out"), "split" if layout is None else "prefuse", Choices(layout=layout or "concat"))
    seen = set()
    for target in plan.targets:
        for box in target.target.pattern.strips(target.sizes, limit):
            found = runs(target, box)
            seen.add((target.moved, found is not None))
            if found is not None:
                flat = [reader.arrays[run.source].reshape(-1).view("u1")[run.start : run.start + run.nbytes] for run in found]
                block = assembled(target, box, reader)
                assert np.array_equal(np.concatenate(flat), block.reshape(-1).view("u1"))
    assert (False, True) in seen
    assert (True, True) in seen if straight or limit == 1 else (True, False) in seen


def test_neighbours_become_one_run():
    plan = make_plan(memory(QWEN), Path("out"), "prefuse", Choices(layout="transformers"))
    for target in plan.targets:
        whole = target.target.pattern.whole(target.sizes)
        sources = {piece.source for piece in target.pieces(whole)}
        assert len(runs(target, whole)) == len(sources)


@pytest.mark.parametrize("short", [0, 1 << 14])
@pytest.mark.parametrize("layout", ["concat", "flashinfer", "cutedsl", "vllm"])
@pytest.mark.parametrize("native", [None, "transformers"], ids=str)
def test_every_source_has_its_digest_whatever_runs_it_lies_in(tmp_path, monkeypatch, native, layout, short):
    """Halves of a fused source, and rows of it in turn, are runs that are no whole sources."""
    found = tensors(QWEN, TARGETS[native] if native else None, n=64)
    source = checkpoint(tmp_path / "in", found, config(QWEN))
    monkeypatch.setattr(copying, "SHORT", short)
    convert.prefuse(source, tmp_path / "out", layout=layout)
    sources = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())["sources"]
    assert sources == {name: xxhash.xxh3_128_hexdigest(found[name].tobytes()) for name in sorted(found)}


@pytest.mark.parametrize("behaviour", ["exdev", "short", "nothing"])
@pytest.mark.parametrize("layout", ["concat", "transformers"])
def test_a_kernel_that_cannot_copy_ranges_gives_the_same_files(tmp_path, monkeypatch, behaviour, layout):
    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))
    convert.prefuse(source, tmp_path / "wanted", layout=layout)
    real, calls = os.copy_file_range, []

    def copy(src, dst, count, offset_src, offset_dst):
        calls.append(count)
        if behaviour == "exdev":
            raise OSError(errno.EXDEV, "another file system")
        return real(src, dst, min(count, 7), offset_src, offset_dst) if behaviour == "short" else 0

    monkeypatch.setattr(os, "copy_file_range", copy)
    monkeypatch.setattr(copying, "SHORT", 0)  # or the data would have to be larger
    convert.prefuse(source, tmp_path / "out", layout=layout)
    assert calls
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")


@pytest.mark.parametrize("layout", ["transformers", "concat"])
def test_small_tensors_are_read_and_written_together(tmp_path, monkeypatch, layout):
    """A tensor between them that is not small, or is put together from blocks, is left out of no file, and ends a stretch."""
    found = tensors(QWEN, n=8) | {"model.between": np.arange(20_000, dtype="u2").view(np.int16)}
    source = checkpoint(tmp_path / "in", found, config(QWEN))
    wanted = {file.name: file.read_bytes() for file in source.glob("*.safetensors")}
    writes, real = [], copying.Output.put
    monkeypatch.setattr(copying.Output, "put", lambda self, block, at: (writes.append(len(block)), real(self, block, at))[1])
    convert.prefuse(source, tmp_path / "out", layout=layout)
    writes.clear()
    convert.split(tmp_path / "out", tmp_path / "back")
    assert wanted == {file.name: file.read_bytes() for file in (tmp_path / "back").glob("*.safetensors")}
    assert len(found) > len(writes) > 4 if layout == "concat" else len(writes) <= 4
