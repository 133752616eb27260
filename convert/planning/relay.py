"""How the tensors of one part of a MoE block land in a wanted layout: names, patterns and sizes, or why they cannot. Pure.

In: a group of tensors and a wanted layout. Out: targets, or a reason. It never reads data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from convert.planning.targets import Target, Way
from layouts.errors import PlanError
from layouts.language.cuts import cut
from layouts.language.layout import OPEN, Layout, Placed
from layouts.language.parts import AXES, CHUNKS, EXTRA, PARTS, companion, is_in_first, takes
from layouts.language.pattern import Pattern
from layouts.matching.group import Group
from layouts.matching.packing import packs
from layouts.quantisation import block_of
from layouts.reader import Reader
from layouts.tensors import TensorSpec, itemsize

_NUMBER = {part.name: number for number, part in enumerate(PARTS)}


class Landing(NamedTuple):
    """Where a group lands: the way that its tensors share, and their shape."""

    group: Group
    way: Way
    shape: tuple[int, ...]

    def targets(self) -> Iterator[Target]:
        """The tensors: one per point of the axes in the key."""
        dtype, spans = self.group.dtype, {axis: (at,) for axis, at in self.group.index.items()} | self._named
        for point, name in zip(itertools.product(*spans.values()), self.names(), strict=True):
            spec = TensorSpec(name=name, dtype=dtype, shape=self.shape)
            yield Target(spec=spec, index=dict(zip(spans, point, strict=True)), way=self.way)

    def names(self) -> Iterator[str]:
        """What they are called, in the same order."""
        return self.way.target.key.names(self.group.index, self._named)

    def firsts(self) -> Iterator[str]:
        """Those in which every number that is counted is 0: all others differ from one of these in numbers alone."""
        key = self.way.target.key
        return key.names(self.group.index, {axis: at if axis in key.choices else at[:1] for axis, at in self._named.items()})

    @property
    def place(self) -> tuple[object, object]:
        """The key with the axes that are counted in it, and what else stands in its names."""
        key, named = self.way.target.key, self._named
        return (key.text, *named), tuple(self.group.index.get(slot) for slot in key.slots if slot not in named)

    @property
    def begin_alike(self) -> bool:
        """Whether all of them have their `first_source` in common."""
        return not self._named.keys() & set(self.way.source.key.slots)

    @property
    def tensors(self) -> int:
        """How many they are."""
        return math.prod(map(len, self._named.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of each of them."""
        return math.prod(self.shape) * itemsize(self.group.dtype)

    @property
    def _named(self) -> dict[str, range]:
        """The axes in the key."""
        sizes = self.way.sizes
        return {slot: range(sizes[slot]) for slot in self.way.target.key.slots if slot in sizes}


def landing(
    reader: Reader, group: Group, beside: Sequence[Group], layout: Layout, experts: str, *, bare: bool = False
) -> Landing:
    """How this group is held in the wanted layout.

    `beside` are all groups of the same role and block, this one among them; `bare` is without dimensions of size 1.

    Raises:
        PlanError: the layout cannot hold them without loss.
    """
    placed = layout.place(experts)
    if OPEN in layout.key:
        raise PlanError(
            f"{reader.path}: experts of {group.names[0]} are to be numbered through, and how many of each kind there are is "
            "not stated: moe_num_experts in config.json, or sizes={'e': 64} in memory"
        )
    if not takes(layout.key, group.part):
        raise PlanError(f"{reader.path}: {group.names[0]} has no place in the wanted layout, which has no such companions")
    if any(slot in "eg" and slot not in group.sizes for slot in placed.key.slots):
        of = "gate and up" if "e" in group.sizes else "all experts"
        raise PlanError(f"{reader.path}: {group.names[0]} is one number for {of}, and the wanted layout has them apart")
    try:
        pattern = _pattern(reader, group, beside, placed.pattern, bare=bare)
        sizes = cut(group.sizes, pattern)
        shape = pattern.shape(sizes)
    except ValueError as error:
        raise PlanError(f"{reader.path}: {group.names[0]} does not fit into '{layout.pattern}': {error}") from None
    target = Placed(placed.key.bind("part", _NUMBER[group.part]), pattern)
    way = Way(
        role=group.role, part=group.part, dims=group.dims, packed=group.packed,
        sizes=sizes, source_sizes=group.sizes, source=group.placed, target=target,
    )  # fmt: skip
    return Landing(group, way, shape)


