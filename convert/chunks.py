"""Cut a target tensor into the chunks of a stored array, and put them in an order that decodes every source chunk once. Pure.

A stored chunk is decoded as a whole, however little of it is wanted. So the target is walked cell by cell, where a cell is what
one chunk of each source holds; a chunk of the target never spans two cells. Checkpoints of large training runs are chunked as
their parameters were sharded, for instance along `k`; then this is not the order in which the target lies in storage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from convert.planner import Target
from layouts.pattern import Box, Pattern

_CRUMB = 1 << 18
"""Elements that a chunk should have at least, if need be by holding several experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """Sizes of cells and, dividing them, of chunks: one entry per axis of the target's pattern."""

    target: Target
    cell: Mapping[str, int]
    chunk: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The chunk as a block of the stored tensor."""
        return self.target.target.pattern.shape(self.chunk)

    @property
    def held(self) -> int:
        """Elements that must stay decoded until a cell is done; none if a cell is a single chunk."""
        return 0 if self.cell == self.chunk else math.prod(self.cell.values())

    def boxes(self) -> Iterator[dict[str, range]]:
        """Every chunk of the target once, cell by cell."""
        axes, sizes = self.target.target.pattern.axes, self.target.sizes
        for cell in itertools.product(*(_parts(range(sizes[axis]), self.cell[axis]) for axis in axes)):
            steps = (_parts(span, self.chunk[axis]) for axis, span in zip(axes, cell, strict=True))
            for spans in itertools.product(*steps):
                yield dict(zip(axes, spans, strict=True))

    def in_order(self) -> bool:
        """Whether the chunks, one after another, are the bytes of the tensor in storage order."""
        axes, sizes = self.target.target.pattern.axes, self.target.sizes
        position = 0
        for box in self.boxes():
            if _start(axes, sizes, box) != position:
                return False
            lengths = [len(box[axis]) for axis in axes]
            first = next((i for i, length in enumerate(lengths) if length > 1), len(axes))
            if any(length != sizes[axis] for axis, length in zip(axes[first + 1 :], lengths[first + 1 :], strict=True)):
                return False
            position += math.prod(lengths)
        return True


def plan_chunks(target: Target, source_chunk: Sequence[int], limit: int, held: int) -> Chunking:
    """Choose chunks of at most `limit` elements: for expert tensors one expert of one layer, or a part of its rows.

    Source chunks that hold small parts of many experts (Orbax cuts the longest axes first) are joined along the rows to cells
    of up to `held` elements, which must stay decoded together; else the chunks of the target would be crumbs.
    """
    axes, sizes = target.target.pattern.axes, target.sizes
    source = _split_chunk(target.source.pattern, sizes, source_chunk)
    composed = {axis for group in target.target.pattern.groups if len(group) > 1 for axis in group}
    cell = {axis: source.get(axis, sizes[axis]) for axis in axes}
    cell |= {axis: sizes[axis] for axis in composed if sizes[axis] % cell[axis]}
    whole = {"k", "n", "g"} if target.role != "verbatim" else set(axes)
    for axis in (axis for axis in reversed(axes) if axis in whole and target.role != "verbatim"):
        room = max(1, held // math.prod(cell.values()))
        times = -(-sizes[axis] // cell[axis])
        cell[axis] = min(sizes[axis], cell[axis] * (times if times <= room else _divisor(times, room)))
    chunk = {axis: cell[axis] if axis in whole else 1 for axis in axes}
    _keep_blocks(target.target.pattern, sizes, chunk)
    for axis in axes:
        rest = math.prod(chunk.values()) // chunk[axis]
        if rest * chunk[axis] > limit:
            divisor = _divisor(cell[axis], max(1, limit // rest))
            if divisor * 2 <= limit // rest and axis not in composed:
                # Nothing near the wanted length divides the cell: rather read source chunks twice than write crumbs.
                cell[axis], divisor = sizes[axis], limit // rest
            chunk[axis] = divisor
            _keep_blocks(target.target.pattern, sizes, chunk)
    for axis in reversed(axes):
        if axis not in whole and (room := min(limit, _CRUMB) // math.prod(chunk.values())) > 1:
            chunk[axis] = _divisor(cell[axis], room)
    return Chunking(target=target, cell=cell, chunk=chunk)


def _split_chunk(pattern: Pattern, sizes: Mapping[str, int], chunk: Sequence[int]) -> dict[str, int]:
    """How far one stored chunk reaches along each axis; axes of a composed dimension that it cuts askew count as whole."""
    found: dict[str, int] = {}
    for group, length in zip(pattern.groups, chunk, strict=True):
        for axis in reversed(group):
            fits = length >= sizes[axis] or (len(group) > 1 and sizes[axis] % length)
            found[axis] = sizes[axis] if fits else length
            length = max(1, length // sizes[axis])
    return found


def _keep_blocks(pattern: Pattern, sizes: Mapping[str, int], chunk: dict[str, int]) -> None:
    """A part of an inner axis of a composed dimension is one block only together with a single step of the outer ones."""
    for group in pattern.groups:
        for outer, inner in itertools.combinations(group, 2):
            if chunk[inner] < sizes[inner]:
                chunk[outer] = 1


def _divisor(number: int, most: int) -> int:
    return next(step for step in range(min(most, number), 0, -1) if number % step == 0)


def _parts(span: range, step: int) -> list[range]:
    return [range(start, min(start + step, span.stop)) for start in range(span.start, span.stop, step)]


def _start(axes: Sequence[str], sizes: Mapping[str, int], box: Box) -> int:
    start = 0
    for axis in axes:
        start = start * sizes[axis] + box[axis].start
    return start
