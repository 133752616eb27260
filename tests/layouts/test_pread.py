"""Blocks read out of a file are NumPy's slices, however they lie; a file that is cut, is no file or fails says so by name."""

import errno
import os
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layouts.disk.gather import Part, gather, gathered
from layouts.disk.pread import Extent, InputFile, read_block
from layouts.errors import InputError


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=5)))
    cut = []
    for size in shape:
        start = draw(st.integers(0, size))
        cut.append(slice(start, draw(st.integers(start, size))))
    return shape, tuple(cut), draw(st.sampled_from(["u1", "u2", "u4", "u8"]))


@pytest.mark.parametrize(("gap", "cover"), [(0, 1), (3, 1), (16, 40), (1 << 20, 1), (1 << 20, 64), (1 << 20, 1 << 20)])
@given(case=cases())
def test_any_block_is_what_numpy_cuts(tmp_path_factory, gap, cover, case):
    shape, cut, dtype = case
    array = np.random.default_rng(0).integers(0, 255, (*shape, np.dtype(dtype).itemsize), "u1").view(dtype)[..., 0]
    path = tmp_path_factory.mktemp("block") / "file"
    path.write_bytes(b"head" + array.tobytes())
    with pytest.MonkeyPatch.context() as patched, closing(InputFile.open(path)) as file:
        patched.setattr(InputFile, "gap", gap)
        patched.setattr(InputFile, "cover", cover)
        out = np.empty(array[cut].shape, dtype)
        read_block(Extent(file, 4), shape, cut, out)
    assert np.array_equal(out, array[cut])


def calls(tmp_path, monkeypatch, shape, cut):
    """How many bytes each call asked for."""
    array = np.random.default_rng(0).integers(0, 255, shape, "u1")
    (tmp_path / "file").write_bytes(array.tobytes())
    asked, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: (asked.append(len(views[0])), real(fd, views, at))[1])
    with closing(InputFile.open(tmp_path / "file")) as file:
        out = np.empty(array[cut].shape, "u1")
        read_block(Extent(file, 0), shape, cut, out)
    assert np.array_equal(out, array[cut])
    return asked


def test_what_lies_in_one_piece_takes_one_call(tmp_path, monkeypatch):
    assert calls(tmp_path, monkeypatch, (4, 300, 1000), (slice(1, 3), slice(0, 300), slice(0, 1000))) == [600_000]


def test_parts_of_short_rows_take_few_calls(tmp_path, monkeypatch):
    asked = calls(tmp_path, monkeypatch, (3000, 1000), (slice(0, 3000), slice(250, 750)))
    assert len(asked) == 3
    assert max(asked) <= InputFile.cover


def test_long_runs_are_read_without_what_is_between_them(tmp_path, monkeypatch):
    assert calls(tmp_path, monkeypatch, (4, 200_000), (slice(0, 4), slice(0, 50_000))) == [50_000] * 4


def test_far_runs_are_read_without_what_is_between_them(tmp_path, monkeypatch):
    assert calls(tmp_path, monkeypatch, (4, 500_000), (slice(0, 4), slice(7, 17))) == [10] * 4


def test_a_file_that_ends_early_is_named(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10))
    with closing(InputFile.open(tmp_path / "file")) as file, pytest.raises(InputError, match=r"file: it ends at byte 10"):
        file.read(memoryview(bytearray(20)), 0)


def test_a_failing_disk_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "file").write_bytes(bytes(10))
    monkeypatch.setattr(os, "preadv", fail)
    with closing(InputFile.open(tmp_path / "file")) as file, pytest.raises(OSError, match="Input/output error") as raised:
        file.read(memoryview(bytearray(10)), 0)
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(tmp_path / "file"))


def test_short_reads_go_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))
    found = bytearray(90)
    with closing(InputFile.open(tmp_path / "file")) as file:
        file.read(memoryview(found), 10)
    assert found == bytes(range(10, 100))


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        InputFile.open(path)


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "blob").write_bytes(b"data")
    (tmp_path / "file").symlink_to("blob")
    found = bytearray(4)
    with closing(InputFile.open(tmp_path / "file")) as file:
        file.read(memoryview(found), 0)
    assert found == b"data"


@pytest.mark.parametrize(
    ("gap", "cover", "count"), [(0, 1, 9), (0, 1 << 20, 5), (4, 1 << 20, 4), (1 << 20, 1 << 20, 2), (1 << 20, 12, 5)]
)
def test_short_runs_are_read_together_and_stand_where_they_should(tmp_path, monkeypatch, gap, cover, count):
    data = [np.random.default_rng(seed).integers(0, 255, 100, "u1").tobytes() for seed in range(2)]
    starts = [(0, 90, 10), (0, 0, 4), (0, 4, 4), (0, 7, 3), (0, 30, 0), (1, 50, 6), (0, 12, 4), (1, 44, 6), (0, 16, 2)]
    asked, real = [], InputFile.read
    monkeypatch.setattr(InputFile, "read", lambda self, view, at: (asked.append(at), real(self, view, at))[1])
    monkeypatch.setattr(InputFile, "gap", gap)
    monkeypatch.setattr(InputFile, "cover", cover)
    for number, text in enumerate(data):
        (tmp_path / str(number)).write_bytes(text)
    with closing(InputFile.open(tmp_path / "0")) as one, closing(InputFile.open(tmp_path / "1")) as two:
        places = np.cumsum([1, *(nbytes + 1 for _, _, nbytes in starts)])
        out = bytearray(b"-" * places[-1])
        gather([Part((one, two)[f], at, n, place) for (f, at, n), place in zip(starts, places, strict=False)], memoryview(out))
    assert bytes(out) == b"-" + b"".join(data[f][at : at + n] + b"-" for f, at, n in starts)
    assert len(asked) == count


@pytest.mark.parametrize(
    ("gap", "cover", "count"), [(0, 1, 7), (0, 1 << 20, 5), (5, 1 << 20, 2), (1 << 20, 1 << 20, 1), (1 << 20, 12, 4)]
)
def test_runs_of_one_length_stand_in_the_rows_that_asked_for_them(tmp_path, monkeypatch, gap, cover, count):
    data, starts = np.random.default_rng(0).integers(0, 255, 100, "u1"), np.array([90, 0, 4, 30, 16, 8, 25, 4])
    asked, real = [], InputFile.read
    monkeypatch.setattr(InputFile, "read", lambda self, view, at: (asked.append(at), real(self, view, at))[1])
    monkeypatch.setattr(InputFile, "gap", gap)
    monkeypatch.setattr(InputFile, "cover", cover)
    (tmp_path / "file").write_bytes(data.tobytes())
    with closing(InputFile.open(tmp_path / "file")) as file:
        assert np.array_equal(gathered(file, starts, 4), [data[at : at + 4] for at in starts])
    assert len(asked) == count


def test_short_runs_behind_the_end_of_a_file_are_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"12345678")
    with closing(InputFile.open(tmp_path / "file")) as file, pytest.raises(InputError, match="it ends at byte 8"):
        gather([Part(file, 0, 4, 0), Part(file, 6, 4, 4)], memoryview(bytearray(8)))
