"""The one module that creates, opens for writing, renames and removes anything on a disk.

In: a directory that is open, and names below it. Out: files that are durable where a method says so. It never follows a link,
and never leaves the directory: each name passes the gate (`layouts.disk.names`) and is walked part by part, each from the last.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from layouts.disk.names import key, parts
from layouts.disk.places import RemotePath
from layouts.errors import InputError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC
_RENAME_EXCHANGE = 2
_STEP = 4 << 20
"""Bytes of a side file that are copied at a time."""


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes at an offset, however few the system takes at a time.

    Raises:
        OSError: the disk is full or failing.
    """
    done, view = 0, memoryview(data)
    while done < len(view):
        step = os.pwrite(descriptor, view[done:], offset + done)
        if not step:
            raise OSError(errno.EIO, "the disk takes no more bytes, and does not say why")
        done += step


def opened_again(descriptor: int, flags: int) -> int:
    """The same file, open for writing in another manner, without a second walk to it."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | flags)


class Folder:
    """An open directory. Names are relative to it; `path` is for messages, and for those who only read."""

    __slots__ = ("fd", "path")

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self.fd = path, fd

    @classmethod
    def at(cls, path: Path, *, make: bool = False) -> Folder:
        """Open a directory that the user has named, links and all; with `make`, it is created where there is none."""
        if make and not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def below(self, name: str, *, make: bool = False) -> Folder:
        """Open a directory below; this one where the name is empty. With `make`, what is not there of it is created."""
        if not name:
            return Folder(self.path, os.dup(self.fd))
        with self._at(name, make=make) as (fd, last):
            return Folder(self.path / name, _enter(fd, last, make=make))

    def open(self, name: str, flags: int, *, make: bool = False) -> int:
        """Open a file below; with `make`, directories on the way are created."""
        with self._at(name, make=make) as (fd, last):
            return os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=fd)

    def make(self, name: str) -> bool:
        """Create a directory; whether it was not there."""
        with self._at(name) as (fd, last):
            try:
                os.mkdir(last, dir_fd=fd)
            except FileExistsError:
                return False
        return True

    def reserve(self, name: str, nbytes: int, *, head: bytes = b"", anew: bool = False) -> None:
        """Create a file and reserve its space, so that a full disk shows now; what is in it stays, unless it is made `anew`."""
        with self._opened(name, _NEW if anew else os.O_RDWR | os.O_CREAT) as descriptor:
            if nbytes:
                os.posix_fallocate(descriptor, 0, nbytes)
            if head:
                write_all(descriptor, head, 0)
                os.fsync(descriptor)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file durably.

        Raises:
            InputError: the text holds what is no character.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            what = text[error.start]
            raise InputError(f"{self.path / name}: it would hold {what!r}, which is no character; correct the input") from None
        self._copied(name, iter([data]))

    def copy_in(self, source: Path, name: str) -> None:
        """Copy a file's contents durably; permissions are the user's own, as for any new file.

        Raises:
            InputError: the source is no regular file.
        """
        if isinstance(source, RemotePath):
            self._copied(name, source.pieces())
            return
        reading = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(reading).st_mode):
                raise InputError(f"{source}: neither a file nor a directory, so that it cannot be carried over; remove it")
            self._copied(name, iter(lambda: os.read(reading, _STEP), b""))
        finally:
            os.close(reading)

    def _copied(self, name: str, blocks: Iterator[bytes]) -> None:
        done = 0
        with self._opened(name, _NEW) as descriptor:
            for block in blocks:
                write_all(descriptor, block, done)
                done += len(block)
            os.fsync(descriptor)

    def append(self, name: str, data: bytes) -> None:
        """Add to the end of a file, durably; if it cannot all be written, nothing of it stays."""
        with self._opened(name, os.O_WRONLY | os.O_CREAT) as descriptor:
            size = os.fstat(descriptor).st_size
            try:
                write_all(descriptor, data, size)
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, size)
                raise

    def cut(self, name: str, nbytes: int) -> None:
        """Cut a file off."""
        with self._opened(name, os.O_WRONLY) as descriptor:
            os.ftruncate(descriptor, nbytes)

    def read(self, name: str) -> bytes | None:
        """What is in a small file; None if there is none."""
        try:
            with open(self.open(name, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def remove(self, name: str) -> None:
        """Remove a file, a directory with all in it, a link but not what it leads to, or nothing."""
        with suppress(FileNotFoundError), self._at(name) as (fd, last):
            if stat.S_ISDIR(os.stat(last, dir_fd=fd, follow_symlinks=False).st_mode):
                shutil.rmtree(last, dir_fd=fd)
            else:
                os.unlink(last, dir_fd=fd)

    def remove_empty(self, name: str) -> None:
        """Remove a directory that has nothing in it, and nothing else."""
        with self._at(name) as (fd, last):
            os.rmdir(last, dir_fd=fd)

    def rename(self, name: str, to: Folder, new: str) -> None:
        """Give something another name; a directory takes the place of an empty one, and of nothing else."""
        with self._at(name) as (fd, last), to._at(new) as (other, other_last):
            os.rename(last, other_last, src_dir_fd=fd, dst_dir_fd=other)

    def stat(self, name: str) -> os.stat_result | None:
        """What the system says of something below, of a link itself; None if it is not there."""
        try:
            with self._at(name) as (fd, last):
                return os.stat(last, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def exists(self, name: str) -> bool:
        """Whether something is there, be it a link to nothing."""
        return self.stat(name) is not None

    def names(self) -> list[str]:
        """What is directly in it, in order."""
        return sorted(os.listdir(self.fd))

    def sync(self, name: str = "") -> None:
        """Make its entries durable, or the contents of a file below."""
        if not name:
            os.fsync(self.fd)
            return
        with self._opened(name, os.O_RDONLY) as descriptor:
            os.fsync(descriptor)

    def spec(self, name: str = "") -> dict[str, Any]:
        """TensorStore's spec of this directory or one below, by way of the open one: a link beside it cannot lead astray."""
        below = f"{key(name, self.path)}/" if name else ""
        return {"driver": "file", "path": f"/proc/self/fd/{self.fd}/{below}"}

    @contextmanager
    def _opened(self, name: str, flags: int) -> Iterator[int]:
        descriptor = self.open(name, flags, make=bool(flags & os.O_CREAT))
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _at(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The directory that holds something below, open, and its name there; errors are of the whole path."""
        *folders, last = parts(name, self.path)
        fd = self.fd
        try:
            for folder in folders:
                inner = _enter(fd, folder, make=make)
                if fd != self.fd:
                    os.close(fd)
                fd = inner
            yield fd, last
        except OSError as error:
            error.filename = str(self.path / name)
            raise
        finally:
            if fd != self.fd:
                os.close(fd)


def _enter(fd: int, name: str, *, make: bool) -> int:
    if make:
        with suppress(FileExistsError):
            os.mkdir(name, dir_fd=fd)
    return os.open(name, _FOLDER, dir_fd=fd)


def exchange(folder: Folder, name: str, other: Folder, other_name: str) -> bool:
    """Swap two names in one step; False where kernel or file system cannot (it is Linux's, and not for every network disk)."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    with folder._at(name) as (fd, last), other._at(other_name) as (other_fd, other_last):
        names = os.fsencode(last), os.fsencode(other_last)
        return call is not None and call(fd, names[0], other_fd, names[1], _RENAME_EXCHANGE) == 0
