"""Write a plan as a Hugging Face checkpoint: shards, index, config, side files, manifest.

In: a plan and an open input. Out: a filled staging directory. It never writes elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from convert.card import write_card
from convert.commit import manifest
from convert.commit.identity import input_digest
from convert.commit.inventory import FileEntry, check_copied, inventory
from convert.commit.processes import Processes
from convert.commit.recorded import Manifest
from convert.commit.stage import AnyStage
from convert.commit.store import StoreStage
from convert.content import content_of
from convert.engine.again import Remade, remade
from convert.engine.budget import Budget
from convert.engine.reading import in_order
from convert.engine.writer import Written
from convert.errors import PlanError, readable
from convert.hf.execute import write_tensors
from convert.hf.look import begins, look, look_at_objects
from convert.hf.objects import begin, write_objects
from convert.hf.shards import File, index_text, pack, restore, weight_map
from convert.planning.planner import Plan
from convert.planning.targets import Target
from convert.progress import Progress
from layouts.card import CARD
from layouts.checkpoint import growing
from layouts.disk.files import CONFIG, INDEX, RECORD
from layouts.disk.places import RemotePath, is_remote, listed_anew
from layouts.disk.upload import CLIENT, held, held_by_pieces
from layouts.disk.written import config_text
from layouts.hf.header import metadata_of
from layouts.orbax.tree import COMMITTED
from layouts.reader import Reader, is_chunked
from layouts.shards import unindexed

REWRITTEN = (CONFIG, INDEX, manifest.NAME)
"""Files that are made anew; every other file that holds no tensors is copied as it is."""


def _plan_files(plan: Plan, reader: Reader, original: manifest.Original | None, limit: int) -> tuple[File, ...]:
    files = restore(original.headers, (target.spec for target in plan.targets)) if original else None
    if files and not all(file.offsets for file in files) and len(unindexed(file.name for file in files)) < len(files):
        files = None  # an index, which names files by their tensors, would leave out those that hold none
    if files is None:
        metadata = _metadata(reader)
        if plan.record:
            metadata[RECORD] = json.dumps(plan.record)
        files = pack(plan.targets, limit=limit, metadata=metadata)
    if clash := {file.name for file in files} & set(plan.side_files):
        name = min(clash)
        raise PlanError(f"{plan.source / name} holds no tensor of this checkpoint, but the output needs its name; remove it")
    return files


def _metadata(reader: Reader) -> dict[str, str]:
    """The `__metadata__` of the input without our record; the first shard speaks for all, as loaders take it."""
    if not reader.headers:
        return {"format": "pt"}  # what transformers writes, and wants
    metadata: dict[str, str] = dict(metadata_of(next(iter(reader.headers.values()))))
    metadata.pop(RECORD, None)
    return metadata


@dataclass(frozen=True, kw_only=True)
class HFWriter:
    """See `convert.engine.writer.Writer`. Files hold at most `max_shard_size` bytes of data, unless a tensor is larger.

    `like` are the files to make again; if None, those that the input's manifest remembers.

    Each of several processes writes whole files, since not every network file system is good at two writing one.
    """

    plan: Plan
    reader: Reader
    budget: Budget
    max_shard_size: int
    like: manifest.Original | None = None

    @classmethod
    def make(
        cls, plan: Plan, reader: Reader, budget: Callable[[int, int], Budget], limit: int, like: manifest.Original | None
    ) -> HFWriter:
        """One within a budget, which is asked for with the bytes that are held besides: at any rate, and by each worker.

        Raises:
            UsageError: nobody stays within it.
            InputError, PlanError: see `files`.
        """
        made = cls(plan=plan, reader=reader, budget=budget(0, 0), max_shard_size=limit, like=like)
        if not isinstance(plan.out, RemotePath):
            return made
        upload = held(plan.out, max((file.size for file in made.files), default=0))
        return replace(made, budget=budget(CLIENT, max(upload, held_by_pieces(plan.out, plan.beside))))

    @cached_property
    def original(self) -> manifest.Original | None:
        """The original files, for an output whose experts are as they were; those of the base, where an adapter is merged.

        They are read once, as they may name 100,000 tensors.
        """
        plan = self.plan
        if self.like or plan.merging:
            return self.like or manifest.files_as_they_are(self.reader)
        return manifest.original_files(plan.source) if plan.record is None and not plan.computed else None

    @cached_property
    def files(self) -> tuple[File, ...]:
        """The files of the output: the original ones again where the input remembers them and they fit, else freshly packed.

        Raises:
            InputError: what the input remembers cannot be read.
            PlanError: a side file has the name of one of them.
        """
        with readable(self.plan.source), growing():
            return _plan_files(self.plan, self.reader, self.original, self.max_shard_size)

    def pieces(self) -> list[tuple[str, int]]:
        """The files."""
        return [(file.name, file.size) for file in self.files]

    def write(self, stage: AnyStage, progress: Progress, processes: Processes) -> Written:
        """Shards by all processes; the first one adds what stands beside them."""
        plan, files, original = self.plan, self.files, self.original
        reader, sources = self.reader, not (plan.computed or plan.values)
        own = [files[number] for number in processes.mine([file.size for file in files])]
        names = {name for file in own for name in file.offsets}
        targets = in_order([target for target in plan.targets if target.spec.name in names], reader)
        notes: tuple[str, ...] = ()
        if isinstance(stage, StoreStage):
            notes = begin(stage, files) if processes.first else ()
            processes.agree("begun")
            digests = write_objects(targets, own, reader, stage, self.budget, progress, sources=sources)
        else:
            ordered = is_chunked(reader) or plan.merging is not None  # neighbours share what is decoded, or A and B
            digests = write_tensors(
                targets, own, reader, stage, self.budget, progress, beside=plan.side_bytes, ordered=ordered, sources=sources
            )
        processes.agree("written")
        if not processes.first:
            return Written()
        if isinstance(stage, StoreStage):  # what stands beside objects makes a checkpoint of them
            look_at_objects(stage.out, files)
        digests = stage.done | stage.by_helpers() | digests
        with growing():
            content = plan.content or content_of(plan, digests)
            notes += self._write_beside(stage, files, replace(plan, content=content), digests)
        if not isinstance(stage, StoreStage):
            look(stage.folder, files)
        if plan.record is None and (original is None or {file.name for file in files} != set(original.headers)):
            why = "values are computed" if plan.computed else f"{plan.source} does not say from which files it was made"
            made = f"{why}, so the tensors are in {len(files)} new ones"
            notes = made, *notes
        return Written(notes, content)

    def _write_beside(
        self, stage: AnyStage, files: Sequence[File], plan: Plan, digests: Mapping[str, manifest.Digest]
    ) -> tuple[str, ...]:
        reader, folder = self.reader, stage.folder
        notes = write_card(plan, reader, folder)
        marks = (COMMITTED,) if is_remote(plan.source) or is_remote(plan.out) else ()  # of stores alone
        copied = [name for name in plan.side_files if name not in (*REWRITTEN, CARD, *marks)]
        for name in copied:
            folder.copy_in(plan.source / name, name)
        for name, text in _texts(plan, reader, files, self.original).items():
            folder.write_text(name, text)  # late, because they make a checkpoint of what lies in a store
        shards = {file.name: FileEntry(size=file.size) for file in files}
        there = inventory(listed_anew(stage.path), manifest.NAME, shards.__contains__) | shards
        check_copied(stage.path, copied, there)
        beside = manifest.Beside(
            input=input_digest(reader),
            files=there,
            options={"max_shard_size": self.max_shard_size},
            headers={file.name: file.head[8:].decode() for file in files},
        )
        folder.write_text(manifest.NAME, manifest.render(plan, digests, manifest.original_of(plan, reader), beside))
        return notes

    def finished(self, done: Collection[str]) -> int:
        """Each has its own key."""
        return sum(target.spec.name in done for target in self.plan.targets)

    def unlike(self, found: Manifest) -> str | None:
        """Other files, or other headers, which stand in the output itself."""
        shards = {name: entry.size for name, entry in found.files.items() if name.endswith(".safetensors")}
        for file in self.files:
            if shards.get(file.name) != file.size:
                have = f"of {shards[file.name]} bytes" if file.name in shards else "absent"
                return f"was made with other options (--max-shard-size): {file.name} is {have}, and would be of {file.size}"
            if (self.plan.out / file.name).is_file() and not begins(self.plan.out / file.name, file.head):
                return f"is not what was written: the header of {file.name} is another one"
        return None

    def again(self, targets: Sequence[Target], found: Manifest, progress: Progress) -> Iterator[Remade]:
        """As they are written, strip by strip."""
        wanted = {name: entry.digest for name, entry in found.tensors.items()}
        return remade(targets, wanted, self.reader, self.budget, progress)


def _texts(plan: Plan, reader: Reader, files: Sequence[File], original: manifest.Original | None) -> dict[str, str]:
    """Index and config. A split restores the original texts if what they say is still what the checkpoint says."""
    old = original.texts if original else {}
    config = {key: value for key, value in reader.config.items() if key != RECORD}
    texts: dict[str, str] = {}
    if plan.record:
        config[RECORD] = dict(plan.record)
    if CONFIG in old and _parsed(old[CONFIG]) == config:
        texts[CONFIG] = old[CONFIG]
    elif config:
        texts[CONFIG] = config_text(config)
    if index := _index(plan, files, original):
        texts[INDEX] = index
    return texts


def _index(plan: Plan, files: Sequence[File], original: manifest.Original | None) -> str | None:
    """The index: of several files, and of one where other safetensors files lie beside it.

    Original files have the index that they had, or none as before, unless that would say something else here.
    """
    own, text = {file.name for file in files}, partial(index_text, plan.nbytes, files)
    others = {name for name in plan.side_files if "/" not in name and name.endswith(".safetensors")}
    if original is None or own != set(original.headers):
        return text() if len(own) > 1 or others else None
    if (old := original.texts.get(INDEX)) is None:
        return None if set(unindexed(own | others)) == own else text()
    return old if _agree(old, files) else text()


def _agree(old: str, files: Sequence[File]) -> bool:
    """Whether a remembered index says what the new one would."""
    parsed = _parsed(old)
    return isinstance(parsed, dict) and parsed.get("weight_map") == weight_map(files)


def _parsed(text: str) -> Any:
    """What a remembered text says; nothing if somebody broke it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
