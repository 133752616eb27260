"""Which files lie beside the arrays of an item, and which other items.

In: a checkpoint's directory, its item, where arrays have directories of their own. Out: the other files, and of each other item
with arrays of experts the first of these. It opens only what names the arrays of an item.

A step may have weights in one item and the optimizer's state in another, as `training_engine/checkpointing.py` of MaxText 0.2.5
saves them. Copied as they are, such arrays would not fit weights that are fused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from layouts.disk.files import read_object
from layouts.disk.places import is_remote, names_of
from layouts.orbax.tree import METADATA, OWN, PROCESS, UNFINISHED, read_leaves
from layouts.side_files import WEIGHT_FOLDERS, SideFiles, sort_files


def files_beside(path: Path, item: Path, arrays: Iterable[str]) -> SideFiles:
    """Every file but those that Orbax makes for arrays, and those of saves that never finished.

    Raises:
        OSError: a directory cannot be listed.
        InputError: another item is damaged.
    """
    own, steps = {*OWN, *(name.split("/")[0] for name in arrays)}, item.relative_to(path).parts

    def is_other(name: str) -> bool:
        folders = PurePosixPath(name).parts
        first = folders[len(steps)] if folders[: len(steps)] == steps else ""
        return first not in own and not first.startswith(PROCESS) and not any(UNFINISHED in part for part in folders[:-1])

    def size(name: str) -> int:
        return 0 if is_remote(path) else os.stat(path / name).st_size

    found = sort_files(filter(is_other, names_of(path)), size, WEIGHT_FOLDERS.difference(steps))
    apart = tuple(f"{name}/" for name, _ in items_beside(path, item))
    other = {name: nbytes for name, nbytes in found.plain.items() if apart and name.startswith(apart)}
    plain = {name: nbytes for name, nbytes in found.plain.items() if name not in other}
    return replace(found, plain=plain, weights={**found.weights, **other})


def items_beside(path: Path, item: Path) -> Iterator[tuple[str, str]]:
    """The other items of the step, by their names from the checkpoint's directory, that have arrays of experts: the first each.

    Raises:
        InputError: one is damaged.
    """
    for other in sorted(item.parent.iterdir()) if path != item else ():
        if other != item and UNFINISHED not in other.name and (other / METADATA).is_file():
            leaves = read_leaves(other, read_object(other / METADATA))
            first = next((name for name in leaves if f"{name.rpartition('.')[2]}_".startswith("wi_")), None)
            if first:
                yield str(other.relative_to(path)), first
