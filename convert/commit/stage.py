"""Durability: the output is absent or complete.

Everything is written into a staging directory beside the output and made durable; then one rename shows it. An interrupted
run leaves the staging directory, and the same command takes it up again. It holds

    new/               the output to be
    .convert_journal   one JSON object per line: first the identity of new/, then the digests of finished tensors
    .convert_journal-3 the same of a process that helps the first one, without the first line
    .convert_way       how Orbax arrays are written; with other memory it may be another way

The journal stands beside `new/`, not in it, so that nothing is left to do to the output once it is shown; and it knows the
inode of `new/`, because after `--overwrite` has exchanged the two, what is called `new/` is the old output. In an object store
it is otherwise: see `convert.commit.store`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.commit import journal
from convert.commit.durable import remove, sync_directory, write_text
from convert.commit.processes import ALONE, Processes
from convert.commit.store import StoreStage, store_staging
from convert.errors import OutputError, StorageError, UsageError
from layouts.places import RemotePath

NEW, OLD, _WAY = "new", "old", ".convert_way"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The directory that will be the output, and what earlier runs of the same plan finished in it: tensor name -> digest."""

    path: Path
    journal: Path
    done: dict[str, str]

    def record(self, digests: Mapping[str, str]) -> None:
        """Note finished tensors whose data is durable already; the note itself is durable on return."""
        journal.append(self.journal, digests)

    def check(self) -> None:
        """See that no other run writes the same output: none does, because this one holds a lock."""

    def forget(self) -> None:
        """Start over: remove what was written, and the notes on it before that."""
        journal.cut(self.journal, lines=1)
        self.done.clear()
        empty(self.path)

    def refresh(self) -> None:
        """Take what the first process now has as done; it may have started over."""
        self.done.clear()
        self.done.update(journal.digests(self.path.parent / journal.NAME))

    def way(self) -> str:
        """How an earlier run wrote arrays."""
        note = self.path.parent / _WAY
        return note.read_text() if note.exists() else ""

    def take_way(self, text: str) -> None:
        """Note how arrays are written."""
        write_text(self.path.parent / _WAY, text)

    def by_helpers(self) -> dict[str, str]:
        """What the other processes have finished in this run."""
        return {name: digest for path in journal.helpers(self.path.parent) for name, digest in journal.digests(path).items()}


AnyStage = Stage | StoreStage


