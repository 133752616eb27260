"""A last look at a Hugging Face output before it is shown, with a stranger's eyes.

In: the staged files as planned. Out: nothing, or an error. It never writes, and takes nothing from what this run remembers of
its writing: each file is opened again, its header parsed by safetensors itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from safetensors import SafetensorError, safe_open

from convert.commit.files import Folder
from convert.errors import StorageError
from convert.hf.shards import File
from layouts.disk.places import RemotePath
from layouts.disk.stored import StoredFile
from layouts.errors import InputError


def look(folder: Folder, files: Sequence[File]) -> None:
    """See that each file has its size, and the header that was planned, and that safetensors takes it.

    Raises:
        StorageError: one does not; then the disk, or what shares it, has not kept what it was given.
    """
    for file in files:
        where = folder.path / file.name
        found = folder.stat(file.name)
        if found is None or found.st_size != file.size:
            raise _lost(where, f"{file.size:,} bytes were written, {found.st_size if found else 0:,} are there")
        descriptor = folder.open(file.name, os.O_RDONLY)
        try:
            with safe_open(f"/proc/self/fd/{descriptor}", framework="np") as opened:
                names = set(opened.keys())
            if os.pread(descriptor, len(file.head), 0) != file.head or names != set(file.offsets):
                raise _lost(where, "its header is not the one that was written")
        except SafetensorError as error:
            raise _lost(where, f"safetensors cannot read what was written: {error}") from None
        finally:
            os.close(descriptor)


def look_at_objects(out: RemotePath, files: Sequence[File]) -> None:
    """The same of objects in a store: that each has its size, and the header that was planned.

    Raises:
        StorageError: one has not.
    """
    for file in files:
        place = cast(Path, out / file.name)
        try:
            with StoredFile.open(out / file.name) as stored:
                whole = stored.ends_at(file.size)
            if whole and begins(place, file.head):
                continue
        except InputError:  # it is not there, or shorter
            pass
        raise _lost(place, "it is not what was written", "store")


def begins(path: Path, head: bytes) -> bool:
    """Whether a file, or an object, begins so.

    Raises:
        InputError: an object ends before.
    """
    if isinstance(path, RemotePath):
        found = bytearray(len(head))
        with StoredFile.open(path) as stored:
            stored.read(memoryview(found), 0)
        return bytes(found) == head
    with path.open("rb") as file:
        return file.read(len(head)) == head


def _lost(where: object, what: str, who: str = "disk") -> StorageError:
    return StorageError(f"{where}: {what}. The {who} has lost data; nothing is shown. Remove this file, and run again")
