"""How an Orbax conversion stays within `--memory`: what it holds at most, from the shapes of chunks alone. Pure.

Beside our own blocks, memory goes to what TensorStore decodes to read any part of a chunk, to chunks that wait to be compressed
and written, and to its caches. All of it follows from the chunks of the source, which Orbax chose when it saved, and those of
the target, which are ours. The richest settings that fit are taken; the output is the same for all.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from convert.engine.blocks import SLAB
from convert.errors import UsageError
from convert.orbax.chunks import Chunking, plan_chunks, touched
from convert.orbax.keep import keep
from convert.orbax.reading import one_for_each_source, plan_windows
from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.checkpoint import Reader
from layouts.orbax.arrays import NODES
from layouts.orbax.malloc import KEPT
from layouts.orbax.reader import OrbaxReader, ReadLimits
from layouts.orbax.stream import WINDOW
from layouts.orbax.windows import Windows
from layouts.tensors import itemsize

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

    @property
    def limits(self) -> ReadLimits:
        """The reader's part."""
        return ReadLimits(cache=self.cache, stream=self.stream, streams=self.streams, threads=max(2, self.jobs))

    def chunking(self, target: Target, reader: Reader) -> Chunking:
        """How an array is cut."""
        size, held = itemsize(target.spec.dtype), 0
        source = next(target.pieces(target.target.pattern.whole(target.sizes)), None)
        chunk = reader.chunks[source.source] if isinstance(reader, OrbaxReader) and source else None
        if isinstance(reader, OrbaxReader) and source and not streams(reader, source.source, self.stream):
            held = self.cache // 4
        return plan_chunks(target, chunk, max(1, self.box // size), held // size, max(1, self.grain // size))


class _Reading(NamedTuple):
    """What reading takes: bytes, and how many streams are open, which are among these."""

    nbytes: int
    streams: int


def streams(reader: OrbaxReader, name: str, above: int) -> bool:
    """Whether the chunks of a tensor are decoded piece by piece, if those above this size are."""
    return reader.streamable[name] and reader.chunk_bytes(name) > above


def orbax_budget(memory: int, jobs: int | None, plan: Plan, reader: Reader) -> OrbaxBudget:
    """The richest settings with which a conversion to Orbax stays within `memory` bytes.

    Raises:
        UsageError: none does; the message says how much the leanest need, and for which tensor.
    """
    wanted = jobs or min(8, len(os.sched_getaffinity(0)))
    base = BASE + EACH * (len(reader.tensors) + len(plan.targets)) + 2 * NODES
    largest = ""
    least = None
    settings = list(_settings(wanted, not isinstance(reader, OrbaxReader) or reader.use_ocdbt))
    if keep(plan, reader):
        return _keeping(settings[0], memory, base)
    kinds = list(_kinds(plan, reader))
    for budget in _windowed(settings, plan, reader, memory):
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
    raise UsageError(f"--memory of {memory >> 20} MiB is too little: {((least or 0) >> 20) + 1} MiB are needed{largest}")


def _windowed(settings: Sequence[OrbaxBudget], plan: Plan, reader: Reader, memory: int) -> Iterator[OrbaxBudget]:
    """The settings, with windows as large as can be where they help: without, all might be decoded for each tensor again."""
    if plan.format != "hf" or not isinstance(reader, OrbaxReader):
        yield from settings
        return
    targets = one_for_each_source(plan.targets)
    for part, budget in itertools.product(_PARTS, settings):
        yield replace(budget, windows=plan_windows(targets, reader, budget.box, memory // part))


def _keeping(richest: OrbaxBudget, memory: int, base: int) -> OrbaxBudget:
    """For chunks that nobody decodes."""
    each = HASHING + richest.box
    jobs = min(richest.jobs, (memory - base) // each)
    if jobs < 1:
        raise UsageError(f"--memory of {memory >> 20} MiB is too little: {(base + each >> 20) + 1} MiB are needed")
    return replace(richest, jobs=jobs, peak=base + jobs * each)


def _settings(jobs: int, use_ocdbt: bool) -> Iterator[OrbaxBudget]:
    for workers, part in [(jobs, 1), (jobs, 2), (jobs, 4), *((few, 4) for few in range(jobs - 1, 0, -1)), (1, 8)]:
        yield OrbaxBudget(
            jobs=workers,
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
        chunk = reader.chunks.get(source) if isinstance(reader, OrbaxReader) and source else None
        kind = (target.role, target.spec.shape, target.spec.dtype, target.source.pattern, target.target.pattern, chunk)
        if kind not in seen:
            seen.add(kind)
            yield target


def _reading(budget: OrbaxBudget, target: Target, reader: Reader) -> _Reading:
    """What the workers hold while they assemble boxes of a target, besides these."""
    chunking = budget.chunking(target, reader)
    sizes = target.target.pattern.stored(target.sizes)
    size, block = itemsize(target.spec.dtype), chunking.largest * itemsize(target.spec.dtype)
    if not isinstance(reader, OrbaxReader):
        return _Reading(budget.jobs * (SLAB + 2 * block), 0)
    spans = {axis: range(min(length, sizes[axis])) for axis, length in chunking.box.items()}
    decoded = loaded = streamed = 0
    for piece in target.pieces(spans):
        shape = target.source.pattern.shape({a: max(1, len(span)) for a, span in piece.source_box.items()})
        window = budget.windows.shapes.get(piece.source)
        count, elements = touched(reader.tensors[piece.source].shape, reader.chunks[piece.source], window or shape)
        if streams(reader, piece.source, budget.stream):
            streamed += 2 * count  # a box that is streamed waits for the one before it
        elif window:
            loaded += size * min(elements, budget.limits.at_once * math.prod(reader.chunks[piece.source]))
        else:
            decoded = max(decoded, elements * size)
    # A chunk is held compressed and decoded at once.
    return _Reading(budget.jobs * (2 * decoded + 2 * block) + 2 * loaded + streamed * WINDOW, streamed)


def _cache(budget: OrbaxBudget, reader: Reader) -> int:
    if not isinstance(reader, OrbaxReader):
        return 0
    whole = [reader.chunk_bytes(name) for name in reader.tensors if not streams(reader, name, budget.stream)]
    return max(budget.cache, 2 * max(whole, default=0) + 4096)


def _why(worst: str, cache: int, budget: OrbaxBudget, reader: Reader) -> str:
    if not isinstance(reader, OrbaxReader) or cache <= budget.cache:
        return f" for blocks of {worst}" if worst else ""
    name = max(
        (name for name in reader.tensors if not streams(reader, name, budget.stream)), key=reader.chunk_bytes, default=worst
    )
    chunk = math.prod(reader.chunks[name])
    return f": {name} is stored in chunks of {chunk} elements, of which two must be decoded as a whole"
