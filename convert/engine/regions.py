"""Fill any part of a target tensor, however it cuts the dimensions: what a device holds of it.

In: a target, a slice of each stored dimension, an open input. Out: the bits of that part, in the caller's memory. It reads the
sources of this part alone, and never computes a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.engine.blocks import assembled, copy_block
from convert.engine.copying import Worker
from convert.planning.targets import Target
from layouts.disk.pread import Empty
from layouts.language.pattern import Box, Pattern
from layouts.tensors import itemsize

_DOTS: Any = ...
"""They keep a single element an array."""


def fill(target: Target, slices: Sequence[slice], out: NDArray[Any], worker: Worker, told: Callable[[int], None]) -> None:
    """Fill `out`, bits in C order, with this part; `told` hears of the bytes as they come, and may raise to stop.

    Raises:
        InputError: data of the input cannot be read.
    """
    if not out.size:
        return
    pattern, limit = target.target.pattern, max(1, worker.scratch.nbytes // itemsize(target.spec.dtype))
    for inside, box in _boxes(pattern, pattern.stored(target.sizes), slices):
        whole = out[(*inside, _DOTS)].reshape([len(box[axis]) for axis in pattern.axes])  # cut, never joined: a view
        for part in _parts(box, pattern.axes, limit):
            spans = ((part[axis], box[axis].start) for axis in pattern.axes)
            here = whole[(*(slice(span.start - start, span.stop - start) for span, start in spans), _DOTS)]
            block = assembled(target, part, worker.reader, _memory(here, worker), worker.source)
            if not np.may_share_memory(block, here):
                copy_block(here, block)
            told(here.nbytes)


def _memory(here: NDArray[Any], worker: Worker) -> Empty:
    """Memory for a part: its own place, where that is in one piece."""
    if here.flags.c_contiguous:
        return lambda shape, _: here.reshape(shape)
    return partial(worker.scratch.empty, offset=0)


def _boxes(pattern: Pattern, stored: Mapping[str, int], slices: Sequence[slice]) -> Iterator[tuple[tuple[slice, ...], Box]]:
    """The boxes that a slice of each stored dimension consists of, and where each is in what the slices give."""
    found: list[tuple[tuple[slice, ...], Box]] = [((), {})]
    for group, part in zip(pattern.groups, slices, strict=True):
        span = range(*part.indices(math.prod(stored[axis] for axis in group)))
        runs = [(slice(run.start - span.start, run.stop - span.start), box) for run, box in _runs(group, stored, span)]
        found = [((*inside, run), {**whole, **box}) for inside, whole in found for run, box in runs]
    yield from found


def _runs(group: Sequence[str], stored: Mapping[str, int], span: range) -> Iterator[tuple[range, dict[str, range]]]:
    """Cut a run of a composed dimension into parts that are a range of each of its axes."""
    first, *rest = group
    inner, at = math.prod(stored[axis] for axis in rest), span.start
    while at < span.stop:
        number, offset = divmod(at, inner)
        if count := 0 if offset else (span.stop - at) // inner:
            stop = at + count * inner
            yield range(at, stop), {first: range(number, number + count), **{axis: range(stored[axis]) for axis in rest}}
        else:
            base = number * inner
            stop = min(span.stop, base + inner)
            for run, box in _runs(rest, stored, range(offset, stop - base)):
                yield range(base + run.start, base + run.stop), {first: range(number, number + 1), **box}
        at = stop


def _parts(box: Box, axes: Sequence[str], limit: int) -> Iterator[Box]:
    """Cut a box into parts of at most `limit` elements, along outer axes first."""
    count = math.prod(map(len, box.values()))
    if count <= limit:
        yield box
        return
    axis = next(axis for axis in axes if len(box[axis]) > 1)
    span = box[axis]
    step = max(1, limit * len(span) // count)
    for start in range(span.start, span.stop, step):
        yield from _parts({**box, axis: range(start, min(start + step, span.stop))}, axes, limit)
