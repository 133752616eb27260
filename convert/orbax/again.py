"""Tensors of an Orbax output made from the input again, the files that it consists of, and whether it will be read again.

In: a plan and its open input. Out: digests of targets as `convert.engine.again` gives them, entries of files for the manifest.
It never writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from convert.commit import manifest
from convert.commit.inventory import FileEntry, entry_of, inventory
from convert.engine.again import Remade, Told, each, remade
from convert.engine.budget import make_budget
from convert.errors import PlanError
from convert.orbax.budget import OrbaxBudget, reading_budget
from convert.orbax.keeping.keep import Kept, kept_chunks
from convert.orbax.metadata import stored_name
from convert.orbax.origin import Origin
from convert.planning.across.computed import originals_of
from convert.planning.planner import Plan
from convert.planning.targets import Target
from convert.progress import Progress
from layouts.disk.places import listed_anew
from layouts.orbax.arrays import CHUNKS
from layouts.orbax.digest import stored_digest
from layouts.orbax.tree import DATABASE, PROCESS
from layouts.reader import Reader, held_by, is_chunked
from layouts.side_files import ORIGINALS


def stored_again(
    targets: Sequence[Target], wanted: Mapping[str, manifest.Digest], kept: Kept, jobs: int, progress: Progress
) -> Iterator[Remade]:
    """The digests of chunks that are kept, as the input stores them.

    Raises:
        InputError: one has been lost, or cannot be read.
    """

    def work(target: Target, rows: range | None, told: Told) -> str:
        digest = stored_digest(kept.reader, kept_chunks(target, kept, rows), lambda _: told(0))  # chunks are compressed
        whole = target.spec.nbytes
        told(whole if rows is None else whole // target.spec.shape[0] * len(rows))
        return digest

    return each(work, targets, wanted, jobs, progress)


def written_again(
    plan: Plan,
    targets: Sequence[Target],
    wanted: Mapping[str, manifest.Digest],
    reader: Reader,
    limits: tuple[int, int | None],
    progress: Progress,
) -> Iterator[Remade]:
    """The digests of arrays that are written anew, within `limits`: bytes of memory, and workers.

    Raises:
        InputError: data of the input cannot be read.
        UsageError: no settings stay within the memory.
    """
    memory, jobs = limits
    if is_chunked(reader):
        budget = reading_budget(memory, jobs, plan, reader)
    else:
        budget = make_budget(memory, jobs, len(reader.tensors) + len(plan.targets), each=held_by(reader))
    return remade(targets, wanted, reader, budget, progress)


def files_of_item(path: Path, plan: Plan, origin: Origin, later: Mapping[str, str]) -> dict[str, FileEntry]:
    """All files of an output, by name; those of the item that are written `later` are there already, as texts.

    Where each array is a directory, it is counted as a whole.
    """
    item = origin.place.as_posix() + "/" if origin.place.parts else ""
    folders = () if origin.ocdbt else {f"{item}{stored_name(target, origin)}/" for target in plan.targets}

    originals = originals_of(plan)

    def holds_tensors(name: str) -> bool:
        if name == ORIGINALS and originals:
            return True
        first = name.removeprefix(item).partition("/")[0]
        inside = name.startswith(item) and first.startswith((PROCESS, *DATABASE))
        return inside and name.rpartition("/")[2] != DATABASE[0]

    # What TensorStore has put into a store is not among what was written from here.
    found = inventory(listed_anew(path), manifest.NAME, holds_tensors, folders)
    found |= {f"{item}{name}": entry_of(iter([text.encode()])) for name, text in later.items()}
    return dict(sorted(found.items()))


def check_chunks(plan: Plan, reader: Reader, budget: OrbaxBudget) -> None:
    """An output is one that we read again: its arrays have no more chunks than those of an input may have.

    Raises:
        PlanError: one would have more.
    """
    for target in plan.targets:
        chunk = budget.chunking(target, reader).shape
        count = math.prod(-(-size // max(1, step)) for size, step in zip(target.spec.shape, chunk, strict=True))
        if count > CHUNKS:
            raise PlanError(
                f"{reader.path}: {target.spec.name} {target.spec.shape} would be written in {count:,} chunks of {chunk}; "
                f"{CHUNKS:,} are the most that are read again"
            )
