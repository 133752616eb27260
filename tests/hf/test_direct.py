"""Blocks written past the page cache are the same bytes in the same places, and a system that cannot do it changes nothing."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import convert
from convert.commit.files import Folder
from convert.engine import copying, direct
from convert.engine.direct import PAGE, Output, Scratch
from layouts.tables.families import FAMILIES
from tests.tiny import checkpoint, config, tensors, tree

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")
ROOM = 5 * PAGE
LENGTHS = st.one_of(st.integers(0, ROOM), st.sampled_from([PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]))


@pytest.fixture(autouse=True)
def pages(monkeypatch):
    """Blocks and runs of a page are large enough here, or the data would have to be."""
    monkeypatch.setattr(copying, "SHORT", 0)
    monkeypatch.setattr(direct, "LEAST", PAGE)


def fill(path: Path, lengths: list[int], start: int) -> bytes:
    """Write blocks of these lengths behind each other, from one scratch; what should stand there."""
    rng, scratch = np.random.default_rng(0), Scratch(ROOM)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, start + sum(lengths) + PAGE)
    wanted = bytes(start)
    with Folder.at(path.parent) as folder, Output(folder, path.name) as output:
        for length in lengths:
            data = rng.bytes(length)
            output.put(scratch.filled(memoryview(data), len(wanted)), len(wanted))
            wanted += data
    return wanted + bytes(PAGE)


@given(lengths=st.lists(LENGTHS, min_size=1, max_size=6), start=st.integers(0, 2 * PAGE))
def test_any_blocks_at_any_offset(tmp_path_factory, lengths, start):
    path = tmp_path_factory.mktemp("any") / "file"
    assert fill(path, lengths, start) == path.read_bytes()


def test_whole_pages_of_aligned_blocks_go_past_the_page_cache(tmp_path, monkeypatch):
    calls, real = [], os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (calls.append((len(data), at)), real(fd, data, at))[1])
    if direct._file_system(tmp_path) not in direct.DISKS:
        pytest.skip("not a file system of a local disk")
    fill(tmp_path / "file", [3 * PAGE], 100)
    assert calls == [(PAGE - 100, 100), (2 * PAGE, PAGE), (100, 3 * PAGE)]


@pytest.mark.parametrize("refused", ["open", "pwrite", "a part"])
def test_what_the_system_refuses_goes_through_the_cache(tmp_path, monkeypatch, refused):
    real_open, real_pwrite, special, refusals = os.open, os.pwrite, set(), []

    def opened(path, flags, *rest, **at):
        if flags & os.O_DIRECT and refused == "open":
            refusals.append(path)
            raise OSError(errno.EINVAL, "no direct I/O here")
        descriptor = real_open(path, flags, *rest, **at)
        special.discard(descriptor)
        if flags & os.O_DIRECT:
            special.add(descriptor)
        return descriptor

    def written(descriptor, data, at):
        if descriptor in special:
            refusals.append(at)
            if refused == "pwrite":
                raise OSError(errno.EINVAL, "not of this size")
            data = data[: PAGE + 7]
            return real_pwrite(os_open, data, at)
        return real_pwrite(descriptor, data, at)

    os_open = real_open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(direct, "_file_system", lambda folder: "ext4")
    wanted = fill(tmp_path / "file", [3 * PAGE, 5, 4 * PAGE], 100)
    os.close(os_open)
    assert (tmp_path / "file").read_bytes() == wanted
    assert refusals


@pytest.mark.parametrize("file_system", ["ext4", "nfs4"])
def test_the_kernel_copies_where_the_cache_is_used(tmp_path, monkeypatch, file_system):
    """A server may copy within itself; on a local disk that would only be the page cache again."""
    source = checkpoint(tmp_path / "in", tensors(QWEN, k=128, n=64), config(QWEN))
    convert.prefuse(source, tmp_path / "wanted", layout="transformers")
    calls, real = [], os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda *a: (calls.append(a[2]), real(*a))[1])
    monkeypatch.setattr(direct, "_file_system", lambda folder: file_system)
    convert.prefuse(source, tmp_path / "out", layout="transformers")
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")
    assert (max(calls) >= PAGE) == (file_system == "nfs4")


def test_the_file_system_is_that_of_the_nearest_mount(monkeypatch):
    table = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:5 / /tmp rw shared:1 - tmpfs none rw\n3 1 0:6 / /tmp rw - nfs4 s:/ rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self: table)
    monkeypatch.setattr(Path, "resolve", lambda self: self)
    found = direct._file_system.__wrapped__
    assert [found(Path(place)) for place in ("/tmp/a/b", "/tmpx", "/")] == ["nfs4", "ext4", "ext4"]
