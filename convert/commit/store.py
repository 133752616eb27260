"""An output in an object store does not count as a checkpoint until it is complete: no rename could show it at once.

    OUT/...                       its objects: after the arrays `_METADATA`, without which this is no checkpoint, and last
                                  `commit_success.txt`, for which Orbax looks in `gs://`
    OUT.partial-<fingerprint>/    gone when it is complete:
        run                       which run writes; a later one puts its own name here, and the earlier one sees it and stops
        way                       how arrays are written
        journal/<run>-<n>.json    digests of finished tensors

Source: Orbax 0.12 `path/atomicity.py` (CommitFileTemporaryPath).
"""

from __future__ import annotations

import itertools
import json
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from convert.commit.inventory import read_in_pieces
from convert.commit.processes import ALONE, Processes
from convert.errors import InputError, OutputError, StorageError, UsageError
from layouts.disk.files import parsed, read_bytes
from layouts.disk.names import key
from layouts.disk.places import RemotePath, is_remote, kvstore_of, place
from layouts.disk.upload import write_pieces
from layouts.orbax.tree import COMMITTED, METADATA

_JOURNAL, _RUN, _WAY = "journal", "run", "way"
_MARK = re.compile(r"[0-9a-f]{16}")
"""A fingerprint; the marker of an output may be anybody's."""


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A place in a store, with those words of `commit.files.Folder` that a writer takes; there are no directories or links."""

    path: RemotePath

    def __enter__(self) -> StoreFolder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def below(self, name: str, *, make: bool = False) -> StoreFolder:  # noqa: ARG002
        """A place below; this one where the name is empty."""
        return StoreFolder(self.path / key(name, self.path)) if name else self

    def write_text(self, name: str, text: str) -> None:
        """Put a small object."""
        (self.path / key(name, self.path)).write_bytes(text.encode())

    def copy_in(self, source: Path, name: str) -> None:
        """Put what a file or another object holds, a few bytes at a time where the store takes parts.

        Raises:
            InputError: the source is no regular file, cannot be read, or was written anew meanwhile.
            OSError: the store fails.
        """
        size = 0 if is_remote(source) else source.stat().st_size
        write_pieces(self.path / key(name, self.path), read_in_pieces(source), size)

    def remove(self, name: str) -> None:
        """Remove an object, and all below."""
        (self.path / key(name, self.path)).remove()

    def exists(self, name: str) -> bool:
        """Whether there is an object, or one below."""
        return (self.path / key(name, self.path)).exists()

    def spec(self, name: str = "") -> dict[str, Any]:
        """TensorStore's spec of a place below."""
        return kvstore_of(cast(Path, self.below(name).path))


@dataclass(slots=True, kw_only=True)
class StoreStage:
    """The place of an output that is being written, and what earlier runs of the same plan finished: see `commit.Stage`."""

    out: RemotePath
    home: RemotePath
    run: str
    index: int
    done: dict[str, str]
    _written: Iterator[int] = field(default_factory=itertools.count)

    @property
    def path(self) -> Path:
        """Where the output is written."""
        return cast(Path, self.out)

    @property
    def folder(self) -> StoreFolder:
        """The same, to write into."""
        return StoreFolder(self.out)

    def record(self, digests: Mapping[str, str]) -> None:
        """Note finished tensors whose data is in the store already.

        Raises:
            OutputError: another run has begun to write the same output.
        """
        self.check()
        name = f"{self.run}-{self.index}-{next(self._written)}.json"
        (self.home / _JOURNAL / name).write_bytes(json.dumps(dict(digests)).encode())

    def check(self) -> None:
        """See that no other run writes the same output.

        Raises:
            OutputError: one does.
        """
        try:
            owner = _text(self.home / _RUN)
        except FileNotFoundError:  # it has even finished
            owner = ""
        if owner != self.run:
            raise OutputError(f"{self.out}: another run has begun to write it, so that this one stops; let it finish")

    def forget(self) -> None:
        """Start over: remove the notes on what was written, and all that was."""
        (self.home / _JOURNAL).remove()
        self.done.clear()
        self.out.remove()

    def refresh(self) -> None:
        """Take what is noted by now as done."""
        self.done.clear()
        self.done.update(_digests(self.home))

    def by_helpers(self) -> dict[str, str]:
        """What all processes have finished in this run and before."""
        return _digests(self.home)

    def way(self) -> str:
        """How an earlier run wrote arrays."""
        return _text(self.home / _WAY) if (self.home / _WAY).is_file() else ""

    def take_way(self, text: str) -> None:
        """Note how arrays are written."""
        (self.home / _WAY).write_bytes(text.encode())