def _pattern(reader: Reader, group: Group, beside: Sequence[Group], weight: Pattern, *, bare: bool) -> Pattern:
    """The wanted pattern for this part: fewer dims for a companion, coarser words for a scale, in and out as packed."""
    in_first = is_in_first(weight, group.role)
    if group.packed:
        in_first = next(is_in_first(g.placed.pattern, g.role) for g in beside if {"in", "out"} <= set(g.dims.split()))
    pattern = companion(weight, group.role, group.dims, in_first=in_first, bare=bare)
    scan = sum(axis not in {"e", "k", "g", *EXTRA, *CHUNKS} for axis in group.placed.pattern.axes)
    if scan and "..." not in pattern.axes:
        raise ValueError(f"{scan} scan axes have no place in it")
    pattern = pattern.expand(len(pattern.groups) - ("..." in pattern.axes) + scan)
    if group.packed and AXES[group.role][0] in pattern.padding:
        raise ValueError("values are packed along the axis that would be padded")
    words = pattern.text
    for axis in ("n", "k"):
        if axis in pattern.axes and (unit := _unit(reader, group, beside, axis, pattern)) > 1:
            words = _coarser(pattern, words, axis, unit, _finest(beside, axis))
    return Pattern(words)


def _finest(beside: Sequence[Group], axis: str) -> int:
    """How many elements the projection has along an axis, by the tensor that has most."""
    return max(group.total(axis) for group in beside if axis in group.sizes)


def _unit(reader: Reader, group: Group, beside: Sequence[Group], axis: str, pattern: Pattern) -> int:
    """How many elements of the finest tensor beside it one element of this group spans, where the wanted layout cuts there.

    The size of a block comes from `config.json` only: inferred from the grid it is wrong whenever the blocks do not divide.

    Raises:
        ValueError: it is not stated, or a block would lie across a cut.
    """
    dimension = next(g for g in pattern.groups if axis in g)
    if len(dimension) == 1 and axis not in pattern.padding:
        return 1
    whole, own = _finest(beside, axis), group.total(axis)
    if own == whole or (own == 1 and axis in AXES[group.role][:1]):
        return 1
    sizes = block_of(reader.config)
    block = sizes[AXES[group.role][::-1].index(axis)] if sizes else None
    if (packs(group) or reader.format == "orbax") and whole % own == 0:  # MaxText has whole blocks only
        unit = whole // own
    elif block and -(-whole // block) == own:
        unit = block
    else:
        raise ValueError(f"{own} scales for {whole} ({axis}), and config.json states no weight_block_size that explains them")
    if whole % unit:
        raise ValueError(f"a block of {unit} would lie across gate and up: {axis} is {whole}")
    if dimension[-1] != axis:
        raise ValueError(f"it takes gate and up in turn, and a block of {unit} would hold both")
    return unit


def _coarser(pattern: Pattern, text: str, axis: str, unit: int, whole: int) -> str:
    """A pattern for blocks of `unit` elements, from that for the elements themselves."""
    given = pattern.width if axis == "n" and pattern.width else pattern.fixed.get(axis)
    multiple, shards = pattern.padding.get(axis), pattern.fixed.get("s", 1)
    room = Pattern(f"{axis}%{multiple}").stored({axis: whole // shards, "s": shards})[axis] if multiple else None
    sizes = {sign: size for sign, size in (("=", given), ("%", room)) if size}
    for size in sizes.values():
        if size % unit:
            raise ValueError(f"a block of {unit} would lie across the end of {size} ({axis})")
    word = f"{axis}{f'={given}' if given else ''}{f'%{multiple}' if multiple else ''}"
    return text.replace(word, axis + "".join(f"{sign}{size // unit}" for sign, size in sizes.items()))
