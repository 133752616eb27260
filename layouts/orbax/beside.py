"""Which files lie beside the arrays of an item.

In: a checkpoint's directory, its item, where arrays have directories of their own. Out: the other files. It opens none.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from layouts.disk.places import is_remote, names_of
from layouts.orbax.tree import OWN, PROCESS, UNFINISHED
from layouts.side_files import WEIGHT_FOLDERS, SideFiles, sort_files


def files_beside(path: Path, item: Path, arrays: Iterable[str]) -> SideFiles:
    """Every file but those that Orbax makes for arrays, and those of saves that never finished.

    Raises:
        OSError: a directory cannot be listed.
    """
    own, steps = {*OWN, *(name.split("/")[0] for name in arrays)}, item.relative_to(path).parts

    def is_other(name: str) -> bool:
        folders = PurePosixPath(name).parts
        first = folders[len(steps)] if folders[: len(steps)] == steps else ""
        return first not in own and not first.startswith(PROCESS) and not any(UNFINISHED in part for part in folders[:-1])

    def size(name: str) -> int:
        return 0 if is_remote(path) else os.stat(path / name).st_size

    return sort_files(filter(is_other, names_of(path)), size, WEIGHT_FOLDERS.difference(steps))
