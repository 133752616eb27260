"""A change of layout as array operations: reshape, transpose, stack, slice, pad. Pure.

In: two patterns and their sizes, arrays of any library. Out: arrays in the other layout. It never computes a value.

The steps are those by which the patterns are read: a stored dimension is cut into its axes, padding is left out, what the names
hold is stacked, the axes are put in the order of the other pattern, padded, and joined.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convert.memory.turns import Operations, apart, chunks_apart, chunks_joined, joined
from convert.planning.loras import NOT_DIAGONAL
from convert.planning.targets import HALF
from layouts.language.cuts import padding
from layouts.language.layout import Placed
from layouts.language.parts import CHUNKS
from layouts.language.pattern import Pattern
from layouts.language.sections import ROWS, TENSOR, Turns
from layouts.language.template import Template

Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """How arrays are stored: the axes of their names, outermost first, and the pattern of each; sizes are logical."""

    named: tuple[str, ...]
    pattern: Pattern
    sizes: Sizes

    @property
    def order(self) -> list[str]:
        """All axes: those of the names first."""
        return [*self.named, *self.pattern.axes]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of each array."""
        return self.pattern.shape(dict(self.sizes))

    @property
    def grid(self) -> tuple[int, ...]:
        """How many arrays there are, along each axis of the names."""
        sizes = dict(self.sizes)
        return tuple(sizes[axis] for axis in self.named)

    @property
    def count(self) -> int:
        """How many arrays there are."""
        return math.prod(self.grid)


def side_of(placed: Placed, sizes: Mapping[str, int], grid: Collection[str]) -> Side:
    """A layout of arrays of which there is one for each point of those axes of `grid` that are in the names.

    Both halves of a rank become one axis, as a relay has them.
    """
    named, pattern = [slot for slot in placed.key.slots if slot in grid], placed.pattern
    if HALF in pattern.axes:
        pattern, sizes = Pattern(pattern.text.replace(f"({HALF} r)", "r")), {**sizes, "r": 2 * sizes["r"]}
    held = {axis: sizes[axis] for axis in (*named, *pattern.axes)}
    return Side(named=tuple(named), pattern=pattern, sizes=tuple(held.items()))


