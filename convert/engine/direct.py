"""Write blocks into a file past the page cache, where the system can do that.

In: blocks of bytes and offsets. Out: the same bytes on the disk. It never changes the size of a file.

The output of a conversion is larger than memory, has to lie on the disk at the end, and is not read again. The page cache would
first copy each byte into memory that the kernel has to find, one thread for a file at a time. That took longer than all the
rest. With `O_DIRECT` the disk takes the bytes from the worker's own memory, which is used again for each block. `O_DIRECT`
takes whole pages only, so the two ends of a block go through the page cache, as small blocks do.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from convert.commit.files import Folder, opened_again, write_all

PAGE = 4096
"""What offsets, lengths and addresses must be multiples of; no disk in use has larger blocks."""
LEAST = 256 << 10
"""Bytes below which the page cache is faster, because it puts neighbours together."""
DISKS = ("btrfs", "ext4", "f2fs", "overlay", "xfs")
"""File systems of a local disk. Others keep the page cache; the servers behind some can copy within themselves, too."""
_CANNOT = (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)
"""What `copy_file_range` says where it does not work: between file systems, on old kernels, on some network disks."""


class Scratch:
    """The memory of one worker for a block of up to `nbytes`, used again for each."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._pages = np.frombuffer(mmap.mmap(-1, nbytes + PAGE), np.uint8)

    def empty(self, shape: Sequence[int], dtype: DTypeLike, offset: int) -> NDArray[Any]:
        """A block for `offset` of a file: it lies in its page of memory as it will in its page of the file."""
        start = offset % PAGE
        return np.ndarray(shape, dtype, self._pages.data, start)

    def filled(self, data: memoryview, offset: int) -> memoryview:
        """Such a block with these bytes in it; they are not copied if they lie that way already."""
        if _aligned(data, offset):
            return data
        block = self.empty((len(data),), np.uint8, offset)
        block[:] = data
        return block.data


class Output:
    """An existing file, open for blocks at any offset."""

    def __init__(self, folder: Folder, name: str) -> None:
        self.descriptor = folder.open(name, os.O_WRONLY)
        self._direct = _open_direct(folder, self.descriptor)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._no_direct()
        os.close(self.descriptor)

    def passes_cache(self, nbytes: int) -> bool:
        """Whether a block of this size goes past the page cache."""
        return self._direct is not None and nbytes >= LEAST

    def copy(self, file: int, begin: int, nbytes: int, offset: int) -> int:
        """Let the kernel copy bytes of a file to an offset, as many as it can; how many that was.

        Raises:
            OSError: the disk is full or failing.
        """
        done = 0
        try:
            while done < nbytes and (
                step := os.copy_file_range(file, self.descriptor, nbytes - done, begin + done, offset + done)
            ):
                done += step
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
        return done

    def put(self, block: memoryview, offset: int) -> None:
        """Write all bytes of a block at an offset; past the page cache if it is large and lies as `Scratch` has it.

        Raises:
            OSError: the disk is full or failing.
        """
        head, stop = -offset % PAGE, len(block) - (offset + len(block)) % PAGE
        done = 0
        if self.passes_cache(stop - head) and _aligned(block, offset):
            write_all(self.descriptor, block[:head], offset)
            done = head + self._put_direct(block[head:stop], offset + head)
        write_all(self.descriptor, block[done:], offset + done)

    def _put_direct(self, pages: memoryview, offset: int) -> int:
        """How many bytes could be written so; a system that opens files for it may yet refuse to write."""
        assert self._direct is not None
        try:
            return os.pwrite(self._direct, pages, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._no_direct()
            return 0

    def _no_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


def _open_direct(folder: Folder, descriptor: int) -> int | None:
    if _file_system(folder.path) not in DISKS:
        return None
    try:
        return opened_again(descriptor, os.O_DIRECT)
    except OSError:
        return None


@lru_cache
def _file_system(folder: Path) -> str:
    """The type of the file system that a folder lies in; empty where the system does not say."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    mounts = {}
    for line in lines:  # proc(5): ... mount-point options [tags] - type source options; a later mount hides an earlier one
        mount, _, rest = line.partition(" - ")
        mounts[mount.split()[4]] = rest.split()[0]
    folder = folder.resolve()
    return next((mounts[str(place)] for place in (folder, *folder.parents) if str(place) in mounts), "")


def _aligned(block: memoryview, offset: int) -> bool:
    return (np.frombuffer(block, np.uint8).ctypes.data - offset) % PAGE == 0
