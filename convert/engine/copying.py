"""Write one tensor to its place in a file, strip by strip, and hash it on the way.

In: a target and its place in a file. Out: the bytes at that place, and digests. It never looks at other tensors.

A strip that lies in the source as it is wanted is taken as runs of bytes. Every other strip is assembled in memory. Both go to
the disk past the page cache. On other file systems the kernel copies the runs; a file server may do that within itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from convert.commit.manifest import SOURCE
from convert.engine.blocks import SLAB, assembled
from convert.engine.direct import Output, Scratch
from convert.planning.targets import Piece, Target
from layouts.language.pattern import Box, Pattern, strips
from layouts.reader import Reader
from layouts.tensors import itemsize


class Worker(NamedTuple):
    """What one thread works with: the input, and memory for one strip."""

    reader: Reader
    scratch: Scratch


class Run(NamedTuple):
    """Bytes of a source tensor that go to the output as they lie."""

    source: str
    start: int
    nbytes: int


def write_tensor(target: Target, path: Path, offset: int, worker: Worker, told: Callable[[int], None]) -> dict[str, str]:
    """Write a tensor at `offset` of a file, front to back; give its digest, and those of sources that it alone is made from.

    `told` is called with the bytes of each strip once it is written; it may raise to stop.
    """
    digest = xxhash.xxh3_128()
    sources: dict[str, str] = {}
    whole = target.moved and not set(target.target.key.slots) & set(target.source.pattern.axes)
    strip = max(1, worker.scratch.nbytes // itemsize(target.spec.dtype))
    told(0)
    with Output(path) as output:
        for box in target.target.pattern.strips(target.sizes, strip):
            for piece in target.pieces(box) if whole else ():
                if SOURCE + piece.source not in sources:
                    sources[SOURCE + piece.source] = _digest(worker.reader, piece.source)
            straight = runs(target, box)
            if straight is not None and all(worker.reader.extent(run.source) for run in straight):
                done = sum(_copy(run, worker, output, offset + at, digest) for run, at in _placed(straight))
            else:
                done = _assemble(target, box, worker, output, offset, digest)
            offset += done
            told(done)
    return {**sources, target.spec.name: digest.hexdigest()}


def runs(target: Target, box: Box) -> list[Run] | None:
    """The block `box` as runs of source bytes, neighbours merged, or None if it does not lie in the sources as it is wanted."""
    size = itemsize(target.spec.dtype)
    found: list[Run] = []
    filled = 0
    for piece in target.pieces(box):
        lengths = {axis: len(span) for axis, span in box.items()}
        local = {axis: range(s.start - box[axis].start, s.stop - box[axis].start) for axis, s in piece.target_box.items()}
        into = _start(target.target.pattern.axes, lengths, local)
        start = _start(target.source.pattern.axes, target.source.pattern.stored(target.source_sizes), piece.source_box)
        if start is None or into != filled or not _same_order(target, piece):
            return None
        count = math.prod(map(len, piece.source_box.values()))
        run = Run(piece.source, start * size, count * size)
        if found and found[-1].source == run.source and found[-1].start + found[-1].nbytes == run.start:
            run = Run(run.source, found[-1].start, found.pop().nbytes + run.nbytes)
        found.append(run)
        filled += count
    padded = target.source.pattern.padding or filled != math.prod(map(len, box.values()))
    return None if padded else found


def _start(axes: Sequence[str], sizes: Mapping[str, int], box: Box) -> int | None:
    """The position of the first element of a box that lies in one piece, or None if it does not."""
    start, cut = 0, False
    for axis in axes:
        if cut and len(box[axis]) < sizes[axis]:
            return None
        cut = cut or len(box[axis]) > 1
        start = start * sizes[axis] + box[axis].start
    return start


def _same_order(target: Target, piece: Piece) -> bool:
    def long(pattern: Pattern, box: Box) -> list[str]:
        return [axis for axis in pattern.axes if len(box[axis]) > 1]

    return long(target.source.pattern, piece.source_box) == long(target.target.pattern, piece.target_box)


def _placed(straight: Sequence[Run]) -> Iterator[tuple[Run, int]]:
    starts = itertools.accumulate((run.nbytes for run in straight), initial=0)
    yield from zip(straight, starts, strict=False)


def _copy(run: Run, worker: Worker, output: Output, offset: int, digest: xxhash.xxh3_128) -> int:
    """Hash a run where it is mapped, and write it."""
    reader, spec = worker.reader, worker.reader.tensors[run.source]
    flat = reader.read(run.source, (slice(None),) * len(spec.shape)).reshape(-1).view(np.uint8)
    data = flat[run.start : run.start + run.nbytes].data
    digest.update(data)
    done = 0
    if (extent := reader.extent(run.source)) and not output.passes_cache(run.nbytes):
        file, begin = extent
        done = output.copy(file, begin + run.start, run.nbytes, offset)
    if done < run.nbytes:
        output.put(worker.scratch.filled(data[done:], offset + done), offset + done)
    reader.release(run.source, _rows(spec.shape, run, itemsize(spec.dtype)))
    return run.nbytes


def _rows(shape: Sequence[int], run: Run, size: int) -> tuple[slice, ...]:
    """Slices of the tensor that cover a run."""
    if not shape:
        return ()
    row = max(1, size * math.prod(shape[1:]))
    return (slice(run.start // row, -(-(run.start + run.nbytes) // row)), *(slice(None),) * (len(shape) - 1))


def _assemble(target: Target, box: Box, worker: Worker, output: Output, offset: int, digest: xxhash.xxh3_128) -> int:
    with assembled(target, box, worker.reader, partial(worker.scratch.empty, offset=offset)) as block:
        data = block.reshape(-1).view(np.uint8).data
        digest.update(data)
        output.put(worker.scratch.filled(data, offset), offset)
        return len(data)


def _digest(reader: Reader, name: str) -> str:
    """Hash a source tensor; a small one stays in memory, because its copy comes next."""
    spec = reader.tensors[name]
    digest = xxhash.xxh3_128()
    for slices in strips(spec.shape, SLAB // itemsize(spec.dtype)):
        digest.update(reader.read(name, slices).reshape(-1).view(np.uint8).data)
        if spec.nbytes > SLAB // 2:
            reader.release(name, slices)
    return digest.hexdigest()
