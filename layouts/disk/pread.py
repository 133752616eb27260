"""Read blocks of a tensor out of a file into memory of the caller's own.

In: an open file, where the tensor begins in it, its shape, the part that is wanted. Out: that part, in one piece. The file is
never mapped: whoever cuts it meanwhile, or a disk that fails, is an error with the file's name, where a mapping is a SIGBUS.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from layouts.errors import InputError

Empty = Callable[[Sequence[int], np.dtype[Any]], NDArray[Any]]
"""Gives an array of a shape and element type, with anything in it."""


class Ranged(Protocol):
    """What is read by ranges of bytes: a file, or an object of a store (`layouts.disk.stored`)."""

    @property
    def descriptor(self) -> int | None:
        """Of a file; None where no system call takes it."""

    @property
    def gap(self) -> int:
        """Bytes between two runs that are read along with them: a call costs about as much as to read so many."""

    @property
    def cover(self) -> int:
        """Bytes that are read at a time where gaps are read along."""

    def read(self, view: memoryview, offset: int) -> None:
        """Fill a view with the bytes from `offset`; see `InputFile.read`."""

    def close(self) -> None:
        """Let go of it."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input, open for any number of threads."""

    path: Path
    descriptor: int
    gap: ClassVar[int] = 32 << 10
    cover: ClassVar[int] = 1 << 20
    """They stay in the cache of a core until they are picked from."""

    @classmethod
    def open(cls, path: Path) -> InputFile:
        """Open a regular file, or a link to one.

        Raises:
            InputError: it is of another kind, which could keep a reader waiting for ever.
            OSError: the system refuses.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InputError(f"{path}: not a regular file; put a copy of the data in its place")
        return cls(path, descriptor)

    @property
    def size(self) -> int:
        """Bytes that it has now."""
        return os.fstat(self.descriptor).st_size

    def read(self, view: memoryview, offset: int) -> None:
        """Fill a view with the bytes from `offset`.

        Raises:
            InputError: the file ends before.
            OSError: the disk is failing; with the name of the file.
        """
        done = 0
        while done < len(view):
            try:
                step = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if not step:
                raise InputError(
                    f"{self.path}: it ends at byte {self.size:,}, but there should be {len(view):,} bytes at {offset:,}; was "
                    f"it cut while it was read? Download or copy it again"
                )
            done += step

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Extent(NamedTuple):
    """Where a tensor lies as it is read: a file, and the offset of its first byte in it."""

    file: Ranged
    start: int


class Extents(NamedTuple):
    """Where some of many tensors lie: a file, the `places` (R,) of them among the many, and the offset of each (R,) in it."""

    file: Ranged
    places: NDArray[np.intp]
    starts: NDArray[np.int64]


def read_block(extent: Extent, shape: Sequence[int], slices: Sequence[slice], out: NDArray[Any]) -> None:
    """Fill `out`, C-contiguous, with a part of a tensor of this shape.

    Runs of bytes that lie far from one another are read one by one. Where they are near, as parts of short rows are, they are
    read together with what is between them, `cover` bytes at a time, and picked out there.

    Raises:
        InputError, OSError: see `InputFile.read`.
    """
    if not out.size:
        return
    if out.shape == tuple(shape):  # all of it, as most small tensors are read
        extent.file.read(_bytes(out), extent.start)
        return
    spans = [range(*part.indices(size)) for part, size in zip(slices, shape, strict=True)]
    strides = [out.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    run = _inner(shape, spans)
    near = _near(spans, strides, run, out.itemsize, extent.file.gap)
    for outer in itertools.product(*(range(len(span)) for span in spans[:near])):
        start = extent.start + sum((span.start + i) * step for span, i, step in zip(spans, outer, strides, strict=False))
        start += sum(span.start * step for span, step in zip(spans[near:], strides[near:], strict=True))
        dots: Any = ...  # they keep a single element an array
        part = out[(*outer, dots)]
        if near == run:
            extent.file.read(_bytes(part), start)
        else:
            _read_over(extent.file, start, part, strides[near:])


def _inner(shape: Sequence[int], spans: Sequence[range]) -> int:
    """The first axis of those that lie in one run: from it on, only the first is not whole."""
    axis = len(shape)
    while axis and (axis == len(shape) or len(spans[axis]) == shape[axis]):
        axis -= 1
    while axis and len(spans[axis - 1]) == 1:
        axis -= 1
    return axis


def _near(spans: Sequence[range], strides: Sequence[int], run: int, itemsize: int, gap: int) -> int:
    """The first axis of those whose runs are near one another."""
    axis = run
    extent = itemsize * math.prod(map(len, spans[run:]))
    if extent > gap:
        return run  # long runs are read as they are: picking them costs more than the calls
    while axis and strides[axis - 1] - extent <= gap:
        axis -= 1
        extent += (len(spans[axis]) - 1) * strides[axis]
    return axis


def _read_over(file: Ranged, start: int, out: NDArray[Any], strides: Sequence[int]) -> None:
    """Fill `out` from a strided block of the file."""
    rest = out.itemsize + sum((size - 1) * step for size, step in zip(out.shape[1:], strides[1:], strict=True))
    step = max(1, 1 + (file.cover - rest) // strides[0])
    if step == 1 and rest > file.cover and out.ndim > 1:
        for i in range(out.shape[0]):
            _read_over(file, start + i * strides[0], out[i], strides[1:])
        return
    scratch = np.empty(rest + (min(step, out.shape[0]) - 1) * strides[0], np.uint8)
    for first in range(0, out.shape[0], step):
        part = out[first : first + step]
        covered = scratch[: rest + (len(part) - 1) * strides[0]]
        file.read(covered.data, start + first * strides[0])
        part[...] = np.ndarray(part.shape, out.dtype, covered.data, 0, tuple(strides))


def _bytes(block: NDArray[Any]) -> memoryview:
    return block.reshape(-1).view(np.uint8).data
