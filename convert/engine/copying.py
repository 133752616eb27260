"""Write one tensor to its place in a file, strip by strip, and hash it on the way.

In: a target and its place in a file. Out: the bytes at that place, and digests. It never looks at other tensors.

A strip that lies in the source as it is wanted is read as runs of bytes. Every other strip is assembled in memory. Both go to
the disk past the page cache. On other file systems the kernel copies the runs; a file server may do that within itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from convert.commit.manifest import SOURCE
from convert.engine.blocks import SLAB, assembled
from convert.engine.direct import Output, Scratch
from convert.engine.runs import Run, Runs
from convert.errors import readable
from convert.planning.targets import Target
from layouts.disk.gather import Part, gather
from layouts.disk.pread import Extent
from layouts.language.pattern import Box, strips
from layouts.reader import Reader
from layouts.tensors import itemsize

Located = Sequence[tuple[Run, Extent]]
"""Runs, with where their sources are."""
SHORT = 16 << 10
"""Bytes below which a run costs less to write with its neighbours than a call that asks the kernel to copy it."""


class Worker(NamedTuple):
    """What one thread works with: the input, and memory for one strip and for one slab of a source.

    `sources` are hashed as well, unless they are computed: then no file has their bytes.
    """

    reader: Reader
    scratch: Scratch
    slab: Scratch
    runs: Runs
    sources: bool

    @classmethod
    def make(cls, reader: Reader, strip: int, *, sources: bool = True) -> Worker:
        """One for strips of this size."""
        return cls(reader, Scratch(strip), Scratch(SLAB), Runs(), sources)

    def source(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array for a slab; a new one where padding makes it larger than others."""
        fits = math.prod(shape) * dtype.itemsize <= self.slab.nbytes
        return self.slab.empty(shape, dtype, 0) if fits else np.empty(shape, dtype)


def write_together(
    parts: Sequence[tuple[Target, int]], output: Output, worker: Worker, told: Callable[[int], None]
) -> tuple[dict[str, str], list[tuple[Target, int]]]:
    """Write tensors of a file, each at its offset, if they are small and lie in their sources as they are wanted.

    Gives their digests, as `write_tensor` does for one, and what is left. They are read together, and neighbours are written
    at once: a call for each of 100,000 tensors takes longer than all of their bytes.
    """
    told(0)
    small: list[tuple[Target, int, int, Located]] = []
    left, room = [], worker.scratch.nbytes
    for target, offset in parts:
        nbytes = target.spec.nbytes
        runs = _located(worker.runs.of(target, target.way.whole), worker) if 0 < nbytes < SHORT else None
        if runs is None or nbytes > room:
            left.append((target, offset))
        else:
            small.append((target, offset, nbytes, runs))
            room -= nbytes
    small.sort(key=itemgetter(1))
    data = worker.scratch.empty((worker.scratch.nbytes - room,), np.uint8, small[0][1] if small else 0).data
    _read([run for *_, runs in small for run in runs], data)
    found: dict[str, str] = {}
    begin = end = 0
    for number, (target, offset, nbytes, runs) in enumerate(small, 1):
        at, end = end, end + nbytes
        if worker.sources and target.way.consumes:
            found |= _hashed(runs, data[at:end], worker)
        found[target.spec.name] = xxhash.xxh3_128_hexdigest(data[at:end])
        if number == len(small) or small[number][1] != offset + nbytes:
            output.put(data[begin:end], offset + begin - at)
            begin = end
    told(end)
    return found, left


def write_tensor(target: Target, output: Output, offset: int, worker: Worker, told: Callable[[int], None]) -> dict[str, str]:
    """Write a tensor at `offset` of a file, front to back; give its digest, and those of sources that it alone is made from.

    `told` is called with the bytes of each strip once it is written; it may raise to stop.
    """
    digest = xxhash.xxh3_128()
    sources: dict[str, str] = {}
    whole = worker.sources and target.way.consumes
    told(0)
    for box in _boxes(target, worker.scratch.nbytes):
        straight = _located(worker.runs.of(target, box), worker)
        short = straight is not None and all(run.nbytes < SHORT for run, _ in straight)
        if short and straight is not None:
            done = _gather(straight, worker, output, offset, digest, sources if whole else None)
        for name in _sources(target, box, straight) if whole else ():
            if SOURCE + name not in sources:
                sources[SOURCE + name] = _digest(worker, name)
        if straight is None:
            done = _assemble(target, box, worker, output, offset, digest)
        elif not short:
            done = sum(_copy(run, extent, worker, output, offset + at, digest) for run, extent, at in _placed(straight))
        offset += done
        told(done)
    return {**sources, target.spec.name: digest.hexdigest()}


