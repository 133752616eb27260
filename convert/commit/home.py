"""The staging directory: whose it is, who writes into it now, and what may be removed.

In: the open directory that OUT will stand in. Out: a staging directory that this tool made, locked. It never removes or writes
anything in a directory that is somebody else's, and never follows a link to one.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from convert.commit import journal
from convert.commit.below import files
from convert.commit.files import Folder
from convert.errors import OutputError

NEW = "new"
OTHER = "choose another output"


@contextmanager
def opened_home(parent: Folder, name: str, *, make: bool) -> Iterator[Folder]:
    """Open a staging directory; with `make`, create it where there is none.

    Raises:
        OutputError: a link or a file has its name.
    """
    if make:
        parent.make(name)
    found = parent.stat(name)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise OutputError(f"{parent.path / name} is no directory, but this run needs its name; remove it, or {OTHER}")
    with parent.below(name) as home:
        yield home


def hold(parent: Folder, home: Folder, until: ExitStack) -> None:
    """Lock our staging directory.

    Raises:
        OutputError: another run holds it.
    """
    if not lock(os.dup(home.fd), parent, home.path.name, until):
        raise OutputError(f"{home.path} is in use by another run of the same conversion; wait for it")


def check_others(parent: Folder, home: Folder, out: Path) -> None:
    """Look at the staging directories of other plans for the same output.

    Of two runs that start together, each locks its own before it looks, so that at least one sees the other.

    Raises:
        OutputError: another run holds one of them.
    """
    for name in parent.names():
        if name.startswith(f"{out.name}.partial-") and name != home.path.name:
            with ExitStack() as briefly, suppress(OSError):  # it is a link or a file, or gone by now
                if not lock(parent.open(name, os.O_RDONLY | os.O_DIRECTORY), parent, name, briefly):
                    raise OutputError(f"{parent.path / name} is in use by another run that writes {out}; wait for it")


def lock(descriptor: int, folder: Folder, name: str, until: ExitStack) -> bool:
    """Lock an open file or directory; the system lets go when the process ends, however it ends."""
    until.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # Another run may have finished and removed it between our open and our lock.
    found = folder.stat(name)
    return found is not None and os.path.samestat(os.fstat(descriptor), found)


def check_ours(home: Folder) -> None:
    """See that this tool made a staging directory, and that nothing in it leads elsewhere.

    Its mark is the first line of the journal, which knows the directory's inode (not the device: that of a network disk is
    another one on each machine). One that was killed before it wrote the line left nothing but an empty `new/`.

    Raises:
        OutputError: somebody else made it, or has put a link or a special file there.
    """
    names, notes = home.names(), home.read(journal.NAME) or b""
    mark = {"home": inode(home)}
    if b"\n" in notes:
        first = next(iter(journal.read(home, journal.NAME)), {})
        ours = isinstance(first, dict) and first.get("home") == mark["home"]
    else:
        begun = json.dumps(mark).encode()[:-1]
        ours = {*names} <= {NEW, journal.NAME} and begun.startswith(notes[: len(begun)]) and not _holds(home, NEW)
    if not ours:
        raise OutputError(f"{home.path} was not made by this tool, or is a copy of what it made; remove it, or {OTHER}")
    for name, found in files(home):
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise OutputError(f"{home.path / name} is a link or no file, and this tool makes neither; remove {home.path}")


def _holds(home: Folder, name: str) -> bool:
    found = home.stat(name)
    if found is None:
        return False
    if not stat.S_ISDIR(found.st_mode):
        return True
    with home.below(name) as inner:
        return bool(inner.names())


def inode(folder: Folder) -> int:
    """The identity of an open directory."""
    return os.fstat(folder.fd).st_ino


def take_over(home: Folder) -> None:
    """Make the journal end with a whole line, and add what the helpers of an earlier run have noted.

    Raises:
        OutputError: one of them is still at work.
    """
    journal.cut(home, journal.NAME)
    for name in journal.helpers(home):
        with ExitStack() as held:
            if not lock(home.open(name, os.O_RDWR), home, name, held):
                number = name.rpartition("-")[2]
                raise OutputError(f"process {number} of an earlier run still writes into {home.path}; wait for it, or stop it")
            if digests := journal.digests(home, name):
                journal.append(home, journal.NAME, digests)
            home.remove(name)


def clear(home: Folder) -> None:
    """Remove all that is in a staging directory of ours; the journal last, because without it the rest is nobody's."""
    for name in [name for name in home.names() if name != journal.NAME] + [journal.NAME]:
        home.remove(name)


def discard(parent: Folder, home: Folder) -> None:
    """Remove a staging directory of ours, or as much of it as can be; it is not needed any more."""
    with suppress(OSError):
        clear(home)
        parent.remove_empty(home.path.name)
