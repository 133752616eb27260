"""Where a checkpoint lies: a directory, or a prefix in an object store (`gs://`, `s3://`), which TensorStore lists and reads.

In: a path or an address. Out: a path to read from, names and sizes below it. It never downloads as a whole.

A checkpoint asks little of a path, so `RemotePath` has just those of `pathlib.Path`'s words. Credentials are found as
TensorStore finds them (https://google.github.io/tensorstore/kvstore), the same for arrays and for what stands beside them;
`AWS_ENDPOINT_URL` and `AWS_REGION` say where a store that speaks S3 is, if it is not Amazon's.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from layouts.disk.addresses import foreign, of_the_hub
from layouts.disk.buckets import DRIVERS, Root, explained
from layouts.disk.faults import BEHIND, answer, writing
from layouts.errors import InputError

PIECE = 4 << 20
"""Bytes of an object that are read at a time."""


def is_remote(path: str | os.PathLike[str] | RemotePath) -> bool:
    """Whether a path names an object store, or anything else that is no directory."""
    return "://" in str(path)


def place(path: str | os.PathLike[str] | RemotePath) -> Path:
    """The path to read from: of a directory, or something that reads like one.

    Raises:
        InputError: a store of a kind that this tool does not know, or one that cannot be listed.
        OSError: the store is failing, or does not answer.
    """
    if isinstance(path, RemotePath):
        return cast(Path, path)
    if not is_remote(path):
        return Path(path)
    scheme, _, rest = str(path).partition("://")
    if scheme not in DRIVERS:
        download = of_the_hub(str(path))
        raise InputError(f"{path}: {f'download it first: {download}' if download else foreign(str(path))}")
    if not rest.partition("/")[0]:
        raise InputError(f"{path}: it names no bucket; give {scheme}://BUCKET/PATH")
    return cast(Path, RemotePath(root=Root.open(scheme, rest.strip("/"))))


def names_of(path: Path) -> Iterator[str]:
    """Every file below a place, in order, by its name from there; nothing is asked of the files themselves.

    Raises:
        InputError: there is a link to a directory, which is neither followed nor left out in silence.
        OSError: a directory cannot be listed.
    """
    if isinstance(path, RemotePath):
        yield from sorted(path.below())
        return
    for directory, folders, names in os.walk(path, onerror=unlisted):
        folders.sort()
        if link := next((name for name in folders if os.path.islink(os.path.join(directory, name))), None):
            raise InputError(f"{os.path.join(directory, link)}: a link to a directory; put what it stands for in its place")
        yield from (os.path.relpath(os.path.join(directory, name), path) for name in sorted(names))


def unlisted(error: OSError) -> None:
    """`onerror` of walks: a directory that cannot be listed is neither taken for empty nor left out in silence."""
    raise error


def files_of(path: Path, but: Collection[str] = ()) -> Iterator[tuple[str, int, str]]:
    """The same with the size of each in bytes (0 in a store), and a mark of its state.

    Nothing is asked of those that are named in `but`, or lie in a folder that is (its name ends in `/`).
    """
    folders = tuple(name for name in but if name.endswith("/"))
    for name in names_of(path):
        if name in but or name.startswith(folders):
            continue
        if isinstance(path, RemotePath):
            yield name, 0, path.root.state((path / name).key)
        else:
            status = os.stat(os.path.join(path, name))
            yield name, status.st_size, str(status.st_mtime_ns)


def kvstore_of(path: Path) -> dict[str, Any]:
    """TensorStore's spec of a directory.

    Raises:
        InputError: its path is none that TensorStore takes.
    """
    if isinstance(path, RemotePath):
        return {**path.root.spec, "path": f"{path.root.spec['path']}{path.key}/" if path.key else path.root.spec["path"]}
    if (whole := str(path.resolve())) != whole.encode(errors="replace").decode():
        raise InputError(f"{whole}: it holds bytes that are no characters, and TensorStore opens no such path; rename it")
    return {"driver": "file", "path": f"{whole}/"}


@dataclass(frozen=True, slots=True, order=True)
class RemotePath:
    """A place in a store, with those of `pathlib.Path`'s words that a checkpoint takes.

    What is there is what was there when the store was listed, and what has been written from here since.
    """

    root: Root = field(compare=False)
    key: str = ""

    def __str__(self) -> str:
        return f"{self.root.text}/{self.key}" if self.key else self.root.text

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        return RemotePath(self.root, f"{self.key}/{name}" if self.key else str(name))

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The place above."""
        return RemotePath(self.root, self.key.rpartition("/")[0])

    def resolve(self) -> RemotePath:
        """There are no links."""
        return self

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """There are no directories."""

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        return self.key in self.root.files

    def is_dir(self) -> bool:
        """Whether there are objects below."""
        return any(self.below())

    def exists(self) -> bool:
        """Either of them."""
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        """What is directly below."""
        yield from (self / name for name in sorted({name.partition("/")[0] for name in self.below()}))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What is directly below and is called so; with folders before it, below these."""
        folder, _, last = pattern.rpartition("/")
        here = self / folder if folder else self
        yield from (child for child in here.iterdir() if fnmatch.fnmatchcase(child.name, last))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The way from there to here."""
        return PurePosixPath(self.key).relative_to(other.key)

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        return bytes(self._part(0, None).value)

    def pieces(self) -> Iterator[bytes]:
        """The bytes of the object, a few at a time.

        Raises:
            InputError: somebody has written it anew meanwhile.
            OSError: it is not there, or cannot be read.
        """
        at, version = 0, None
        while found := self._part(at, at + PIECE) or self._part(at, None):
            version = version or found.stamp.generation
            if found.stamp.generation != version:
                raise InputError(f"{self}: it was written anew while it was read; run again once it is at rest")
            yield bytes(found.value)
            at += len(found.value)
            if at % PIECE or not at:
                return

    def longer_than(self, size: int) -> bool:
        """Whether the object has more bytes than these. What lists a store says nothing of sizes."""
        return self._part(size, size + 1) is not None

    def _part(self, start: int, stop: int | None) -> Any:
        """What TensorStore reads of these bytes; None where the object ends before."""
        with explained(str(self), self.root.spec), writing(str(self)):
            try:
                found = answer(self.root.store.read(self.key, byte_range=slice(start, stop)))
            except ValueError as error:
                if BEHIND not in str(error):
                    raise
                return None
        if found.state != "value":
            raise FileNotFoundError(2, "no such object", str(self))
        return found

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, data: bytes) -> None:
        """Put an object here, in place of what was.

        Raises:
            OSError: it cannot be written.
        """
        with explained(str(self), self.root.spec), writing(str(self)):
            answer(self.root.store.write(self.key, data))
        self.root.files.add(self.key)

    def remove(self) -> None:
        """Remove the object and all below.

        Raises:
            OSError: they cannot be removed.
        """
        import tensorstore as ts

        gone = [name for name in self.root.files if name == self.key or name.startswith(self._prefix)]
        behind = f"{self.key}0" if self.key else ""  # the first of all keys that do not begin so: "0" follows "/"
        with writing(str(self)):
            answer(self.root.store.write(self.key, None)) if self.key in self.root.files else None
            answer(self.root.store.delete_range(ts.KvStore.KeyRange(self._prefix, behind)))
        self.root.files.difference_update(gone)

    def listed_anew(self) -> RemotePath:
        """The same place as the store has it now."""
        return cast(RemotePath, place(str(self)))

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def below(self) -> Iterator[str]:
        """The names of all objects below, from here."""
        prefix = self._prefix
        return (name[len(prefix) :] for name in self.root.files if name.startswith(prefix))


def listed_anew(path: Path) -> Path:
    """A place as it is now: what others have written into a store is not among what was listed."""
    return cast(Path, path.listed_anew()) if isinstance(path, RemotePath) else path
