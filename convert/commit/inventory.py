"""The files of an output: what the manifest says of them, and whether that is still so.

In: a directory or a place in a store. Out: name -> `FileEntry`, or differences in words. It opens only what it has listed
there, never a name that a manifest gives.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from convert.errors import StorageError
from layouts.card import CARD, MOST
from layouts.disk.files import MANIFEST
from layouts.disk.places import RemotePath, is_remote, names_of
from layouts.errors import InputError
from layouts.orbax.tree import COMMITTED

_STEP = 1 << 20
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)
"""What is wrong with a file itself; all else the system says is a fault of the disk, or of rights."""
_APART = (COMMITTED, ".zarray", ".zattrs", "zarr.json")
"""Small files that have a digest each wherever they lie: Orbax's mark, and what arrays say of themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file, or a folder of `count` files that are not listed one by one (a stored array); its name ends in `/`.

    `size` is in bytes, of all of a folder, and unknown in a store. `digest` (xxh3-128, hex) is of files that hold no tensors.
    """

    size: int | None = None
    digest: str | None = None
    count: int | None = None

    def json(self) -> dict[str, int | str]:
        """As it stands in the manifest."""
        found = {"files": self.count, "size": self.size, "xxh3_128": self.digest}
        return {key: value for key, value in found.items() if value is not None}

    @classmethod
    def parse(cls, found: Any) -> FileEntry:
        """From the manifest.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(found, dict) or not found.keys() <= {"files", "size", "xxh3_128"}:
            raise ValueError("expected an object with 'size', 'files' or 'xxh3_128'")
        count, size, digest = found.get("files"), found.get("size"), found.get("xxh3_128")
        if not all(each is None or (type(each) is int and each >= 0) for each in (count, size)):
            raise ValueError("'size' and 'files' should be numbers")
        if not isinstance(digest, str | None):
            raise ValueError("'xxh3_128' should be a text")
        return cls(size=size, digest=digest, count=count)


def inventory(
    path: Path, manifest: str, holds_tensors: Callable[[str], bool], folders: Collection[str] = ()
) -> dict[str, FileEntry]:
    """All files below a place but the manifest itself, in the order of their names, with digests of those without tensors.

    `folders`, whose names end in `/`, are counted as wholes.
    """
    found = _listed(path, manifest, folders, lambda name: not is_remote(path) and PurePosixPath(name).name in _APART)
    for name, entry in found.items():
        if entry.count is None and not holds_tensors(name):
            found[name] = entry_of(read_in_pieces(path / name))
    return found


def check_copied(path: Path, names: Collection[str], found: Collection[str]) -> None:
    """See that each file that was copied is there by its own name: there are disks on which `config.JSON` is `config.json`.

    Files that are written anew are not looked for: a split takes a card away that is all ours.

    Raises:
        StorageError: one is not, because another one has its place.
    """
    anew = (MANIFEST, COMMITTED)
    if lost := sorted(name for name in names if not (name in found or name == CARD or PurePosixPath(name).name in anew)):
        raise StorageError(
            f"{path / lost[0]}: it was copied, and is not there by this name, as on a disk that takes capitals for small ones: "
            f"write to another disk, or rename one of the two files in the input"
        )


def entry_of(pieces: Iterator[bytes]) -> FileEntry:
    """The entry of a file that consists of these pieces."""
    digest, size = xxhash.xxh3_128(), 0
    for piece in pieces:
        digest.update(piece)
        size += len(piece)
    return FileEntry(size=size, digest=digest.hexdigest())


def read_in_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a regular file, a few at a time.

    Raises:
        InputError: it is none, or there is none.
        OSError: the system refuses, or the disk is failing; with the name of the file.
    """
    if isinstance(path, RemotePath):
        yield from path.pieces()
        return
    try:
        # A pipe or a device would never end; it is told without waiting for somebody at its other end.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError(f"{path}: this is no regular file; put one in its place")
            while piece := file.read(_STEP):
                yield piece
    except OSError as error:
        if error.errno in _GONE:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_card(path: Path) -> bytes | None:
    """A model card as `layouts.card` takes it: of one that is too large for a section its digest, which is no text; else None.

    Raises:
        InputError: it is no regular file.
        OSError: the system refuses, or the disk is failing.
    """
    if not path.is_file():
        return None
    found, digest = b"", xxhash.xxh3_128()
    for piece in read_in_pieces(path):
        digest.update(piece)
        found = (found + piece)[: 2 * MOST + 1]
    return found if len(found) <= 2 * MOST else b"\xff" + digest.digest()


def differences(path: Path, manifest: str, files: Mapping[str, FileEntry]) -> Iterator[str]:
    """What is not there as the manifest has it: missing, extra, cut or changed files. The cheap differences come first."""
    found = _listed(path, manifest, [name for name in files if name.endswith("/")], files.__contains__)
    for name in sorted(files.keys() - found.keys()):
        yield f"{name} is missing"
    for name in sorted(found.keys() - files.keys()):
        yield f"{name} is there, and the manifest does not know it"
    both = sorted(files.keys() & found.keys())
    alike = []
    for name in both:
        have, wanted = found[name], files[name]
        if have.count != wanted.count:
            yield f"{name} holds {have.count} files, not {wanted.count}"
        elif None not in (have.size, wanted.size) and have.size != wanted.size:
            yield f"{name} has {have.size} bytes, not {wanted.size}"
        else:
            alike.append(name)
    for name in alike:
        if (digest := files[name].digest) and entry_of(read_in_pieces(path / name)).digest != digest:
            yield f"{name} is not what was written"


def _listed(path: Path, manifest: str, folders: Collection[str], apart: Callable[[str], bool]) -> dict[str, FileEntry]:
    """Sizes alone; what stands `apart` is no part of a folder."""
    found: dict[str, FileEntry] = {}
    for name in sorted(names_of(path)):
        if name == manifest or (PurePosixPath(name).name == COMMITTED and not apart(name)):  # stores get it after all else
            continue
        size = None if is_remote(path) else _size(path / name)
        folder = None if apart(name) else next((above for above in _above(name) if above in folders), None)
        if folder is None:
            found[name] = FileEntry(size=size)
            continue
        so_far = found.get(folder, FileEntry(size=None if size is None else 0, count=0))
        total = None if size is None or so_far.size is None else so_far.size + size
        found[folder] = FileEntry(size=total, count=(so_far.count or 0) + 1)
    return found


def _size(path: Path) -> int:
    """Of a file; of a link to nothing, that of the link."""
    try:
        return os.stat(path).st_size
    except OSError:
        return os.lstat(path).st_size


def _above(name: str) -> Iterator[str]:
    parts = name.split("/")[:-1]
    return ("/".join(parts[: depth + 1]) + "/" for depth in range(len(parts)))
