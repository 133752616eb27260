"""A and B of gate and up in a tree, one expert of one layer at a time, whether they are fused or apart.

In: a described tree. Out: bits. It takes A and B apart by plain slices: nothing of what converts is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.errors import InputError, PlanError
from convert.verifier.bits.stored import Axis, arranged, dimensions
from layouts.adapters.trees import Axes, axes, found
from layouts.language.parts import CHUNKS
from layouts.language.pattern import Pattern
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description
from layouts.reader import Reader
from layouts.tables.maxtext import LORA_APART, LORA_FUSED

GATE_UP, SIDES = ("gate (wi_0)", "up (wi_1)"), ("A", "B")
Bits = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraBlock:
    """A and B of gate and up at one place: their names, axes and, where they are fused, how columns lie, `n` of each real."""

    reader: Reader
    names: tuple[str, ...]
    at: Axes
    columns: Pattern | None
    n: int

    @property
    def points(self) -> Mapping[str, int]:
        """The axes of layers and experts, and their sizes."""
        sizes: dict[str, int] = {}
        for name, words in zip(self.names, self.at.words, strict=False):
            sizes |= dict(zip(words, self.reader.tensors[name].shape, strict=True))
        return {axis: size for axis, size in sorted(sizes.items(), reverse=True) if axis not in ("k", "r", "n")}

    def kind(self) -> tuple[object, ...]:
        """What has to be alike on both sides."""
        specs = [self.reader.tensors[name] for name in self.names[:2]]
        k = specs[0].shape[self.at.words[0].index("k")]
        return *(spec.dtype for spec in specs), tuple(self.points.items()), ("k", k), ("n", self.n)

    def units(self) -> dict[str, tuple[int, ...]]:
        """How long along each dimension is what is read of each tensor at a time."""
        shapes = [self.reader.tensors[name].shape for name in self.names]
        words = [self.at.words[number % 2] for number in range(len(self.names))]
        both = zip(words, shapes, strict=True)
        each = [tuple(1 if axis in self.points else size for axis, size in zip(*one, strict=True)) for one in both]
        return dict(zip(self.names, each, strict=True))

    def halves(self, point: Mapping[str, int]) -> tuple[tuple[Bits, Bits], tuple[Bits, Bits]]:
        """A (k, r) and B (r, n) of gate and of up, of one expert of one layer, as bits.

        Raises:
            ValueError: there is something in the padding.
        """
        read = [self.read(number, point) for number in range(len(self.names))]
        if self.columns is None:
            return (read[0], read[1]), (read[2], read[3])
        a, b = read
        gate, up = self._parted(b)
        half = a.shape[1] // 2
        apart = a.shape[1] % 2 == 0 and not gate[half:].any() and not up[:half].any()
        pairs = ((a[:, :half], gate[:half]), (a[:, half:], up[half:])) if apart else ((a, gate), (a, up))
        one, other = ((np.ascontiguousarray(left), np.ascontiguousarray(right)) for left, right in pairs)
        return one, other

    def slices(self, name: str, number: int, point: Mapping[str, int]) -> tuple[slice, ...]:
        """Where an expert of a layer is in A (0) or B (1)."""
        sizes = zip(self.at.words[number], self.reader.tensors[name].shape, strict=True)
        return tuple(slice(point[axis], point[axis] + 1) if axis in point else slice(0, size) for axis, size in sizes)

    def read(self, number: int, point: Mapping[str, int]) -> Bits:
        """The part of a tensor, by its number among the names, that is of an expert: A (k, r) or B (r, columns), as stored."""
        name, side = self.names[number], number % 2
        along = tuple(at for at, axis in enumerate(self.at.words[side]) if axis in point)
        return np.ascontiguousarray(self.reader.read(name, self.slices(name, side, point)).squeeze(along))

    def _parted(self, b: Bits) -> tuple[Bits, Bits]:
        """The columns of gate and of up in their logical order: shards, then chunks, then what is in each."""
        pattern = self.columns or Pattern("(g n)")
        sizes = {"g": 2, **pattern.fixed, **({"c": 1} if pattern.width else {})}
        free = next(axis for axis in ("c", "n") if axis in pattern.axes and axis not in sizes)
        sizes[free] = self.n // math.prod(size for axis, size in sizes.items() if axis != "g")
        rank = Axis(name="r", size=len(b), stored=len(b), reverse=False)
        one, other = arranged(b, [[rank], *dimensions(pattern.text, sizes)], ("g", "r", *CHUNKS))
        return one, other


def lora_blocks(reader: Reader, described: Description, beside: Sequence[Mapping[str, Any]]) -> dict[str, LoraBlock]:
    """Path -> A and B there; how columns lie is told by the weight beside, by the record, or by that of the other side."""
    made = {}
    weights = {str(group.index.get("path")): group for group in described.groups if group.role == "wi" and not group.part}
    records = [record for record in (record_of(reader), *beside) if "wi" in record]
    for key in (LORA_APART, LORA_FUSED):
        for path, names in found(described.loras, key).items():
            if path in made:
                raise PlanError(f"{reader.path}: {path} has LoRA of gate and up twice, apart and fused; remove one")
            group, known, layers = weights.get(path), dict[str, int](), None
            columns = None if key is LORA_APART else Pattern(records[0]["wi"]["pattern"]) if records and not group else None
            if group:
                known = {axis: group.total(axis) for axis in group.sizes if axis in "ek" or (axis == "n" and key is LORA_APART)}
                layers = tuple(size for axis, size in sorted(group.sizes.items()) if axis.startswith("l"))
                columns = None if key is LORA_APART else group.placed.pattern
            if key is LORA_FUSED and columns is None:
                raise PlanError(
                    f"{reader.path}: {names[0]} is fused, and nothing says in which layout; name it with --source-layout"
                )
            shapes = [reader.tensors[name].shape for name in names]
            if shapes[:2] != shapes[-2:]:
                raise InputError(f"{reader.path}: {names[0]} and {names[-2]} are of other shapes: {shapes}")
            at = axes((names[0], names[1]), shapes[0], shapes[1], known, layers)
            last = None if columns is None else Pattern(columns.tokens[-1])
            made[path] = LoraBlock(reader=reader, names=tuple(names), at=at, columns=last, n=_real(at, last, group, records))
    return made


def _real(at: Axes, columns: Pattern | None, group: Any, records: list[Mapping[str, Any]]) -> int:
    """The columns of one projection without padding."""
    if columns is None:
        return at.n
    if group:
        return int(group.total("n"))
    entry = records[0].get("stored", {}).get("wi.") if columns.padding else None
    return entry["unpadded"]["n"] * columns.fixed.get("s", 1) if entry else at.n // 2
