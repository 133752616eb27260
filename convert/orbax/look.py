"""A last look at an Orbax output before it is shown, with a stranger's eyes.

In: the item as staged, and the plan. Out: nothing, or an error. It never writes or decodes, and takes nothing from what this
run has open: each array is opened again by TensorStore, a bounded number at a time, and what it says of itself is compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from convert.commit.files import Folder
from convert.errors import InputError, StorageError
from convert.orbax.keeping.moves import Move
from convert.orbax.metadata import stored_name
from convert.orbax.origin import Origin
from convert.planning.planner import Plan
from layouts.orbax.arrays import describe, open_all, spec_of

_SOME = 1 << 9
"""Arrays that are open at a time; a model of 48 layers has about that many."""


def look(item: Path, plan: Plan, origin: Origin) -> None:
    """See that each array can be opened, and has the shape and the element type of the plan.

    Raises:
        StorageError: one cannot or has not; then the disk, or what shares it, has not kept what it was given.
    """
    targets = iter(plan.targets)
    while some := list(itertools.islice(targets, _SOME)):
        names = {target.spec.name: stored_name(target, origin) for target in some}
        flags = {"ocdbt": origin.ocdbt, "zarr3": origin.zarr3, "complete": True}
        try:
            stores = open_all(item, {name: spec_of(item, stored, **flags) for name, stored in names.items()})
            found = {name: describe(item, name, store) for name, store in stores.items()}
        except InputError as error:
            raise _lost(item, str(error)) from None
        for target in some:
            spec, there = target.spec, found[target.spec.name]
            if (there.dtype, there.shape) != (spec.dtype, spec.shape):
                raise _lost(item, f"{spec.name} is {there.dtype} {there.shape}, and {spec.dtype} {spec.shape} was written")


def look_at_files(folder: Folder, files: Sequence[Move]) -> None:
    """See that each file that was copied has its size; one that was written anew has another.

    Raises:
        StorageError: one has not.
    """
    for move in files:
        found = folder.stat(move.target)
        if found is None or (found.st_size != move.nbytes and not move.own):
            what = f"{move.nbytes:,} bytes were written, {found.st_size if found else 0:,} are there"
            raise _lost(folder.path / move.target, what)


def _lost(where: object, what: str) -> StorageError:
    return StorageError(f"{where}: {what}. Data has been lost where it was written; nothing is shown. Remove it, and run again")
