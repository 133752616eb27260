"""Durability: the output is absent or complete.

Everything is written into a staging directory beside the output and made durable; then one rename shows it. An interrupted
run leaves the staging directory, whose journal names the finished tensors, and the same command takes it up again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from convert.errors import OutputError, StorageError

JOURNAL = ".convert_journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The staging directory and what earlier runs of the same plan finished in it: tensor name -> digest."""

    path: Path
    done: Mapping[str, str]

    def record(self, digests: Mapping[str, str]) -> None:
        """Note finished tensors whose data is durable already; the note itself is durable on return."""
        with (self.path / JOURNAL).open("a") as journal:
            journal.write(json.dumps(dict(digests)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def check_output(source: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that would hurt something.

    Raises:
        OutputError: it exists (and `overwrite` is off), or one of the two paths contains the other.
    """
    here, there = source.resolve(), out.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(f"{out}: input {source} and output must not contain one another; choose another output")
    if os.path.lexists(out) and not overwrite:
        raise OutputError(f"{out} exists already; remove it, choose another output, or pass --overwrite")


@contextmanager
def staging(out: Path, fingerprint: str, *, resume: bool, overwrite: bool) -> Iterator[Stage]:
    """Lock and fill a staging directory; on success publish it as `out`, on failure leave it to be resumed.

    Raises:
        OutputError: another run holds the lock, or `out` has appeared meanwhile.
        StorageError: the disk is full or failing.
    """
    path = out.parent / f"{out.name}.partial-{fingerprint}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if not resume:
                empty(path)
            yield Stage(path=path, done=_read_journal(path))
            _publish(path, out, overwrite=overwrite)
    except OSError as error:
        raise StorageError(
            f"{error.strerror or error} ({error.filename or path}). The input is untouched and {out} was not changed; "
            f"run the same command again to go on, or remove {path}"
        ) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{path} is in use by another run of the same conversion; wait for it") from None
        yield
    finally:
        os.close(directory)


def empty(path: Path) -> None:
    """Remove what earlier runs left in a staging directory."""
    for entry in path.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _read_journal(path: Path) -> dict[str, str]:
    """Finished tensors; a line cut short by a crash was not durable and does not count."""
    done: dict[str, str] = {}
    if (path / JOURNAL).exists():
        for line in (path / JOURNAL).read_text().splitlines():
            try:
                done.update(json.loads(line))
            except ValueError:
                break
    return done


def _publish(path: Path, out: Path, *, overwrite: bool) -> None:
    (path / JOURNAL).unlink(missing_ok=True)
    for directory, _, _ in os.walk(path):
        sync_directory(Path(directory))
    replaced = out.parent / f"{out.name}.replaced-{path.name.rpartition('-')[2]}"
    if overwrite and os.path.lexists(out):
        os.rename(out, replaced)
    try:
        os.rename(path, out)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise OutputError(f"{out} has appeared while this run was working; the result is in {path}") from None
    sync_directory(out.parent)
    if os.path.lexists(replaced):
        shutil.rmtree(replaced) if replaced.is_dir() and not replaced.is_symlink() else replaced.unlink()


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Write a small file durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a side file's contents durably; permissions are the user's own, as for any new file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
