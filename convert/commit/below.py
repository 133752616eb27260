"""Everything below an open directory: its files, what makes them durable, and the room on their disk.

In: an open `Folder`. Out: names, sizes. It never follows a link, and changes nothing.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from convert.commit.files import Folder
from layouts.disk.places import unlisted


def files(folder: Folder) -> Iterator[tuple[str, os.stat_result]]:
    """All below that is no directory, and what the system says of it; links to directories are among it."""
    for place, folders, names, fd in os.fwalk(".", onerror=unlisted, dir_fd=folder.fd):
        for name in [*folders, *names]:  # a link to a directory is among the directories
            found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                yield os.path.normpath(f"{place}/{name}"), found


def sync_all(folder: Folder, *, but: str | None = None) -> None:
    """Make all directories durable, itself last; unless `but` is None, files as well, those not whose names end with it."""
    for _, _, names, fd in os.fwalk(".", topdown=False, onerror=unlisted, dir_fd=folder.fd):
        for name in names:
            if but is not None and not name.endswith(but):
                Folder(folder.path, fd).sync(name)
        os.fsync(fd)


def free(folder: Folder) -> int:
    """Bytes that are free on its disk."""
    disk = os.statvfs(folder.fd)
    return disk.f_bavail * disk.f_frsize