def check_output(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that would hurt something; what a store holds there is looked at when it is opened.

    Raises:
        OutputError: it exists (and `overwrite` is off), or one of the two paths contains the other.
        UsageError: something in a store is to be replaced.
    """
    here, there = f"{source.resolve()}/", f"{out.resolve()}/"
    if here.startswith(there) or there.startswith(here):
        raise OutputError(f"{out}: input {source} and output must not contain one another; choose another output")
    if isinstance(out, RemotePath):
        if overwrite or not out.root.spec["path"]:
            raise UsageError(
                f"{out}: in a store nothing can be replaced at once; give the place of a new checkpoint in a bucket"
            )
    elif os.path.lexists(out) and not overwrite:
        raise OutputError(f"{out} exists already; remove it, choose another output, or pass --overwrite")


@contextmanager
def staging(out: Path, fingerprint: str, *, resume: bool, overwrite: bool, processes: Processes = ALONE) -> Iterator[AnyStage]:
    """Lock and fill a staging directory; on success publish it as `out`, on failure leave it to be resumed.

    Of several processes the first one does this, and the others only fill.

    Raises:
        OutputError: another run is writing `out`, or it has appeared meanwhile.
        StorageError: the disk is full or failing, or another process has failed.
    """
    if isinstance(out, RemotePath):
        with store_staging(out, fingerprint, resume=resume, processes=processes) as there:
            yield there
        return
    home = out.parent / f"{out.name}.partial-{fingerprint}"
    try:
        if not processes.first:
            with _joined(home, processes) as stage:
                yield stage
            processes.agree("published")
            return
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home, out):
            if not resume:
                empty(home)
            stage = _open_stage(home)
            processes.agree("opened", home.name)
            yield stage
            _publish(stage, out, overwrite=overwrite)
            shutil.rmtree(home, ignore_errors=True)
        processes.agree("published")
    except OSError as error:
        raise StorageError(
            f"{error.strerror or error} ({error.filename or home}). The input is untouched, and {out} is as it was or "
            f"complete; run the same command again to go on, or remove {home}"
        ) from error


@contextmanager
def _joined(home: Path, processes: Processes) -> Iterator[Stage]:
    """The staging directory that the first process has opened, with a journal of our own, locked while we live."""
    processes.agree("opened", home.name)
    own = home / f"{journal.NAME}-{processes.index}"
    own.touch()
    with ExitStack() as held:
        _lock(own, held)
        yield Stage(path=home / NEW, journal=own, done=journal.digests(home / journal.NAME))


@contextmanager
def _locked(home: Path, out: Path) -> Iterator[None]:
    """Hold our staging directory, after a look at those of other plans for the same output.

    Of two runs that start together, each locks its own before it looks, so that at least one sees the other.
    """
    with ExitStack() as held:
        if not _lock(home, held):
            raise OutputError(f"{home} is in use by another run of the same conversion; wait for it")
        for other in out.parent.iterdir():
            if other.name.startswith(f"{out.name}.partial-") and other != home and other.is_dir():
                with ExitStack() as briefly:
                    if not _lock(other, briefly):
                        raise OutputError(f"{other} is in use by another run that writes {out}; wait for it")
        yield


def _lock(path: Path, until: ExitStack) -> bool:
    """Lock a file or directory; the system lets go when the process ends, however it ends."""
    directory = os.open(path, os.O_RDONLY)
    until.callback(os.close, directory)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Another run may have finished and removed it between our open and our lock.
    return path.exists() and os.path.samestat(os.fstat(directory), os.stat(path))


def empty(path: Path) -> None:
    """Remove what earlier runs left in a staging directory."""
    for entry in path.iterdir():
        remove(entry)


def _open_stage(home: Path) -> Stage:
    """Go on where an earlier run stopped, or begin with an empty `new/`."""
    new, notes = home / NEW, home / journal.NAME
    _take_over(home)
    lines = journal.read(notes) if new.is_dir() else []
    if not lines or lines[0] != {"inode": new.stat().st_ino}:
        empty(home)
        new.mkdir()
        journal.begin(notes, new.stat().st_ino)
        sync_directory(home)
        sync_directory(home.parent)
    return Stage(path=new, journal=notes, done=journal.digests(notes))


def _take_over(home: Path) -> None:
    """Make the journal end with a whole line, and add what the helpers of an earlier run have noted.

    Raises:
        OutputError: one of them is still at work.
    """
    notes = home / journal.NAME
    journal.cut(notes)
    for path in journal.helpers(home):
        with ExitStack() as held:
            if not _lock(path, held):
                number = path.name.rpartition("-")[2]
                raise OutputError(f"process {number} of an earlier run still writes into {home}; wait for it, or stop it")
            if notes.exists():
                journal.append(notes, journal.digests(path))
            path.unlink()


def _publish(stage: Stage, out: Path, *, overwrite: bool) -> None:
    """Show the finished directory under its name, in one step where the system has one; what stood there goes to the stage."""
    for directory, _, _ in os.walk(stage.path):
        sync_directory(Path(directory))
    if not (overwrite and os.path.lexists(out) and _exchange(stage.path, out)):
        if overwrite and os.path.lexists(out):
            os.rename(out, stage.path.with_name(OLD))
        try:
            os.rename(stage.path, out)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise OutputError(f"{out} has appeared while this run was working; the result is in {stage.path}") from None
    sync_directory(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where kernel or file system cannot (it is Linux's, and not for every network disk)."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    names = os.fsencode(one), os.fsencode(other)
    return call is not None and call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
