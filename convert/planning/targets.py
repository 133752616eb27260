"""A tensor of the output, and the block copies that fill it. Pure.

In: two layouts and their sizes. Out: block copies. It never reads or writes a block.

There is one operation, whatever the two layouts are: a target block and a source block are viewed along the same axes and one
is copied into the other. A `Way` therefore only holds both layouts and their sizes; `pieces` of a target derives the copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from layouts.language.cuts import CUT, chunks, ends, place
from layouts.language.layout import Placed
from layouts.language.pattern import Box, Pattern, identity
from layouts.language.sections import ROWS, TENSOR, Turns
from layouts.language.slots import Index
from layouts.language.template import Template
from layouts.tensors import TensorSpec

OTHER, LORA = "other", "lora"
"""The roles of what is no expert weight and is re-laid all the same: between formats, and A and B of gate and up."""
HALF = "half"
"""The axis of gate's and of up's half of the rank of a B that is block diagonal: it has zeros where this is not their `g`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One block copy: `source_box` of the tensor `source` goes to `target_box` of the target. The boxes have equal lengths.

    Of sources that take turns it is the one with this `number` (`Way.stored`).
    """

    source: str
    source_box: Box
    target_box: Box
    number: int = 0


@dataclass(frozen=True, kw_only=True)
class Way:
    """How tensors of the output come about that differ in their names alone, as those of the experts of a layer.

    There may be 100,000 tensors, and a few hundred ways. `sizes` are those of a tensor's axes, `source_sizes` the sources'.
    `role` is `wi`, `wo`, `verbatim`, or `other` for tensors that only the other format has otherwise; `part` names a companion,
    such as a bias or a scale. If several values are in an element, it is `packed`: in and out keep their order. With `turns`,
    one side has several tensors of what the other has as one; `source_sizes` are those of the first, `parts` their patterns
    where these differ.
    """

    role: str
    part: str = ""
    dims: str = ""
    sizes: Mapping[str, int]
    source_sizes: Mapping[str, int]
    source: Placed
    target: Placed
    packed: bool = False
    turns: Turns | None = None
    parts: tuple[Pattern, ...] = ()

    @cached_property
    def stored(self) -> tuple[tuple[Pattern, Mapping[str, int]], ...]:
        """How sources are stored, with their sizes: all alike, or each of those that take turns."""
        if not self.turns or TENSOR not in self.source.key.slots:
            return ((self.source.pattern, self.source_sizes),)
        several = range(len(self.turns.parts))
        patterns = self.parts or (self.source.pattern,) * len(several)
        return tuple((patterns[at], {**self.source_sizes, ROWS: self.turns.size(at)}) for at in several)

    @cached_property
    def moved(self) -> bool:
        """Whether anything but the name's place in a file changes."""
        return self.source != self.target

    @cached_property
    def diagonal(self) -> bool:
        """Whether one side has gate and up apart, and the other as blocks of a matrix whose other blocks are zeros."""
        return (HALF in self.source.pattern.axes) != (HALF in self.target.pattern.axes)

    @cached_property
    def whole(self) -> Box:
        """The box that is a whole tensor, padding and all."""
        return self.target.pattern.whole(self.sizes)

    @cached_property
    def ends(self) -> Mapping[str, int]:
        """Where the axes of the target end without their padding."""
        return ends(self.target.pattern, self.sizes)

    @cached_property
    def turned(self) -> frozenset[str]:
        """Axes that the source has in another direction."""
        return self.source.pattern.reversed ^ self.target.pattern.reversed

    @cached_property
    def is_cut(self) -> bool:
        """Whether `n` is cut into shards or chunks on either side, or rows into sections."""
        return self.turns is not None or any(axis in side.pattern.axes for axis in CUT for side in (self.source, self.target))

    @cached_property
    def consumes(self) -> bool:
        """Whether all of each source goes into one tensor, which is another than it."""
        return self.moved and not set(self.target.key.slots) & set(self.source.pattern.axes)

    def last(self, axis: str) -> int:
        """The last position of an axis."""
        return self.sizes.get(axis, self.source_sizes.get(axis, 0)) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A tensor of the output. `index` is where its name puts it; all else it shares with others of its `way`."""

    spec: TensorSpec
    index: Index
    way: Way

    @property
    def role(self) -> str:
        """See `Way`."""
        return self.way.role

    @property
    def part(self) -> str:
        """See `Way`."""
        return self.way.part

    @property
    def dims(self) -> str:
        """See `Way`."""
        return self.way.dims

    @property
    def sizes(self) -> Mapping[str, int]:
        """See `Way`."""
        return self.way.sizes

    @property
    def source_sizes(self) -> Mapping[str, int]:
        """See `Way`."""
        return self.way.source_sizes

    @property
    def source(self) -> Placed:
        """See `Way`."""
        return self.way.source

    @property
    def target(self) -> Placed:
        """See `Way`."""
        return self.way.target

    @property
    def packed(self) -> bool:
        """See `Way`."""
        return self.way.packed

    @property
    def moved(self) -> bool:
        """See `Way`."""
        return self.way.moved

    def pieces(self, box: Box) -> Iterator[Piece]:
        """The block copies that fill `box`, a range for each axis of the target's pattern; what they leave out is zeros.

        Axes that the source keeps in its names, or in another direction, are taken one by one.
        """
        real = {axis: range(span.start, min(span.stop, self.way.ends[axis])) for axis, span in box.items()}
        if not all(map(len, real.values())):
            return
        full = {axis: range(at, at + 1) for axis, at in self.index.items() if isinstance(at, int)} | real
        ones = {axis: range(1) for axis, size in self.source.pattern.fixed.items() if size == 1}
        turned, slots = self.way.turned, self.source.key.slots
        single = [axis for axis in full if axis in slots or axis in turned or axis == HALF]
        for point in itertools.product(*(full[axis] for axis in single)):
            here = full | {axis: range(i, i + 1) for axis, i in zip(single, point, strict=True)}
            there = {**ones, **here, **{axis: self._turn(axis, here[axis]) for axis in turned if axis in here}}
            if self.way.diagonal:
                gate_or_up = there["g"] if "g" in slots else here["g"]
                if here.get(HALF, gate_or_up) != gate_or_up:
                    continue
                there[HALF] = gate_or_up
            for in_target, in_source in self._runs(here):
                target_box, source_box = {**here, **in_target}, {**there, **in_source}
                at = {axis: source_box[axis].start for axis in slots if axis in source_box}
                number = at.get(TENSOR, 0)
                yield Piece(
                    source=self.source.key.render({**self.index, **at}),
                    source_box={axis: source_box[axis] for axis in self.way.stored[number][0].axes},
                    target_box={axis: target_box[axis] for axis in self.target.pattern.axes},
                    number=number,
                )

    @property
    def first_source(self) -> str:
        """The source of the first piece of all: where reading this tensor begins."""
        first = {**dict.fromkeys((*self.target.pattern.axes, TENSOR), 0), **self.index}
        turned = {axis: self.way.last(axis) - int(first[axis]) for axis in self.way.turned if axis in first}
        return self.source.key.render({**first, **turned})

    def _turn(self, axis: str, span: range) -> range:
        if axis not in self.way.turned:
            return span
        last = self.way.last(axis)
        return range(last - span.start, last - span.start + 1)

    def _runs(self, box: Box) -> Iterator[tuple[Box, Box]]:
        """The parts of `box` along `n` that lie in one chunk on both sides, or along rows in one section."""
        if self.way.turns:
            tensor = self.index[TENSOR] if TENSOR in self.target.key.slots else None
            yield from self.way.turns.boxes(box[ROWS], tensor)
            return
        if "n" not in box or not self.way.is_cut:
            yield {}, {}
            return
        for run in chunks(self.target.pattern, self.sizes, box):
            start, stop = run.base + run.inside.start, run.base + run.inside.stop
            while start < stop:
                source = place(self.source.pattern, self.source_sizes, start)
                at, length = source.inside.start, min(stop - start, len(source.inside))
                target_n = range(start - run.base, start - run.base + length)
                yield run.chunk | {"n": target_n}, source.chunk | {"n": range(at, at + length)}
                start += length


def verbatim(spec: TensorSpec) -> Target:
    """A tensor of the output that is named and stored as in the input."""
    same = Placed(Template(spec.name, literal=True), identity(len(spec.shape)))
    sizes = dict(zip(same.pattern.axes, spec.shape, strict=True))
    return Target(spec=spec, index={}, way=Way(role="verbatim", sizes=sizes, source_sizes=sizes, source=same, target=same))
