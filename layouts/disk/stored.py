"""Read parts of an object in a store, as `layouts.disk.pread` reads parts of a file.

In: a place in a store, ranges of bytes. Out: these bytes, in memory of the caller's own. It never downloads an object as a
whole, and never mixes two versions of one: what is written anew while it is read is an error.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from layouts.disk.faults import BEHIND, answer, told
from layouts.disk.files import HEADER, parsed
from layouts.disk.places import RemotePath
from layouts.errors import InputError

PART, AHEAD = 4 << 20, 4
"""Bytes of one request, and how many are under way for one reader: a store is slow to begin, and memory is not unlimited."""
_LARGEST = 1 << 50
"""Bytes of an object: no store has such large ones."""


class _EndsBeforeError(InputError):
    """An object has fewer bytes than were asked for."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """An object of the input, in the version that it had when it was opened, for any number of threads."""

    path: RemotePath
    version: bytes
    descriptor: None = None
    """No system call takes it."""
    gap: ClassVar[int] = 1 << 20
    """Bytes between two runs that are read along with them: a request takes as long as to get so many."""
    cover: ClassVar[int] = 8 << 20
    """Bytes that are read at a time where gaps are read along."""

    @classmethod
    def open(cls, path: RemotePath) -> StoredFile:
        """Take the version that is there now.

        Raises:
            InputError: there is no such object, or it is empty.
            OSError: the store fails.
        """
        with told(str(path), "its first byte"):
            found = answer(path.root.store.read(path.key, byte_range=slice(0, 1)))
        if found.state != "value":
            raise InputError(f"{path}: there is no such object")
        return cls(path, bytes(found.stamp.generation))

    def read(self, view: memoryview, offset: int) -> None:
        """Fill a view with the bytes from `offset`.

        Raises:
            InputError: the object ends before, or has been written anew.
            OSError: the store fails.
        """
        starts, waiting = iter(range(0, len(view), PART)), deque[tuple[int, Any]]()
        while True:
            while len(waiting) < AHEAD and (start := next(starts, None)) is not None:
                stop = min(start + PART, len(view))
                waiting.append((start, self._ask(offset + start, offset + stop)))
            if not waiting:
                return
            start, asked = waiting.popleft()
            part = self._answered(asked, f"bytes {offset + start:,} to {offset + min(start + PART, len(view)):,}")
            view[start : start + len(part)] = part

    def ends_at(self, size: int) -> bool:
        """Whether it has as many bytes."""
        return self._has(size) and not self._has(size + 1)

    def _has(self, size: int) -> bool:
        try:
            self.read(memoryview(bytearray(1)), size - 1)
        except _EndsBeforeError:
            return False
        return True

    def _ask(self, start: int, stop: int) -> Any:
        return self.path.root.store.read(self.path.key, byte_range=slice(start, stop))

    def _answered(self, asked: Any, what: str) -> bytes:
        try:
            with told(str(self.path), what):
                found = answer(asked)
        except InputError as error:
            if BEHIND in str(error):
                raise _EndsBeforeError(f"{self.path}: not a sound safetensors file: it ends before {what}") from None
            raise
        if found.state != "value" or found.stamp.generation != self.version:
            raise InputError(f"{self.path}: it was written anew, or removed, while it was read; run again once it is at rest")
        return bytes(found.value)

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def stored_header(path: RemotePath) -> tuple[bytes, int, AbstractContextManager[str]]:
    """The header of a safetensors object, the bytes behind it, and a file for the format's parser.

    The file is of its header and size, without its data.

    Raises:
        InputError: there is none, or the object ends elsewhere than it says.
        OSError: the store fails.
    """
    with StoredFile.open(path) as file:
        head = bytearray(8)
        file.read(memoryview(head), 0)
        if (size := int.from_bytes(head, "little")) > HEADER:
            raise InputError(f"{path}: not a sound safetensors file: its header has {size:,} bytes; {HEADER:,} are the most")
        text = bytearray(size)
        file.read(memoryview(text), 8)
        data = _data_size(bytes(text))
        total = 8 + size + (data or 0)
        if data is not None and not file.ends_at(total):
            raise InputError(f"{path}: its header says that it has {total:,} bytes, and it has not; copy it there again")
    return bytes(text), total - 8 - size, _hollow(bytes(head + text), total)


def _data_size(text: bytes) -> int | None:
    """Bytes of data that a header speaks of; None where it is no header, which the parser says better."""
    try:
        entries = parsed(text)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, RecursionError, AttributeError, TypeError, LookupError):
        return None
    return max(ends, default=0) if all(type(end) is int and 0 <= end <= _LARGEST for end in ends) else None


@contextmanager
def _hollow(head: bytes, size: int) -> Iterator[str]:
    """The path of a file in memory that begins so, and takes no more than its beginning."""
    descriptor = os.memfd_create("header", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, head)
        os.truncate(descriptor, size)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
