"""Which bytes of the sources a block consists of, where it lies in them as it is wanted.

In: a target, a block of it. Out: runs of bytes, or None if values have to be put in another order. It never reads.

A checkpoint may have 100,000 small tensors that come about in a few hundred ways. How far the axes of a source are apart, and
whether its bytes lie as they are wanted, is the same for all tensors of a way: `Runs` finds it once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from convert.engine.blocks import first_of, lies_alike
from convert.planning.targets import Target, Way
from layouts.language.pattern import Box
from layouts.tensors import itemsize


class Run(NamedTuple):
    """Bytes of a source tensor that go to the output as they lie."""

    source: str
    start: int
    nbytes: int


def runs(target: Target, box: Box) -> list[Run] | None:
    """The block `box` as runs of source bytes, neighbours merged, or None if it does not lie in the sources as it is wanted."""
    size = itemsize(target.spec.dtype)
    found: list[Run] = []
    filled = 0
    for piece in target.pieces(box):
        lengths = {axis: len(span) for axis, span in box.items()}
        local = {axis: range(s.start - box[axis].start, s.stop - box[axis].start) for axis, s in piece.target_box.items()}
        start = lies_alike(target, piece)
        if start is None or first_of(target.target.pattern.axes, lengths, local) != filled:
            return None
        count = math.prod(map(len, piece.source_box.values()))
        found.append(Run(piece.source, start * size, count * size))
        filled += count
    return _merged(found) if filled == math.prod(map(len, box.values())) else None


def _merged(found: Iterable[Run]) -> list[Run]:
    kept: list[Run] = []
    for run in found:
        if kept and kept[-1].source == run.source and kept[-1].start + kept[-1].nbytes == run.start:
            kept[-1] = Run(run.source, kept[-1].start, kept[-1].nbytes + run.nbytes)
        else:
            kept.append(run)
    return kept


class _Steps(NamedTuple):
    """Whole targets of a way, by their indices: the sources at each point of `spans`, in elements of `each` piece."""

    axes: Sequence[str]
    spans: Sequence[range]
    turned: Mapping[str, int]
    """Axes that the source has in another direction, with their last position."""
    strides: Sequence[tuple[str, int]]
    """The axes of the source along which a piece may begin elsewhere, and how many elements a step is."""
    each: int
    known: dict[tuple[object, ...], str]
    """Names of single sources, by what stands in them: many tensors may be parts of one."""


class Runs:
    """The runs of blocks of any targets; what is the same for a way, is kept."""

    def __init__(self) -> None:
        self._steps: dict[int, tuple[Way, _Steps | None]] = {}

    def of(self, target: Target, box: Box) -> list[Run] | None:
        """As `runs`, and quicker if the block is `target.way.whole`."""
        way = target.way
        if box is not way.whole or way.is_cut:
            return runs(target, box)
        if id(way) not in self._steps:  # the way is kept with it, so that no other one can have its place
            self._steps[id(way)] = way, None if runs(target, box) is None else _steps(way, box)
        steps = self._steps[id(way)][1]
        return None if steps is None else _whole(target, steps)


def _steps(way: Way, box: Box) -> _Steps:
    source, stored = way.source.pattern.axes, way.source.pattern.stored(way.source_sizes)
    axes = [axis for axis in box if axis in way.source.key.slots or axis in way.turned]
    strides = {axis: math.prod(stored[inner] for inner in source[at + 1 :]) for at, axis in enumerate(source)}
    return _Steps(
        axes=axes,
        spans=[box[axis] for axis in axes],
        turned={axis: way.last(axis) for axis in way.turned},
        strides=[(axis, step) for axis, step in strides.items() if axis in axes or axis not in box],
        each=math.prod(len(span) for axis, span in box.items() if axis not in axes),
        known={},
    )


def _whole(target: Target, steps: _Steps) -> list[Run]:
    size, key, index = itemsize(target.spec.dtype), target.source.key, target.index
    nbytes = steps.each * size
    if steps.turned:
        index = {axis: steps.turned[axis] - int(at) if axis in steps.turned else at for axis, at in index.items()}
    begin = sum(step * int(index[axis]) for axis, step in steps.strides if axis in index and axis not in steps.axes)
    if not steps.axes:
        at = tuple(map(index.get, key.slots))
        if (name := steps.known.get(at)) is None:
            name = steps.known[at] = key.render(index)
        return [Run(name, begin * size, nbytes)]
    spans = {axis: _turned(span, steps.turned.get(axis)) for axis, span in zip(steps.axes, steps.spans, strict=True)}
    apart = dict(steps.strides)
    places = itertools.product(*([apart.get(axis, 0) * at for at in span] for axis, span in spans.items()))
    names = key.names(index, spans)
    return _merged(Run(name, (begin + sum(place)) * size, nbytes) for name, place in zip(names, places, strict=True))


def _turned(span: range, last: int | None) -> range:
    return span if last is None else range(last - span.start, last - span.stop, -1)
