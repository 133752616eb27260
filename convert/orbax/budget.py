"""How an Orbax conversion stays within `--memory`: what it holds at most, from the shapes of chunks alone. Pure.

In: a plan, the chunks of its input, `--memory`. Out: settings that stay within it. It never changes what is written.

Beside our own blocks, memory goes to what TensorStore decodes to read any part of a chunk, to chunks that wait to be compressed
and written, and to its caches. All of it follows from the chunks of the source, which Orbax chose when it saved, and those of
the target, which are ours. The richest settings that fit are taken; the output is the same for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from convert.engine.blocks import SLAB
from convert.engine.budget import STRIP, Budget
from convert.engine.reading import one_for_each_source, plan_windows
from convert.errors import too_little
from convert.options.option import workers
from convert.orbax.chunks import Chunking, plan_chunks, touched
from convert.orbax.keeping.keep import Kept
from convert.orbax.mesh import cuts_of
from convert.orbax.origin import Origin, origin_of
from convert.planning.across.computed import kept_bytes
from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.disk.places import RemotePath
from layouts.disk.upload import CLIENT, held, held_by_pieces
from layouts.orbax.arrays import NODES
from layouts.orbax.malloc import KEPT, keep_below
from layouts.orbax.stream import WINDOW
from layouts.reader import Reader, ReadLimits, ReadUnit, held_by, is_chunked
from layouts.side_files import ORIGINALS
from layouts.tensors import itemsize
from layouts.windows import Windows

BASE, EACH = 96 << 20, 12 << 10
"""Bytes that the process needs before the first block (interpreter, NumPy, TensorStore, threads), and per array."""
BOX, CACHE, STREAM, FLYING, GRAIN = 8 << 20, 128 << 20, 64 << 20, 64 << 20, 1 << 20
"""Richest settings, in bytes: see `OrbaxBudget`."""
_PARTS = (4, 8, 16)
"""Windows get one in so many parts of the memory, the larger ones first."""
HASHING = 8 << 20
"""Bytes that a worker holds while it hashes stored chunks, in pieces of 1 MiB."""
MAPPED = {1: 32 << 20, 2: 16 << 20, 4: 2 << 20, 8: 256 << 10}
"""By how much leaner the settings are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrbaxBudget:
    """Settings of one conversion; sizes in bytes.

    `jobs` workers assemble boxes of up to `box` bytes each. Decoded chunks are kept in a cache of `cache`, those above `stream`
    are decoded piece by piece, `streams` of them at a time. `windows` are there if arrays are read bit by bit. Up to `flying`
    bytes wait to be compressed and written, in chunks of about `grain`. Blocks of `mapped` bytes go back to the system once
    they are freed. `peak` bounds the resident memory of the process.
    """

    jobs: int
    box: int
    cache: int
    stream: int
    flying: int
    grain: int
    mapped: int
    peak: int
    streams: int = 0
    windows: Windows = field(default_factory=Windows)
    cuts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Into how many parts a mesh cuts the dimensions of an array."""

    @property
    def limits(self) -> ReadLimits:
        """The reader's part."""
        return ReadLimits(cache=self.cache, stream=self.stream, streams=self.streams, threads=max(2, self.jobs))

    def chunking(self, target: Target, reader: Reader) -> Chunking:
        """How an array is cut."""
        size, held = itemsize(target.spec.dtype), 0
        source = next(target.pieces(target.target.pattern.whole(target.sizes)), None)
        unit = reader.unit(source.source) if source else None
        if unit and not unit.streams(self.stream):
            held = self.cache // 4
        cuts = self.cuts.get(target.spec.name, ())
        limits = max(1, self.box // size), held // size, max(1, self.grain // size)
        return plan_chunks(target, unit.shape if unit else None, *limits, cuts)


class _Reading(NamedTuple):
    """What reading takes: bytes, and how many streams are open, which are among these."""

    nbytes: int
    streams: int


def orbax_budget(
    memory: int, jobs: int | None, plan: Plan, reader: Reader, origin: Origin, kept: Kept | None, *, windowed: bool = False
) -> OrbaxBudget:
    """The richest settings with which a conversion to or from Orbax stays within `memory` bytes.

    With `windowed`, arrays are read bit by bit, through windows where that helps.

    Raises:
        UsageError: none does; the message says how much the leanest need, and for which tensor.
    """
    wanted = workers(jobs)
    base = _base(plan, reader)
    largest = ""
    least = None
    cuts = cuts_of(plan, origin)
    settings = [replace(budget, cuts=cuts) for budget in _settings(wanted, origin.ocdbt)]
    if kept:
        return _keeping(settings[0], memory, base)
    kinds = list(_kinds(plan, reader))
    for budget in _windowed(settings, plan, reader, memory) if windowed else settings:
        costs = {target.spec.name: _reading(budget, target, reader) for target in kinds}
        worst = max(costs, key=lambda name: costs[name], default="")
        reading = costs.get(worst, _Reading(0, 0))
        cache = _cache(budget, reader)
        peak = base + cache + reading.nbytes + (budget.jobs + 4) * budget.box + 2 * budget.flying + KEPT * budget.mapped
        peak += budget.windows.limit
        if peak <= memory:
            return replace(budget, peak=peak, streams=max((cost.streams for cost in costs.values()), default=0))
        if least is None or peak < least:
            least, largest = peak, _why(worst, cache, budget, reader)
    raise too_little(memory, f"{((least or 0) >> 20) + 1} MiB are needed{largest}")


def _base(plan: Plan, reader: Reader) -> int:
    return BASE + EACH * (len(reader.tensors) + len(plan.targets)) + 2 * NODES


def with_uploads(budget: OrbaxBudget, memory: int, plan: Plan, reader: Reader) -> OrbaxBudget:
    """With what it takes to upload the originals of computed tensors, before arrays are written, and side files, after it.

    Raises:
        UsageError: that is more than `memory` bytes: `gs://` takes an object as a whole.
    """
    if not isinstance(plan.out, RemotePath):
        return budget
    first = held(plan.out, size) + SLAB + STRIP if (size := kept_bytes(plan)) else 0
    upload, what = max((first, ORIGINALS), (held_by_pieces(plan.out, plan.beside), "what stands beside the arrays"))
    if (peak := _base(plan, reader) + CLIENT + budget.cache + upload) > memory:
        raise too_little(memory, f"{(peak >> 20) + 1} MiB are needed to upload {what}")
    return replace(budget, peak=max(budget.peak, peak))


def reading_budget(memory: int, jobs: int | None, plan: Plan, reader: Reader) -> Budget:
    """The same for who writes files: the reader is told what it may hold, and workers get the rest.

    Raises:
        UsageError: no settings stay within `memory` bytes.
    """
    found = orbax_budget(memory, jobs, plan, reader, origin_of(reader), None, windowed=True)
    keep_below(found.mapped)
    reader.hold(found.limits, found.windows)
    return Budget(jobs=found.jobs, strip=found.box, base=found.peak - found.jobs * (found.box + SLAB))


def _windowed(settings: Sequence[OrbaxBudget], plan: Plan, reader: Reader, memory: int) -> Iterator[OrbaxBudget]:
    """The settings, with windows as large as can be where they help: without, all might be decoded for each tensor again."""
    targets = one_for_each_source(plan.targets)
    for part, budget in itertools.product(_PARTS, settings):
        yield replace(budget, windows=plan_windows(targets, reader, budget.box, memory // part))


def _keeping(richest: OrbaxBudget, memory: int, base: int) -> OrbaxBudget:
    """For chunks that nobody decodes."""
    each = HASHING + richest.box
    jobs = min(richest.jobs, (memory - base) // each)
    if jobs < 1:
        raise too_little(memory, f"{(base + each >> 20) + 1} MiB are needed")
    return replace(richest, jobs=jobs, peak=base + jobs * each)


def _settings(jobs: int, use_ocdbt: bool) -> Iterator[OrbaxBudget]:
    for count, part in [(jobs, 1), (jobs, 2), (jobs, 4), *((few, 4) for few in range(jobs - 1, 0, -1)), (1, 8)]:
        yield OrbaxBudget(
            jobs=count,
            box=max(BOX // part, 2 << 20),
            cache=CACHE // part,
            stream=STREAM // part,
            flying=FLYING // part,
            # Where each chunk is a file of its own, there should not be too many.
            grain=min(GRAIN if use_ocdbt else BOX, max(BOX // part, 2 << 20)),
            mapped=MAPPED[part],
            peak=0,
        )


def _kinds(plan: Plan, reader: Reader) -> Iterator[Target]:
    """One target of each kind: those of all layers are alike."""
    seen = set()
    for target in plan.targets:
        pieces = target.pieces(target.target.pattern.whole(target.sizes))
        source = next((piece.source for piece in pieces), None)
        unit = reader.unit(source) if source else None
        kind = (target.role, target.spec.shape, target.spec.dtype, target.source.pattern, target.target.pattern, unit)
        if kind not in seen:
            seen.add(kind)
            yield target


def _reading(budget: OrbaxBudget, target: Target, reader: Reader) -> _Reading:
    """What the workers hold while they assemble boxes of a target, besides these."""
    chunking = budget.chunking(target, reader)
    sizes = target.target.pattern.stored(target.sizes)
    size, block = itemsize(target.spec.dtype), chunking.largest * itemsize(target.spec.dtype)
    if not is_chunked(reader):
        return _Reading(budget.jobs * (SLAB + 2 * block + held_by(reader)), 0)
    spans = {axis: range(min(length, sizes[axis])) for axis, length in chunking.box.items()}
    decoded = loaded = streamed = 0
    for piece in target.pieces(spans):
        shape = target.way.stored[piece.number][0].shape({a: max(1, len(span)) for a, span in piece.source_box.items()})
        window, unit = budget.windows.shapes.get(piece.source), reader.unit(piece.source)
        assert unit is not None
        count, elements = touched(reader.tensors[piece.source].shape, unit.shape, window or shape)
        if unit.streams(budget.stream):
            streamed += 2 * count  # a box that is streamed waits for the one before it
        elif window:
            loaded += size * min(elements, budget.limits.at_once * math.prod(unit.shape))
        else:
            decoded = max(decoded, elements * size)
    # A chunk is held compressed and decoded at once.
    return _Reading(budget.jobs * (2 * decoded + 2 * block) + 2 * loaded + streamed * WINDOW, streamed)


def _cache(budget: OrbaxBudget, reader: Reader) -> int:
    if not is_chunked(reader):
        return 0
    whole = _decoded_whole(budget, reader)
    return max(budget.cache, 2 * max((unit.nbytes for unit in whole.values()), default=0) + 4096)


def _decoded_whole(budget: OrbaxBudget, reader: Reader) -> dict[str, ReadUnit]:
    """The tensors whose chunks are decoded as a whole, and these."""
    units = ((name, reader.unit(name)) for name in reader.tensors)
    return {name: unit for name, unit in units if unit and not unit.streams(budget.stream)}


def _why(worst: str, cache: int, budget: OrbaxBudget, reader: Reader) -> str:
    if cache <= budget.cache:
        return f" for blocks of {worst}" if worst else ""
    whole = _decoded_whole(budget, reader)
    name = max(whole, key=lambda name: whole[name].nbytes)
    chunk = math.prod(whole[name].shape)
    return f": {name} is stored in chunks of {chunk} elements, of which two must be decoded as a whole"