def _digests(home: RemotePath) -> dict[str, str]:
    """What notes say is finished; who else writes there may have left something that is no note."""
    found: dict[str, str] = {}
    for note in home.listed_anew().glob(f"{_JOURNAL}/*"):
        with suppress(ValueError, TypeError, RecursionError):
            said = parsed(read_bytes(cast(Path, note)))
            found |= {name: digest for name, digest in dict(said).items() if isinstance(digest, str)}
    return found


def _text(path: Path | RemotePath) -> str:
    """What a small object says; what is no text is nothing that was written from here."""
    return read_bytes(cast(Path, path)).decode(errors="replace")


def mark_of(out: Path) -> str:
    """What the marker of a complete output says: the fingerprint of its plan; nothing where there is none."""
    marker = out / COMMITTED
    return _text(marker).strip() if marker.is_file() else ""


def forget_notes(out: Path) -> None:
    """Remove the notes of a run that was killed when its output in a store was complete already."""
    if isinstance(out, RemotePath) and _MARK.fullmatch(mark := mark_of(cast(Path, out))):
        _home(out, mark).remove()


def _home(out: RemotePath, mark: str) -> RemotePath:
    return cast(RemotePath, place(f"{out}.partial-{mark}"))


@contextmanager
def store_staging(out: RemotePath, mark: str, *, resume: bool, processes: Processes = ALONE) -> Iterator[StoreStage]:
    """Fill a place in a store; on success mark it as complete, on failure leave it to be resumed.

    Raises:
        OutputError: something else is there, or another run has begun to write it.
        UsageError: there is no such bucket.
        StorageError: the store fails, or another process has failed.
    """
    home = _home(out, mark)
    try:
        if processes.first:
            _begin(out, home, resume)
        processes.agree("opened", home.name)
        run = _text(home / _RUN)
        stage = StoreStage(out=out, home=home, run=run, index=processes.index, done=_digests(home))
        yield stage
        if processes.first:
            stage.check()
            _publish(out.listed_anew(), mark)
            home.remove()
        processes.agree("published")
    except OSError as error:
        raise StorageError(
            f"{error.strerror or error} ({error.filename or home}). The input is untouched, and what is in {out} is no "
            f"checkpoint; run the same command again to go on, or remove it and {home}"
        ) from error


def _begin(out: RemotePath, home: RemotePath, resume: bool) -> None:
    if out.exists() and not home.exists():
        raise OutputError(f"{out} exists already; remove it, or choose another output: in a store none can be replaced at once")
    if not resume:
        home.remove()
        out.remove()
    for last in (COMMITTED, METADATA):  # of a run that ended while it published: it is no checkpoint until this one has
        for name in [name for name in out.below() if name.rpartition("/")[2] == last]:
            (out / name).remove()
    try:
        (home / _RUN).write_bytes(uuid.uuid4().hex.encode())
    except InputError as error:  # no bucket: `gs://` lists one that is not there as if it was empty
        raise UsageError(str(error)) from error


def _publish(out: RemotePath, mark: str) -> None:
    """Put Orbax's marker beside the metadata of the item and above it; the one of the output itself comes last."""
    folders = {out}
    for name in out.below():
        if name.rpartition("/")[2] == METADATA:
            parts = name.split("/")[:-1]
            folders |= {out / "/".join(parts[: depth + 1]) for depth in range(len(parts))}
    for folder in sorted(folders, key=lambda folder: -len(folder.key)):
        (folder / COMMITTED).write_bytes(mark.encode())
