"""Write a plan as an Orbax checkpoint, without Orbax: arrays by TensorStore, what stands beside them as JSON.

Orbax alone takes more memory than a small budget has, and it drops what it was not asked to restore: shardings, random keys.
Where the chunks of the input are chunks of the output as well, only their names change (see `convert.orbax.keep`). Else the
arrays are written in batches as Orbax's processes write theirs, each batch a database of its own (OCDBT) that the item's
manifest then joins, or as a directory for each array; large arrays in several portions. A finished batch is made durable and
journalled: an interrupted run goes on with the next one, and what it left of a batch is removed, so that no dead bytes stay in
the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import xxhash

from convert.commit import manifest
from convert.commit.durable import copy_file, write_text
from convert.commit.processes import ALONE, Processes
from convert.commit.stage import AnyStage, Stage
from convert.engine.budget import SYNC
from convert.orbax.budget import OrbaxBudget
from convert.orbax.copy import copy_and_hash
from convert.orbax.fill import Filler
from convert.orbax.item import Item
from convert.orbax.keep import keep, kept_shape
from convert.orbax.metadata import render, render_step
from convert.orbax.moves import Move, moves, rename
from convert.orbax.portions import Portion, batches, by_array, cut, total
from convert.planning.planner import Plan
from convert.progress import Progress
from layouts.checkpoint import Reader
from layouts.orbax.malloc import keep_below
from layouts.orbax.reader import OrbaxReader
from layouts.orbax.tree import COMMITTED, METADATA, STEP
from layouts.places import is_remote

_KEPT, _COPIED, _WRITTEN = "chunks are kept", "chunks are kept and copied", "chunks are written"


def write(
    plan: Plan,
    reader: Reader,
    stage: AnyStage,
    budget: OrbaxBudget,
    progress: Progress,
    original: manifest.Original | None = None,
    processes: Processes = ALONE,
) -> None:
    """Fill the staging directory; everything in it is durable on return. `original` are files that a way back restores.

    Of several processes, each writes its share of the batches; the first one joins them.

    Raises:
        OSError: the disk is full or failing.
        InputError: data of the input cannot be read.
    """
    keep_below(budget.mapped)
    place = reader.item.relative_to(reader.path) if isinstance(reader, OrbaxReader) else Path("0/items")
    item = Item(path=stage.path.resolve() / place, reader=reader, budget=budget)
    kept = keep(plan, reader)
    whole = batches_of(plan, reader, budget)
    portions = list(itertools.chain.from_iterable(whole))
    copied = _begin(stage, _KEPT if kept else _written(portions), processes)
    item.path.mkdir(parents=True, exist_ok=True)
    if isinstance(reader, OrbaxReader):
        reader.close()
        reader.limits = budget.limits
    files: list[Move] = []
    if kept and isinstance(reader, OrbaxReader) and isinstance(stage, Stage):
        files = moves(plan, kept, reader, item.path)
        found = copy_and_hash(reader, item.path, files, stage, copied, portions, kept, budget, progress, processes)
    else:
        found = _fill(item, whole, stage, progress, processes)
    processes.agree("written")
    if not processes.first:
        return
    if kept and isinstance(reader, OrbaxReader):
        stage.take_way(_COPIED)
        rename(item.path, plan, kept, reader, files, portions)
        chunks = {target.spec.name: kept_shape(target, reader) for target in plan.targets}
    else:
        item.join(len(whole))
        chunks = {portion.target.spec.name: portion.chunking.shape for portion in portions}
    digests = by_array(portions, stage.done | stage.by_helpers() | found)
    texts = render(plan, reader, chunks)
    for name in texts.keys() - {METADATA}:
        write_text(item.path / name, texts[name])
    if plan.scanned is not None:
        write_text(item.path.parent / STEP, render_step(plan.scanned))
    for name in plan.side_files:
        if name != manifest.NAME and not (is_remote(stage.path) and name.endswith(COMMITTED)):
            copy_file(plan.source / name, stage.path / name)
    write_text(stage.path / manifest.NAME, manifest.render(plan, digests, original, of_chunks=kept is not None))
    write_text(item.path / METADATA, texts[METADATA])  # last, because it makes a checkpoint of what lies in a store


def batches_of(plan: Plan, reader: Reader, budget: OrbaxBudget) -> list[list[Portion]]:
    """What is made durable and journalled at once, and what processes share."""
    return list(batches(cut(plan.targets, lambda target: budget.chunking(target, reader), SYNC), SYNC))


def _fill(
    item: Item, whole: Sequence[Sequence[Portion]], stage: AnyStage, progress: Progress, processes: Processes
) -> dict[str, str]:
    """Write our share of the batches, but for those that an earlier run has finished; their digests by `key`."""
    digests: dict[str, str] = {}
    for number in processes.mine(list(map(total, whole))):
        batch = whole[number]
        finished = all(portion.key in stage.done for portion in batch)
        if finished and all(path.exists() for path in item.paths(number, batch)):
            progress(total(batch))
            continue
        stage.check()
        item.begin(number, batch)
        fresh = Filler(reader=item.reader, budget=item.budget, progress=progress, open=item.create).fill(batch)
        item.sync(number, batch)
        stage.record(fresh)
        digests |= fresh
    return digests


def _begin(stage: AnyStage, way: str, processes: Processes) -> bool:
    """Whether an earlier run has copied the files. If one went another way, all that it left is removed."""
    before = stage.way() if processes.first else way
    if before != way and (before, way) != (_COPIED, _KEPT):
        stage.forget()
        stage.take_way(way)
    processes.agree("begun", way)
    stage.refresh()
    return stage.way() == _COPIED


def _written(portions: Sequence[Portion]) -> str:
    """The way of writing arrays in these portions."""
    keys = "\n".join(portion.key for portion in portions)
    return f"{_WRITTEN} in portions {xxhash.xxh3_64_hexdigest(keys.encode())}"
