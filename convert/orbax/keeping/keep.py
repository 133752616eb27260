"""Fuse without touching a chunk: where each chunk of the source is a chunk of the target, only its name changes. Pure.

In: a plan and an open input. Out: where each stored chunk goes, or None if one has to be cut. It never touches a chunk.

Gate and up lie side by side in `wi`. So the chunks of `wi_0` and `wi_1` are chunks of `wi`, compressed bytes and all, if none
reaches across the end of `n`. `moves` does what this takes on the disk. Digests are of the chunks as stored.

Large arrays that are one chunk each are kept only on demand (`--keep-chunks`): a restore onto many devices would decode the
whole chunk on each of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.disk.places import is_remote
from layouts.language.layout import Placed
from layouts.orbax.chunks import Chunk, chunks_of
from layouts.orbax.codec import grid_shape
from layouts.orbax.reader import OrbaxReader
from layouts.orbax.tree import ARRAYS
from layouts.reader import Reader

ONE = 64 << 20
"""Bytes above which an array of one chunk is cut anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Where the chunks of one source go: by `shift` along dimension `axis`, those from `begin` to `end` there."""

    source: str
    axis: int
    shift: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A conversion by names: the input, and the parts of each target that moves."""

    reader: OrbaxReader
    parts: Mapping[str, tuple[Part, ...]]


def keep(plan: Plan, reader: Reader) -> Kept | None:
    """Say how all chunks of a checkpoint can be kept; None if some cannot."""
    if (
        plan.mesh
        or not isinstance(reader, OrbaxReader)
        or not _complete(reader)
        or is_remote(reader.path)
        or is_remote(plan.out)
    ):
        return None
    parts: dict[str, tuple[Part, ...]] = {}
    for target in plan.targets:
        sources = sorted({piece.source for piece in target.pieces(target.target.pattern.whole(target.sizes))})
        cut = not plan.keep_chunks and any(_is_one(reader, name) for name in sources)
        if cut or not target.spec.nbytes:
            return None
        if sources != [target.spec.name] or target.source.pattern != target.target.pattern:
            found = _parts(target, reader)
            if found is None:
                return None
            parts[target.spec.name] = found
    return Kept(reader=reader, parts=parts) if parts else None


def kept_chunks(target: Target, kept: Kept, rows: range | None = None) -> list[Chunk]:
    """The chunks of the source that are a target's, each at its place there, in the order of its grid.

    With `rows`, those that begin in them along the first dimension, which no part moves along.

    Raises:
        InputError: one has been lost.
    """
    if target.spec.name not in kept.parts:
        return chunks_of(kept.reader, target.spec.name, rows)
    found = []
    for part in kept.parts[target.spec.name]:
        for at, name, key in chunks_of(kept.reader, part.source, rows):
            if part.begin <= at[part.axis] < part.end:
                place = (*at[: part.axis], at[part.axis] + part.shift, *at[part.axis + 1 :])
                found.append(Chunk(place, name, key))
    return sorted(found)


def _complete(reader: OrbaxReader) -> bool:
    """Whether a database holds nothing that the plan leaves out, for its bytes would come along, under names that we know."""
    arrays = [entry for entry in reader.tree["tree_metadata"].values() if entry["value_metadata"]["value_type"] in ARRAYS]
    encodings = [metadata.get("chunk_key_encoding", {"name": "default"})["name"] for metadata in reader.grids.values()]
    return set(encodings) <= {"default"} and (not reader.use_ocdbt or len(arrays) == len(reader.tensors))


def _is_one(reader: OrbaxReader, name: str) -> bool:
    spec = reader.tensors[name]
    return spec.nbytes > ONE and math.prod(reader.chunks[name]) == math.prod(spec.shape)


def _parts(target: Target, reader: OrbaxReader) -> tuple[Part, ...] | None:
    """The sources of a target whose chunks are its own; None if a chunk would be cut or turned."""
    source, wanted = target.source.pattern, target.target.pattern
    changed = [i for i, (a, b) in enumerate(zip(source.groups, wanted.groups, strict=False)) if a != b]
    plain = not (source.padding or wanted.padding or source.reversed or wanted.reversed)
    if len(source.groups) != len(wanted.groups) or len(changed) != 1 or not plain:
        return None
    axis = changed[0]
    if not axis:
        return None
    pair = source.groups[axis], wanted.groups[axis]
    if pair == (("n",), ("g", "n")):
        names = [(g, _named(target.source, target, g)) for g in (0, 1)]
        return _aligned([(name, g, 0) for g, name in names], axis, target.sizes["n"], reader)
    if pair == (("g", "n"), ("n",)) and isinstance(at := target.index.get("g"), int):
        name = _named(target.source, target, at)
        return _aligned([(name, -at, at)], axis, target.sizes["n"], reader)
    return None


def kept_shape(target: Target, kept: Kept) -> tuple[int, ...]:
    """The shape of a stored chunk of a target that keeps those of its sources."""
    source = next(target.pieces(target.target.pattern.whole(target.sizes))).source
    return grid_shape(kept.reader.grids[source])


def _named(placed: Placed, target: Target, g: int) -> str:
    return placed.key.render({**target.index, "g": g})


def _aligned(found: Sequence[tuple[str, int, int]], axis: int, n: int, reader: OrbaxReader) -> tuple[Part, ...] | None:
    grids = {grid_shape(reader.grids[name]) for name, _, _ in found}
    alike = {json.dumps({**reader.grids[name], "shape": None}, sort_keys=True) for name, _, _ in found}
    size = next(iter(grids))[axis]
    if len(alike) > 1 or n % size:
        return None
    steps = n // size
    return tuple(
        Part(source=name, axis=axis, shift=by * steps, begin=first * steps, end=(first + 1) * steps)
        for name, by, first in found
    )