def rendered(key: Template, index: Mapping[str, Any], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """All names of a key that differ in the axes of the weight alone, in the order of their grid."""
    axes = [axis for axis in key.slots if axis in sizes]
    points = itertools.product(*(range(sizes[axis]) for axis in axes))
    return tuple(key.render({**index, **dict(zip(axes, point, strict=True))}) for point in points)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """One change of layout, the same for all layers: it can be hashed, so that it is compiled once.

    What is `diagonal` has gate and up apart on one side, and on the other as blocks of a matrix whose other blocks are zeros:
    along `r`, which is twice as long there, and along its columns. With `turns`, the rows of several tensors take turns in one:
    all of them are the sources, or the target is `tensor`.
    """

    source: Side
    target: Side
    diagonal: bool = False
    turns: Turns | None = None
    tensor: int | None = None

    def __call__(self, arrays: Sequence[Any], library: Operations) -> tuple[Any, ...]:
        """The target's arrays from the source's, in the order of their grid."""
        whole = self.whole(arrays, library)
        return tuple(whole[i : i + 1].reshape(self.target.shape) for i in range(self.target.count))

    def whole(self, arrays: Sequence[Any], library: Operations) -> Any:
        """The target's arrays as one, stacked in the order of their grid."""
        if self.diagonal:
            return self._spread(arrays, library)
        if self.turns:
            return self._turned(arrays, self.turns, library)
        whole = self._stacked([self._opened(array, library) for array in arrays], library)
        pattern, sizes = self.target.pattern, dict(self.target.sizes)
        order = self._kept
        for axis in sorted(pattern.reversed):
            whole = library.flip(whole, order.index(axis))
        stored = pattern.stored(sizes)
        if pattern.padding:
            room = {**sizes, **stored, **({"c": 1, "n": stored["c"] * stored["n"]} if pattern.width else {})}
            whole = library.pad(whole, [(0, room[axis] - size) for axis, size in _items(order, sizes)])
        if pattern.width:
            whole = chunks_apart(whole, order, pattern.width, library)
        return whole.reshape((self.target.count, *self.target.shape))

    def behind(self, array: Any) -> list[Any]:
        """The parts of a source that are padding, or off the diagonal, and must be zeros."""
        pattern, sizes = self.source.pattern, dict(self.source.sizes)
        whole = array.reshape(pattern.split(sizes))
        found = [whole[tuple(cut.get(axis, slice(None)) for axis in pattern.axes)] for cut in padding(pattern, sizes)]
        return found + self._off_diagonal(whole) if self.diagonal and not self._fuses else found

    @property
    def holes(self) -> str:
        """What a source should hold besides what is moved, in words; nothing where all of it is moved."""
        if self.diagonal and not self._fuses:
            return NOT_DIAGONAL
        pattern = self.source.pattern
        where = f"zeros behind the first {dict(self.source.sizes)} as '{pattern.text}' says"
        return f"{where}, and does not; is it in another layout?" if pattern.padding else ""

    @property
    def kinds(self) -> int:
        """How many sources in a row differ, each with its own number of rows."""
        return len(self.turns.parts) if self.turns and self.tensor is None else 1

    def _turned(self, arrays: Sequence[Any], turns: Turns, library: Operations) -> Any:
        """`whole` of tensors that take turns: each is re-laid alone."""
        if self.tensor is not None:
            rows = self.source.pattern.groups.index((ROWS,))
            arrays = [apart(array, turns, self.tensor, rows, library) for array in arrays]
            return replace(self, source=_of_rows(self.source, turns.size(self.tensor)), turns=None).whole(arrays, library)
        wholes = []
        for number in range(self.kinds):
            source, target = (_of_rows(side, turns.size(number)) for side in (self.source, self.target))
            one = replace(self, source=source, target=target, turns=None)
            wholes.append(one.whole(arrays[number :: self.kinds], library))
        return joined(wholes, turns, 1 + self.target.pattern.groups.index((ROWS,)), library)

    @property
    def _fuses(self) -> bool:
        return "g" in self.source.named

    def _spread(self, arrays: Sequence[Any], library: Operations) -> Any:
        """`whole` of what is block diagonal: gate and up each in their half of the rank, zeros in the other."""
        apart = self.source if self._fuses else self.target
        at, rank = apart.pattern.axes.index("r"), dict(apart.sizes)["r"]
        twice = replace(apart, sizes=tuple((axis, 2 * size if axis == "r" else size) for axis, size in apart.sizes))
        if self._fuses:
            rooms = [[(g * rank, (1 - g) * rank) if dim == at else (0, 0) for dim in range(len(apart.shape))] for g in range(2)]
            return replace(self, source=twice, diagonal=False).whole(list(map(library.pad, arrays, rooms)), library)
        parts = replace(self, target=twice, diagonal=False)(arrays, library)
        halves = [(*(slice(None),) * at, slice(g * rank, (g + 1) * rank)) for g in range(2)]
        return library.stack([part[half] for part, half in zip(parts, halves, strict=True)], 0)

    def _off_diagonal(self, whole: Any) -> list[Any]:
        """Gate's ranks in up's columns, and the other way round."""
        pattern, found = self.source.pattern, []
        half = dict(self.source.sizes)["r"] // 2
        for number, ranks in enumerate((slice(half), slice(half, None))):
            other = number if "g" in pattern.reversed else 1 - number
            cut = {"r": ranks, "g": slice(other, other + 1)}
            found.append(whole[tuple(cut.get(axis, slice(None)) for axis in pattern.axes)])
        return found

    def _opened(self, array: Any, library: Operations) -> Any:
        """A source with one dimension per axis, without padding, in the target's order."""
        pattern, sizes = self.source.pattern, dict(self.source.sizes)
        array = array.reshape(pattern.split(sizes))
        axes = list(pattern.axes)
        if pattern.width:
            array, axes = chunks_joined(array, axes, library)
        if pattern.padding:
            array = array[tuple(slice(sizes[axis]) for axis in axes)]
        for axis in sorted(pattern.reversed):
            array = library.flip(array, axes.index(axis))
        if (cut := self._chunks(self.source)) != (wanted := self._chunks(self.target)):
            others = [axis for axis in axes if axis not in CHUNKS]
            array = library.transpose(array, [axes.index(axis) for axis in (*others, *cut)])
            array = array.reshape((*(sizes[axis] for axis in others), *wanted.values()))
            axes = [*others, *wanted]
        array = array.reshape([size for axis, size in zip(axes, array.shape, strict=True) if axis in self.target.order])
        axes = [axis for axis in axes if axis in self.target.order]  # without dimensions of size 1 that only the source has
        return library.transpose(array, [axes.index(axis) for axis in self.target.order if axis in axes])

    def _stacked(self, parts: list[Any], library: Operations) -> Any:
        """All sources as one array, the axes of their names at the target's places."""
        sizes, order = dict(self.source.sizes), self._kept
        missing = list(self.source.named)
        while missing:
            axis = missing.pop()
            at = order.index(axis) - sum(order.index(other) < order.index(axis) for other in missing)
            step = sizes[axis]
            parts = [library.stack(parts[start : start + step], at) for start in range(0, len(parts), step)]
        return parts[0]

    @property
    def _kept(self) -> list[str]:
        """The target's axes without those of size 1 that only it has: it gets them with its shape."""
        only = set(self.target.pattern.fixed) - {*self.source.order, *CHUNKS}
        return [axis for axis in self.target.order if axis not in only]

    @staticmethod
    def _chunks(side: Side) -> dict[str, int]:
        """The axes into which `n` is cut, and their sizes, in their logical order."""
        sizes = dict(side.sizes)
        return {axis: sizes[axis] for axis in CHUNKS if axis in side.pattern.axes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One move: the names of leaves, the names of what they become, and how; by no relay if they only keep places."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    relay: Relay | None


def _of_rows(side: Side, rows: int) -> Side:
    """The same for one of several tensors, which has so many rows."""
    named = tuple(axis for axis in side.named if axis != TENSOR)
    sizes = tuple((axis, rows if axis == ROWS else size) for axis, size in side.sizes if axis != TENSOR)
    return replace(side, named=named, sizes=sizes)


def _items(order: Sequence[str], sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(axis, sizes[axis]) for axis in order]
