"""What a conversion by names does on the disk: which files are copied, and how their chunks get new names.

In: a plan and the chunks it keeps. Out: files to copy, and new names. It never decodes a chunk.

An OCDBT database keeps names and values apart: the files with the values are copied as they are, at the speed of the disk, and
the tree of names is written anew. Where each array is a directory, a chunk is a file, and is copied under its new name.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorstore as ts

from convert.commit.below import files as files_below
from convert.commit.files import Folder
from convert.orbax.keeping.keep import Kept, kept_chunks
from convert.orbax.metadata import stored_name
from convert.orbax.origin import Origin
from convert.orbax.portions import Portion
from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.disk.faults import answer
from layouts.disk.places import names_of
from layouts.orbax.arrays import NODES
from layouts.orbax.chunks import key_at
from layouts.orbax.codec import METADATA
from layouts.orbax.reader import OrbaxReader
from layouts.orbax.tree import DATABASE, PROCESS

_ONLY = ts.KvStore.KeyRange("", "\x00")
"""The key itself, not those that begin alike."""
RENAMED = 1 << 13
"""Chunks that are renamed at once. Until they are written, their new names are in memory: of 300,000 that is 280 MB."""


@dataclass(frozen=True, slots=True)
class Move:
    """A file to copy, and its name in the item that is written.

    An `own` one is written anew in the copy later on, so that it is always copied, by the first process.
    """

    source: Path
    target: str
    nbytes: int
    own: bool = False


def moves(plan: Plan, kept: Kept, origin: Origin) -> list[Move]:
    """All files that the item in the output consists of, but for its metadata and that of arrays that change."""
    pairs = _database(kept.reader) if origin.ocdbt else _directories(plan, kept, origin)
    return [Move(source, target, source.stat().st_size, own) for source, target, own in pairs]


def _database(reader: OrbaxReader) -> Iterator[tuple[Path, str, bool]]:
    """The files with values and names, without the manifests of single processes."""
    for entry in sorted(reader.item.iterdir()):
        if entry.name.startswith(PROCESS) or entry.name in DATABASE:
            files = [entry] if entry.is_file() else [entry / name for name in names_of(entry)]
            for file in files:
                if file.name != "manifest.ocdbt" or file.parent == reader.item:
                    yield file, file.relative_to(reader.item).as_posix(), file.parent == reader.item


def _directories(plan: Plan, kept: Kept, origin: Origin) -> Iterator[tuple[Path, str, bool]]:
    reader = kept.reader
    for target in plan.targets:
        place = stored_name(target, origin)
        for at, name, key in kept_chunks(target, kept):
            yield reader.item / reader.leaves[name].stored / key, f"{place}/{key_at(reader.grids[name], at)}", False


def rename(item: Folder, plan: Plan, kept: Kept, origin: Origin, files: Sequence[Move], portions: Sequence[Portion]) -> None:
    """Give the chunks that have been copied the names of the plan; on a disk they have them, and only metadata is written.

    It may be done again, after the manifest has been copied again: what else is there besides the `files` goes.
    """
    if not origin.ocdbt:
        for target in plan.targets:
            item.write_text(f"{stored_name(target, origin)}/{_metadata_key(origin)}", _metadata(target, kept, origin))
        return
    copied = {move.target for move in files}
    for left in [name for name, _ in files_below(item) if name not in copied]:
        item.remove(left)
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": NODES}})
    stored = answer(
        ts.KvStore.open({"driver": "ocdbt", "base": item.spec(), "cache_pool": "cache_pool#ocdbt"}, context=context)
    )
    renamed = _renamed(kept, origin, portions)
    while some := list(itertools.islice(renamed, RENAMED)):
        transaction = ts.Transaction(atomic=True)
        new = stored.with_transaction(transaction)
        copying = [(stored + old).experimental_copy_range_to(new + key, _ONLY) for old, key in some]
        for done in copying:
            answer(done)
        answer(transaction.commit_async())
    transaction = ts.Transaction(atomic=True)
    new = stored.with_transaction(transaction)
    for name in {part.source for parts in kept.parts.values() for part in parts}:
        answer((new + f"{origin.leaves[name].stored}/").delete_range(ts.KvStore.KeyRange()))
    for target in (target for target in plan.targets if target.spec.name in kept.parts):
        place = f"{stored_name(target, origin)}/"
        answer((new + place).write(_metadata_key(origin), _metadata(target, kept, origin)))
    answer(transaction.commit_async())


def _renamed(kept: Kept, origin: Origin, portions: Sequence[Portion]) -> Iterator[tuple[str, str]]:
    """The old and the new key of each chunk that moves."""
    for portion in portions:
        if portion.target.spec.name in kept.parts:
            place = stored_name(portion.target, origin)
            for at, name, key in kept_chunks(portion.target, kept, portion.rows):
                yield f"{origin.leaves[name].stored}/{key}", f"{place}/{key_at(kept.reader.grids[name], at)}"


def _metadata_key(origin: Origin) -> str:
    return METADATA["zarr3" if origin.zarr3 else "zarr"]


def _metadata(target: Target, kept: Kept, origin: Origin) -> str:
    """What an array says of itself: as its first source does, but for the shape."""
    parts = kept.parts.get(target.spec.name)
    values = kept.reader.values(parts[0].source if parts else target.spec.name)
    stored = json.loads(answer(values.read(_metadata_key(origin))).value)
    return json.dumps({**stored, "shape": list(target.spec.shape)})