def _boxes(target: Target, limit: int) -> Iterable[Box]:
    """The target in strips of at most `limit` bytes; as a whole if it is so small."""
    if 0 < target.spec.nbytes <= limit:
        return (target.way.whole,)
    return target.target.pattern.strips(target.sizes, max(1, limit // itemsize(target.spec.dtype)))


def _located(straight: Sequence[Run] | None, worker: Worker) -> Located | None:
    """Runs with where they are; None if one is decoded or computed."""
    if straight is None:
        return None
    found, extent = list[tuple[Run, Extent]](), worker.reader.extent
    for run in straight:
        if (at := extent(run.source)) is None:
            return None
        found.append((run, at))
    return found


def _sources(target: Target, box: Box, straight: Located | None) -> Iterator[str]:
    """What a block is made from."""
    if straight is None:
        yield from (piece.source for piece in target.pieces(box))
    else:
        yield from (run.source for run, _ in straight)


def _gather(
    straight: Located,
    worker: Worker,
    output: Output,
    offset: int,
    digest: xxhash.xxh3_128,
    sources: dict[str, str] | None,
) -> int:
    """Read short runs behind one another, and write them at once: a checkpoint may have 100,000 of a few bytes each.

    Those that are whole sources are hashed on the way, if `sources` are wanted.
    """
    nbytes = sum(run.nbytes for run, _ in straight)
    data = worker.scratch.empty((nbytes,), np.uint8, offset).data
    _read(straight, data)
    if sources is not None:
        sources |= _hashed(straight, data, worker)
    digest.update(data)
    output.put(data, offset)
    return nbytes


def _read(straight: Located, data: memoryview) -> None:
    """Read runs one behind the other."""
    ends = itertools.accumulate((run.nbytes for run, _ in straight), initial=0)
    placed = zip(straight, ends, strict=False)
    gather((Part(file, at + start, nbytes, end) for ((_, start, nbytes), (file, at)), end in placed), data)


def _hashed(straight: Located, data: memoryview, worker: Worker) -> dict[str, str]:
    """The digests of those runs, one behind the other in memory, that are whole sources."""
    found, end, specs = dict[str, str](), 0, worker.reader.tensors
    for (source, _, nbytes), _ in straight:
        at, end = end, end + nbytes
        if nbytes == specs[source].nbytes:
            found[SOURCE + source] = xxhash.xxh3_128_hexdigest(data[at:end])
    return found


def _placed(straight: Located) -> Iterator[tuple[Run, Extent, int]]:
    starts = itertools.accumulate((run.nbytes for run, _ in straight), initial=0)
    yield from ((run, extent, at) for (run, extent), at in zip(straight, starts, strict=False))


def _copy(run: Run, extent: Extent, worker: Worker, output: Output, offset: int, digest: xxhash.xxh3_128) -> int:
    """Read a run, hash it, and write it; the kernel copies what would go through the page cache."""
    begin = extent.start + run.start
    data = worker.scratch.empty((run.nbytes,), np.uint8, offset).data
    extent.file.read(data, begin)
    digest.update(data)
    done = 0
    if extent.file.descriptor is not None and not output.passes_cache(run.nbytes):
        done = output.copy(extent.file.descriptor, begin, run.nbytes, offset)
    if done < run.nbytes:
        output.put(data[done:], offset + done)
    return run.nbytes


def _assemble(target: Target, box: Box, worker: Worker, output: Output, offset: int, digest: xxhash.xxh3_128) -> int:
    block = assembled(target, box, worker.reader, partial(worker.scratch.empty, offset=offset), worker.source)
    data = block.reshape(-1).view(np.uint8).data
    digest.update(data)
    output.put(worker.scratch.filled(data, offset), offset)
    return len(data)


def _digest(worker: Worker, name: str) -> str:
    """Hash a source tensor; the page cache has it when its copy comes next."""
    spec = worker.reader.tensors[name]
    digest = xxhash.xxh3_128()
    for slices in strips(spec.shape, SLAB // itemsize(spec.dtype)):
        with readable(worker.reader.path):
            block = worker.reader.read(name, slices, worker.source)
        digest.update(block.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
