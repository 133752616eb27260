"""Write a plan as an Orbax checkpoint, without Orbax: arrays by TensorStore, what stands beside them as JSON.

Orbax alone takes more memory than a small budget has, and it drops what it was not asked to restore: shardings, random keys.
Where the chunks of the input are chunks of the output as well, only their names change (see `convert.orbax_keep`). Else the
arrays are written in batches as Orbax's processes write theirs, each batch a database of its own (OCDBT) that the item's
manifest then joins, or as a directory for each array. A finished batch is made durable and journalled: an interrupted run goes
on with the next one, and what it left of a batch is removed, so that no dead bytes stay in the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from convert import manifest
from convert.commit import Stage, copy_file, empty, write_text
from convert.execute import SYNC, Progress
from convert.fill_arrays import Filler
from convert.malloc import keep_below
from convert.orbax_budget import OrbaxBudget
from convert.orbax_copy import copy_database
from convert.orbax_item import Item
from convert.orbax_keep import keep, kept_shape, rename
from convert.orbax_metadata import render
from convert.planner import Plan, Target
from layouts.checkpoint import Reader
from layouts.orbax import OrbaxReader

_WAY = ".convert_way"
"""Stands beside the journal and says how the arrays are written; with other memory it may be another way."""
_KEPT, _COPIED, _WRITTEN = "chunks are kept", "chunks are kept and copied", "chunks are written"


def write(
    plan: Plan,
    reader: Reader,
    stage: Stage,
    budget: OrbaxBudget,
    progress: Progress,
    original: manifest.Original | None = None,
) -> None:
    """Fill the staging directory; everything in it is durable on return. `original` are files that a way back restores.

    Raises:
        OSError: the disk is full or failing.
        InputError: data of the input cannot be read.
    """
    keep_below(budget.mapped)
    place = reader.item.relative_to(reader.path) if isinstance(reader, OrbaxReader) else Path("0/items")
    item = Item(path=stage.path.resolve() / place, reader=reader, budget=budget)
    kept = keep(plan, reader, budget)
    done, copied = _begin(stage, _KEPT if kept else _WRITTEN)
    item.path.mkdir(parents=True, exist_ok=True)
    if isinstance(reader, OrbaxReader):
        reader.close()
        reader.limits = replace(budget.limits, always=kept.streamed if kept else {})
    if kept and isinstance(reader, OrbaxReader):
        filler = Filler(reader=reader, budget=budget, progress=progress, open=item.create)
        digests = copy_database(reader, item.path, stage, done, copied, plan.targets, filler)
        write_text(stage.path.parent / _WAY, _COPIED)
        rename(item.path, plan, kept, reader)
        chunks = {target.spec.name: kept_shape(target, reader) for target in plan.targets}
    else:
        digests = _fill(item, plan, stage, done, progress)
        item.join(len(list(batches(plan.targets))))
        chunks = {target.spec.name: budget.chunking(target, reader).shape for target in plan.targets}
    for name, text in render(plan, reader, chunks).items():
        write_text(item.path / name, text)
    for name in plan.side_files:
        if name != manifest.NAME:
            copy_file(plan.source / name, stage.path / name)
    write_text(stage.path / manifest.NAME, manifest.render(plan, digests, original))


def _fill(item: Item, plan: Plan, stage: Stage, done: Mapping[str, str], progress: Progress) -> dict[str, str]:
    """Write all batches that no earlier run has finished; the digests of all."""
    digests: dict[str, str] = {}
    for number, targets in enumerate(batches(plan.targets)):
        names = [target.spec.name for target in targets]
        if all(name in done for name in names) and all(path.exists() for path in item.paths(number, targets)):
            digests |= {name: done[name] for name in names}
            progress(sum(target.spec.nbytes for target in targets))
            continue
        item.begin(number, targets)
        fresh = Filler(reader=item.reader, budget=item.budget, progress=progress, open=item.create).fill(targets)
        item.sync(number, targets)
        stage.record(fresh)
        digests |= fresh
    return digests


def _begin(stage: Stage, way: str) -> tuple[Mapping[str, str], bool]:
    """What earlier runs have finished, and whether files are copied; if they went another way, all they left is removed."""
    note = stage.path.parent / _WAY
    found = note.read_text() if note.exists() else ""
    if found == _COPIED and way == _KEPT:
        return stage.done, True
    if found == way:
        return stage.done, False
    empty(stage.path)
    write_text(note, way)
    return {}, False


def batches(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Neighbours, about `SYNC` bytes together: what a power cut can cost."""
    batch: list[Target] = []
    for target in targets:
        if batch and sum(each.spec.nbytes for each in batch) + target.spec.nbytes > SYNC:
            yield batch
            batch = []
        batch.append(target)
    if batch:
        yield batch
