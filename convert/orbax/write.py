"""Write a plan as an Orbax checkpoint, without Orbax: arrays by TensorStore, what stands beside them as JSON.

In: a plan and an open input. Out: a filled staging directory. It never imports Orbax.

Orbax alone takes more memory than a small budget has, and it drops what it was not asked to restore: shardings, random keys.
The ways of writing, and what each costs, stand in `convert.orbax`. A finished batch is made durable and journalled. The next
run continues behind it, and removes what an interrupted run left of a batch, so that no dead bytes stay in the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from convert.card import write_card
from convert.commit import manifest
from convert.commit.files import Folder
from convert.commit.identity import input_digest
from convert.commit.inventory import check_copied
from convert.commit.processes import Processes
from convert.commit.recorded import Manifest
from convert.commit.stage import AnyStage, Stage
from convert.commit.store import StoreFolder
from convert.engine.again import Remade
from convert.engine.budget import SYNC
from convert.engine.writer import Written
from convert.errors import readable
from convert.orbax.again import check_chunks, files_of_item, stored_again, written_again
from convert.orbax.budget import OrbaxBudget, orbax_budget, with_uploads
from convert.orbax.copy import copy_and_hash
from convert.orbax.fill import Filler
from convert.orbax.item import Item
from convert.orbax.keeping.keep import Kept, keep, kept_shape
from convert.orbax.keeping.moves import moves, rename
from convert.orbax.look import look, look_at_files
from convert.orbax.metadata import check_names, render, render_step
from convert.orbax.origin import Origin, origin_of
from convert.orbax.portions import Portion, batches, by_array, cut, total
from convert.planning.across.computed import originals_of
from convert.planning.planner import Plan
from convert.planning.targets import Target
from convert.progress import Progress
from layouts.card import CARD
from layouts.computing import uncomputed
from layouts.disk.faults import writing
from layouts.disk.files import CONFIG, read_object
from layouts.disk.places import is_remote
from layouts.disk.written import config_text
from layouts.orbax.malloc import keep_below
from layouts.orbax.tree import COMMITTED, METADATA, STEP
from layouts.reader import Reader
from layouts.windows import Windows

_Originals = Callable[[AnyStage, Progress], tuple[Mapping[str, Any], tuple[str, ...]]]
"""Keeps the originals of computed tensors, and gives what the manifest says of them, and notes (`convert.hf.originals`)."""
_Chunks = Mapping[str, tuple[int, ...]]
"""The shapes of stored chunks, by array."""
_KEPT, _COPIED, _WRITTEN = "chunks are kept", "chunks are kept and copied", "chunks are written"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrbaxWriter:
    """See `convert.engine.writer.Writer`. Each of several processes writes its share of the batches; the first joins them."""

    plan: Plan
    reader: Reader
    budget: OrbaxBudget
    origin: Origin
    kept: Kept | None
    memory: int
    wanted: int | None
    originals: _Originals

    @classmethod
    def make(
        cls, plan: Plan, reader: Reader, memory: int, jobs: int | None, originals: _Originals, like: Reader | None = None
    ) -> OrbaxWriter:
        """Choose the way and the settings that stay within `memory` bytes; `like`, or what is read, says how trees are stored.

        Raises:
            UsageError: none do.
            InputError: the name of an array leads elsewhere.
            PlanError: two things would have one name, or an array would have more chunks than are read again.
        """
        with readable(reader.path):
            origin, kept = origin_of(like or reader), keep(plan, reader)
            check_names(plan, origin)
            render(plan, origin, {target.spec.name: target.spec.shape for target in plan.targets})  # or it fails at the end
        budget = with_uploads(orbax_budget(memory, jobs, plan, reader, origin, kept), memory, plan, reader)
        if not kept:
            check_chunks(plan, reader, budget)
        return cls(
            plan=plan, reader=reader, budget=budget, origin=origin, kept=kept, memory=memory, wanted=jobs, originals=originals
        )

    def pieces(self) -> list[tuple[str, int]]:
        """The batches."""
        return [(batch[0].key, total(batch)) for batch in self._batches()]

    def _batches(self) -> list[list[Portion]]:
        """What is made durable and journalled at once, and what processes share."""
        return list(batches(cut(self.plan.targets, lambda target: self.budget.chunking(target, self.reader), SYNC), SYNC))

    def write(self, stage: AnyStage, progress: Progress, processes: Processes) -> Written:
        """Arrays by all processes; the first one adds what stands beside them."""
        keep_below(self.budget.mapped)
        whole = self._batches()
        portions = list(itertools.chain.from_iterable(whole))
        copied = _begin(stage, _KEPT if self.kept else _written(portions), processes)
        kept, notes = self.originals(stage, progress) if processes.first else ({}, ())
        with stage.folder.below(_name(self.origin.place), make=True) as folder:
            self.reader.hold(self.budget.limits, Windows())
            if self.kept and isinstance(stage, Stage) and isinstance(folder, Folder):
                digests, chunks = self._keep(self.kept, folder, stage, copied, portions, progress, processes)
            else:
                item = Item(folder=folder, origin=self.origin, budget=self.budget)
                digests, chunks = self._fill(item, whole, stage, progress, processes)
            if not processes.first:
                return Written()
            look(stage.path / self.origin.place, self.plan, self.origin)
            found = by_array(portions, stage.done | stage.by_helpers() | digests)
            return Written(notes + self._write_beside(stage, folder, found, chunks, kept), self.plan.content)

    def _keep(
        self,
        kept: Kept,
        folder: Folder,
        stage: Stage,
        copied: bool,
        portions: Sequence[Portion],
        progress: Progress,
        processes: Processes,
    ) -> tuple[dict[str, str], _Chunks]:
        """Copy chunks as they are stored, and give them their new names; new digests by `key`, and shapes of chunks."""
        with readable(self.reader.path):
            files = moves(self.plan, kept, self.origin)
        digests = copy_and_hash(
            folder, files, stage, copied, portions, kept, self.budget, progress, processes, self.plan.side_bytes
        )
        processes.agree("written")
        if processes.first:
            stage.take_way(_COPIED)
            with writing(str(stage.path)):
                rename(folder, self.plan, kept, self.origin, files, portions)
            look_at_files(folder, files)
        return digests, {target.spec.name: kept_shape(target, kept) for target in self.plan.targets}

    def _fill(
        self, item: Item, whole: Sequence[Sequence[Portion]], stage: AnyStage, progress: Progress, processes: Processes
    ) -> tuple[dict[str, str], _Chunks]:
        """Write our share of the batches, but for those that an earlier run has finished, and join all."""
        digests: dict[str, str] = {}
        for number in processes.mine(list(map(total, whole))):
            batch = whole[number]
            finished = all(portion.key in stage.done for portion in batch)
            if finished and all(map(item.folder.exists, item.names(number, batch))):
                progress(total(batch))
                continue
            stage.check()
            item.begin(number, batch)
            fresh = Filler(reader=self.reader, budget=self.budget, progress=progress, open=item.create).fill(batch)
            item.sync(number, batch)
            stage.record(fresh)
            digests |= fresh
        processes.agree("written")
        if processes.first:
            with writing(str(stage.path)):
                item.join(len(whole))
        return digests, {portion.target.spec.name: portion.chunking.shape for batch in whole for portion in batch}

    def _write_beside(
        self,
        stage: AnyStage,
        folder: Folder | StoreFolder,
        digests: Mapping[str, manifest.Digest],
        chunks: _Chunks,
        kept: Mapping[str, Any],
    ) -> tuple[str, ...]:
        plan, texts = self.plan, render(self.plan, self.origin, chunks, kept=self.kept is not None)
        for name in texts.keys() - {METADATA}:
            folder.write_text(name, texts[name])
        if plan.scanned is not None:
            stage.folder.write_text(_name(self.origin.place.parent / STEP), render_step(plan.scanned))
        notes = write_card(plan, self.reader, stage.folder)
        for name in plan.side_files:
            if name == CONFIG and self.reader.config != read_object(plan.source / CONFIG):  # what is computed is not quantised
                stage.folder.write_text(name, config_text(self.reader.config))
            elif name not in (manifest.NAME, CARD) and not (is_remote(stage.path) and name.endswith(COMMITTED)):
                stage.folder.copy_in(plan.source / name, name)
        original = manifest.original_of(plan, self.reader)
        files = files_of_item(stage.path, plan, self.origin, {METADATA: texts[METADATA]})
        check_copied(stage.path, plan.side_files, files)
        beside = manifest.Beside(input=input_digest(self.reader), files=files, originals=kept)
        text = manifest.render(plan, digests, original, beside, of_chunks=self.kept is not None)
        stage.folder.write_text(manifest.NAME, text)
        folder.write_text(METADATA, texts[METADATA])  # last, because it makes a checkpoint of what lies in a store
        return notes

    def finished(self, done: Collection[str]) -> int:
        """Those all of whose portions are."""
        left = {portion.target.spec.name for batch in self._batches() for portion in batch if portion.key not in done}
        return len(self.plan.targets) - len(left)

    def unlike(self, found: Manifest) -> str | None:
        """Chunks that were kept and would be cut now, or the other way round."""
        if (found.hashed == manifest.CHUNKS) != (self.kept is not None):
            return "was made with other options (--keep-chunks): chunks that are kept in one are cut in the other"
        return None

    def again(self, targets: Sequence[Target], found: Manifest, progress: Progress) -> Iterator[Remade]:
        """Kept chunks as they are stored; else as files are made from the input, in storage order."""
        wanted = {name: entry.digest for name, entry in found.tensors.items()}
        if self.kept:
            yield from stored_again(targets, wanted, self.kept, self.budget.jobs, progress)
            return
        limits = self.memory, self.wanted
        yield from written_again(self.plan, targets, wanted, self.reader, limits, progress)
        names = {target.spec.name for target in originals_of(self.plan)}
        if own := [target for target in targets if target.spec.name in names]:
            kept = {name: entry.digest for name, entry in found.originals.items()}
            yield from written_again(self.plan, own, kept, uncomputed(self.reader), limits, progress)


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


def _name(place: Path) -> str:
    """A place below the stage as a name; the stage itself has none."""
    return "/".join(place.parts)
