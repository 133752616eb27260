"""Show a finished directory under its name, in one step where the system has one.

In: the staging directory, `new/` in it, the directory of the output. Out: the output; what it replaces goes to the stage.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from convert.commit.below import sync_all
from convert.commit.files import Folder, exchange
from convert.commit.home import NEW, check_replaceable
from convert.errors import OutputError

OLD = "old"


def publish(home: Folder, new: Folder, parent: Folder, out: Path, *, overwrite: bool) -> None:
    """Show the finished directory under its name, in one step where the system has one; what stood there goes to the stage.

    Raises:
        OutputError: something else stands there by now.
    """
    sync_all(new)
    if not (overwrite and parent.exists(out.name) and _replace(home, parent, out)):
        try:
            home.rename(NEW, parent, out.name)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise OutputError(f"{out} has appeared while this run was working; the result is in {new.path}") from None
    parent.sync()


def _replace(home: Folder, parent: Folder, out: Path) -> bool:
    """Take away what stands there; whether the new output is in its place by that.

    What was looked at stays open, so that its inode is nobody else's. Something else that was taken instead is put back.

    Raises:
        OutputError: it is no checkpoint, or another one than was looked at.
    """
    check_replaceable(out)
    with parent.below(out.name) as old:
        exchanged = exchange(home, NEW, parent, out.name)
        if not exchanged:
            parent.rename(out.name, home, OLD)
        moved = home.stat(NEW if exchanged else OLD)
        if moved is not None and os.path.samestat(os.fstat(old.fd), moved):
            return exchanged
    if exchanged:
        exchange(home, NEW, parent, out.name)
    else:
        home.rename(OLD, parent, out.name)
    raise OutputError(f"{out} has changed while this run was working; it was put back. Run the same command again")
