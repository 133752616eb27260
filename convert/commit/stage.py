"""Durability: the output is absent or complete.

Everything is written into a staging directory beside the output and made durable; then one rename shows it. An interrupted
run leaves the staging directory, and the same command takes it up again. It holds

    new/               the output to be
    .convert_journal   one JSON object per line: first whose journal it is, then the digests of finished tensors
    .convert_journal-3 the same of a process that helps the first one, without the first line
    .convert_way       how Orbax arrays are written; with other memory it may be another way

The journal stands beside `new/`, not in it, so that nothing is left to do to the output once it is shown; and it knows the
inode of `new/`, because after `--overwrite` has exchanged the two, what is called `new/` is the old output. In an object store
it is otherwise: see `convert.commit.store`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.commit import journal
from convert.commit.files import Folder
from convert.commit.home import (
    NEW,
    check_others,
    check_ours,
    clear,
    discard,
    hold,
    inode,
    lock,
    opened_home,
    take_over,
)
from convert.commit.processes import ALONE, Processes
from convert.commit.publish import publish
from convert.commit.store import StoreStage, store_staging
from convert.errors import ConvertError, StorageError
from layouts.disk.names import part
from layouts.disk.places import RemotePath

_WAY = ".convert_way"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The directory that will be the output, and what earlier runs of the same plan finished in it: tensor name -> digest.

    `home` is the staging directory, `folder` is `new/` in it, and `notes` the name of this process's journal.
    """

    home: Folder
    folder: Folder
    notes: str
    done: dict[str, str]

    @property
    def path(self) -> Path:
        """Where the output is written, for messages and to read from."""
        return self.folder.path

    def record(self, digests: Mapping[str, str]) -> None:
        """Note finished tensors whose data is durable already; the note itself is durable on return."""
        journal.append(self.home, self.notes, digests)

    def check(self) -> None:
        """See that no other run writes the same output: none does, because this one holds a lock."""

    def forget(self) -> None:
        """Start over: remove what was written, and the notes on it before that."""
        journal.cut(self.home, self.notes, lines=1)
        self.done.clear()
        for name in self.folder.names():
            self.folder.remove(name)

    def refresh(self) -> None:
        """Take what the first process now has as done; it may have started over."""
        self.done.clear()
        self.done.update(journal.digests(self.home, journal.NAME))

    def way(self) -> str:
        """How an earlier run wrote arrays."""
        return (self.home.read(_WAY) or b"").decode(errors="replace")

    def take_way(self, text: str) -> None:
        """Note how arrays are written."""
        self.home.write_text(_WAY, text)

    def by_helpers(self) -> dict[str, str]:
        """What the other processes have finished in this run."""
        found = (journal.digests(self.home, name) for name in journal.helpers(self.home))
        return {name: digest for each in found for name, digest in each.items()}


AnyStage = Stage | StoreStage


@contextmanager
def staging(out: Path, fingerprint: str, *, resume: bool, overwrite: bool, processes: Processes = ALONE) -> Iterator[AnyStage]:
    """Lock and fill a staging directory; on success publish it as `out`, on failure leave it to be resumed.

    Of several processes the first one does this, and the others only fill.

    Raises:
        OutputError: another run is writing `out`, it has appeared meanwhile, or the staging directory is not ours.
        StorageError: the disk is full or failing, or another process has failed.
    """
    if isinstance(out, RemotePath):
        with store_staging(out, fingerprint, resume=resume, processes=processes) as there:
            yield there
        return
    name = part(f"{out.name}.partial-{fingerprint}", out.parent)
    try:
        with Folder.at(out.parent, make=processes.first) as parent:
            if processes.first:
                with _led(parent, out, name, resume=resume, overwrite=overwrite, processes=processes) as stage:
                    yield stage
            else:
                with _joined(parent, name, processes) as stage:
                    yield stage
        processes.agree("published")
    except OSError as error:
        home = out.parent / name
        raise StorageError(
            f"{error.strerror or error} ({error.filename or home}). The input is untouched, and {out} is as it was or "
            f"complete; run the same command again to go on, or remove {home}"
        ) from error


@contextmanager
def _led(parent: Folder, out: Path, name: str, *, resume: bool, overwrite: bool, processes: Processes) -> Iterator[Stage]:
    """The staging directory, opened and locked; it is published in the end. A run that is refused leaves none behind it."""
    with opened_home(parent, name, make=True) as home, ExitStack() as held:
        hold(parent, home, held)
        check_ours(home)
        try:
            check_others(parent, home, out)
            if not resume:
                clear(home)
            with _opened_stage(parent, home) as stage:
                processes.agree("opened", name)
                yield stage
                publish(home, stage.folder, parent, out, overwrite=overwrite)
        except ConvertError as error:
            if not isinstance(error, StorageError) and not _finished(home):
                discard(parent, home)
            raise
        discard(parent, home)


def _finished(home: Folder) -> bool:
    """Whether there is anything to go on with."""
    return any(journal.digests(home, name) for name in (journal.NAME, *journal.helpers(home)))


@contextmanager
def _joined(parent: Folder, name: str, processes: Processes) -> Iterator[Stage]:
    """The staging directory that the first process has opened, with a journal of our own, locked while we live."""
    processes.agree("opened", name)
    own = f"{journal.NAME}-{processes.index}"
    with opened_home(parent, name, make=False) as home, home.below(NEW) as new, ExitStack() as held:
        check_ours(home)
        lock(home.open(own, os.O_RDWR | os.O_CREAT), home, own, held)
        yield Stage(home=home, folder=new, notes=own, done=journal.digests(home, journal.NAME))


@contextmanager
def _opened_stage(parent: Folder, home: Folder) -> Iterator[Stage]:
    """Go on where an earlier run stopped, or begin with an empty `new/`."""
    take_over(home)
    found, lines = home.stat(NEW), journal.read(home, journal.NAME)
    if found is None or not lines or lines[0].get("inode") != found.st_ino:
        _begin(parent, home)
    with home.below(NEW) as new:
        yield Stage(home=home, folder=new, notes=journal.NAME, done=journal.digests(home, journal.NAME))


def _begin(parent: Folder, home: Folder) -> None:
    clear(home)
    home.make(NEW)
    with home.below(NEW) as new:
        journal.append(home, journal.NAME, {"home": inode(home), "inode": inode(new)})
    home.sync()
    parent.sync()
