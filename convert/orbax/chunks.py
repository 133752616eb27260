"""Cut a target tensor into boxes that are assembled one by one, and into the chunks that Orbax stores. Pure.

In: a target and the chunks of its source. Out: cells, boxes and chunks. It never reads or writes them.

A stored chunk is decoded as a whole, however little of it is wanted. So the target is walked cell by cell, where a cell is what
one chunk of each source holds; a box never spans two cells. Checkpoints of large training runs are chunked as their parameters
were sharded, for instance along `k`; then this is not the order in which the target lies in storage. The chunks that are
stored divide the boxes: small enough that a restore onto many devices reads little more than its part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from convert.planning.targets import Target
from layouts.language.parts import CHUNKS
from layouts.language.pattern import Pattern

_CRUMB = 1 << 18
"""Elements that a box should have at least, if need be by holding several experts."""
_CRUMBS = 64
"""Of a chunk of the usual size: what is smaller is not cut for a mesh, as a restore reads it at once whatever its part is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunking:
    """Sizes of cells; dividing them, of boxes; dividing these, of chunks: an entry per axis of the pattern, padding and all."""

    target: Target
    cell: Mapping[str, int]
    box: Mapping[str, int]
    chunk: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The chunk as a block of the stored tensor."""
        return tuple(math.prod(self.chunk[axis] for axis in group) for group in self.target.target.pattern.groups)

    @property
    def held(self) -> int:
        """Elements that must stay decoded until a cell is done; none if a cell is a single box."""
        return 0 if self.cell == self.box else math.prod(self.cell.values())

    @property
    def largest(self) -> int:
        """Elements of a box."""
        return math.prod(self.box.values())

    def boxes(self, rows: range | None = None) -> Iterator[dict[str, range]]:
        """Every box of the target once, padding and all, cell by cell; with `rows`, those of this part of the first axis."""
        sizes = _stored(self.target)
        whole = {axis: range(size) for axis, size in sizes.items()}
        if rows is not None:
            whole[next(iter(whole))] = rows
        for cell in itertools.product(*(_parts(span, self.cell[axis]) for axis, span in whole.items())):
            steps = (_parts(span, self.box[axis]) for axis, span in zip(sizes, cell, strict=True))
            for spans in itertools.product(*steps):
                yield dict(zip(sizes, spans, strict=True))

    def in_order(self) -> bool:
        """Whether the boxes, one after another, are the bytes of the tensor in storage order."""
        sizes = _stored(self.target)
        axes = list(sizes)
        if any(self.cell[b] < sizes[b] and self.cell[a] > 1 for a, b in itertools.combinations(axes, 2)):
            return False
        return not any(self.box[b] < self.cell[b] and self.box[a] > 1 for a, b in itertools.combinations(axes, 2))


def plan_chunks(
    target: Target,
    source_chunk: Sequence[int] | None,
    limit: int,
    held: int,
    grain: int,
    cuts: Sequence[int] = (),
) -> Chunking:
    """Choose boxes of at most `limit` elements: for expert tensors one expert of one layer, or a part of its rows.

    Any part of a source without chunks can be read alone. Source chunks that hold small parts of many experts (Orbax cuts the
    longest axes first) are joined along the rows to cells of up to `held` elements, which must stay decoded together; else
    the chunks of the target would be crumbs. Chunks have about `grain` elements, if the lengths can be halved that far, and end
    where the stored dimensions are cut into `cuts` equal parts.
    """
    pattern, sizes = target.target.pattern, _stored(target)
    axes = tuple(sizes)
    if not math.prod(sizes.values()):
        some = {axis: max(1, size) for axis, size in sizes.items()}
        return Chunking(target=target, cell=some, box=some, chunk=some)
    source = {} if source_chunk is None else _reach(target, source_chunk)
    composed = {axis for group in pattern.groups if len(group) > 1 for axis in group}
    cell = {axis: min(source.get(axis, sizes[axis]), sizes[axis]) for axis in axes}
    cell |= {axis: sizes[axis] for axis in composed if sizes[axis] % cell[axis]}
    whole = {"k", "g", *CHUNKS} if target.role != "verbatim" else set(axes)
    for axis in (axis for axis in reversed(axes) if axis in whole and target.role != "verbatim"):
        room = max(1, held // math.prod(cell.values()))
        times = -(-sizes[axis] // cell[axis])
        cell[axis] = min(sizes[axis], cell[axis] * (times if times <= room else _divisor(times, room)))
    box = {axis: cell[axis] if axis in whole else 1 for axis in axes}
    _keep_blocks(pattern, sizes, box)
    for axis in axes:
        rest = math.prod(box.values()) // box[axis]
        if rest * box[axis] > limit:
            divisor = _divisor(cell[axis], max(1, limit // rest))
            if divisor * 2 <= limit // rest and axis not in composed:
                # Nothing near the wanted length divides the cell: rather read source chunks twice than write crumbs.
                cell[axis], divisor = sizes[axis], limit // rest
            box[axis] = divisor
            _keep_blocks(pattern, sizes, box)
    for axis in reversed(axes):
        if axis not in whole and (room := min(limit, _CRUMB) // math.prod(box.values())) > 1:
            box[axis] = _divisor(cell[axis], room)
    if axes and (source_chunk is None or axes[0] not in target.source.pattern.axes):
        cell[axes[0]] = box[axes[0]]  # no chunk reaches along it, so that the array can be cut there
    chunk = _grid(pattern, sizes, box, source, grain)
    return Chunking(target=target, cell=cell, box=box, chunk=_in_parts(pattern, sizes, box, chunk, cuts, grain))


def _stored(target: Target) -> dict[str, int]:
    return target.target.pattern.stored(target.sizes)


def _reach(target: Target, chunk: Sequence[int]) -> dict[str, int]:
    """How far one stored chunk of the source reaches along each axis that both sides cut alike."""
    pattern, sizes = target.source.pattern, target.source.pattern.stored(target.source_sizes)
    found = _split_chunk(pattern, sizes, chunk)
    uneven = {*pattern.axes, *target.target.pattern.axes} & set(CHUNKS[:2]) or pattern.padding or target.target.pattern.padding
    return {axis: length for axis, length in found.items() if not (uneven and axis in CHUNKS)}


def _split_chunk(pattern: Pattern, sizes: Mapping[str, int], chunk: Sequence[int]) -> dict[str, int]:
    """How far one stored chunk reaches along each axis; axes of a composed dimension that it cuts askew count as whole."""
    found: dict[str, int] = {}
    for group, length in zip(pattern.groups, chunk, strict=True):
        for axis in reversed(group):
            fits = length >= sizes[axis] or (len(group) > 1 and sizes[axis] % length)
            found[axis] = sizes[axis] if fits else length
            length = max(1, length // sizes[axis])
    return found


def _grid(
    pattern: Pattern, sizes: Mapping[str, int], box: Mapping[str, int], source: Mapping[str, int], grain: int
) -> dict[str, int]:
    """The chunk: a box, cut where the source was, then halved along its longest dimension until it has `grain` elements."""
    chunk = dict(box) | {axis: 1 for axis in box if axis == "s"}  # each shard is read by another device
    as_source = {axis: s if (s := source.get(axis, size)) < size and size % s == 0 else size for axis, size in chunk.items()}
    if math.prod(as_source.values()) >= grain // 16:
        chunk = as_source
    _keep_blocks(pattern, sizes, chunk)
    while math.prod(chunk.values()) > grain:
        lengths = {group: math.prod(chunk[axis] for axis in group) for group in pattern.groups}
        for group in sorted(lengths, key=lambda group: -lengths[group]):
            # Outer axes first: a part of an inner one is a block only within a single step of these.
            axis = next((axis for axis in group if chunk[axis] > 1), None)
            if axis is not None and chunk[axis] % 2 == 0:
                chunk[axis] //= 2
                break
        else:
            break
    _keep_blocks(pattern, sizes, chunk)
    return chunk


def _in_parts(
    pattern: Pattern,
    sizes: Mapping[str, int],
    box: Mapping[str, int],
    chunk: Mapping[str, int],
    cuts: Sequence[int],
    grain: int,
) -> Mapping[str, int]:
    """The chunk, made to end where each of these parts of a dimension ends; as it was, where only crumbs would do."""
    found = dict(chunk)
    for group, count in zip(pattern.groups, cuts, strict=False):
        part = math.prod(sizes[axis] for axis in group) // count
        if part % math.prod(found[axis] for axis in group):
            found |= dict.fromkeys(group, 1)
            found[group[-1]] = _divisor(math.gcd(box[group[-1]], part), chunk[group[-1]])
    return found if math.prod(found.values()) >= grain // _CRUMBS else chunk


def _keep_blocks(pattern: Pattern, sizes: Mapping[str, int], chunk: dict[str, int]) -> None:
    """A part of an inner axis of a composed dimension is one block only together with a single step of the outer ones."""
    for group in pattern.groups:
        for outer, inner in itertools.combinations(group, 2):
            if chunk[inner] < sizes[inner]:
                chunk[outer] = 1


def touched(shape: Sequence[int], chunk: Sequence[int], block: Sequence[int]) -> tuple[int, int]:
    """How many chunks a block of an array can lie in, wherever it begins, and the elements of all of them."""
    counts = [min(-(-size // c), (length + c - 2) // c + 1) for size, c, length in zip(shape, chunk, block, strict=True)]
    return math.prod(counts), math.prod(count * c for count, c in zip(counts, chunk, strict=True))


def _divisor(number: int, most: int) -> int:
    return next(step for step in range(min(most, number), 0, -1) if number % step == 0)


def _parts(span: range, step: int) -> list[range]:
    return [range(start, min(start + step, span.stop)) for start in range(span.start, span.stop, max(1, step))]
