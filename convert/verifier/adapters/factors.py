"""The two factors of each expert's delta W, taken from the stored tensors by plain slices: nothing of what converts is used.

In: a described adapter. Out: A and scale * B in float64, expert by expert, and how two of them differ. It never writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.adapters.describe import Description
from layouts.adapters.units import Block, Unit
from layouts.reader import Reader
from layouts.tensors import numpy_dtype

Floats = NDArray[np.float64]
_ROUNDING = 2.0**-44
"""What the order of a float64 sum may change, relative to the sum of absolute products, for ranks below 500."""
_FLOAT, _BESIDE = 8, 8
"""Bytes of a float64, and how many of them there are at a time for each element of delta W that is compared."""
_Take = Callable[[NDArray[Any], NDArray[Any], int, int], tuple[NDArray[Any], NDArray[Any]]]
_TAKE: Mapping[str, _Take] = {
    "packed": lambda a, b, e, n: (a[_rows(a, e, n)], b[:, e::n]),
    "packed-grouped": lambda a, b, e, n: (a[_rows(a, e, n)], b[:, _rows(b.T, e, n)]),
    "packed-reversed": lambda a, b, e, n: (b[:, e::n].T, a[_rows(a, e, n)].T),
    "packed-reversed-grouped": lambda a, b, e, n: (b[:, _rows(b.T, e, n)].T, a[_rows(a, e, n)].T),
    "packed-3d": lambda a, b, e, _: (a[e], b[:, :, e]),
    "automodel": lambda a, b, e, _: (a[e].T, b[e].T),
    **dict.fromkeys(("fused", "stacked", "stacked-w123"), lambda a, b, e, _: (a[e % len(a)], b[e % len(b)])),
}
"""Form -> A (r, in) and B (out, r) of one expert `e` of `n`, from the two stored tensors of all experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two adapters; `turns` says whether gate and up take turns in its fused rows."""

    reader: Reader
    described: Description
    turns: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """A (r, in) as it is, scale * B (out, r) in float64, ranks of zeros left out; in and out as they were."""

    a: Floats
    b: Floats


class Stored:
    """The stored tensors of one projection as they are, kept while its experts are taken apart one after another."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._names: tuple[str, ...] = ()
        self._held: list[NDArray[Any]] = []

    def factors(self, place: Place) -> Factors:
        """What a delta W is made of."""
        unit, e, part = place
        a, b = self._expert(unit, e)
        rows = b * unit.scales[e].factor
        if part is not None:
            half = len(rows) // 2
            rows = rows[part::2] if self._side.turns else rows[part * half : (part + 1) * half]
        used = a.any(axis=1) & rows.any(axis=0)
        return Factors(a=a[used], b=rows[:, used])

    def _expert(self, unit: Unit, e: int) -> tuple[Floats, Floats]:
        form = self._side.described.form
        one, other = self._read(tuple(names[e if form.per_expert else 0] for names in unit.names))
        a, b = (one, other) if form.per_expert else _TAKE[form.name](one, other, e, unit.experts)
        return a.astype(np.float64), b.astype(np.float64)

    def _read(self, names: tuple[str, ...]) -> list[NDArray[Any]]:
        if names != self._names:
            self._held.clear()
            self._names, self._held = names, [_values(self._side.reader, name) for name in names]
        return self._held


Place = tuple[Unit, int, int | None]
"""A projection as it is stored, an expert, and which half of it where gate and up are in one."""


def places_of(block: Block) -> dict[tuple[str, int], Place]:
    """(projection, expert) -> where it is; of a fused one in `gate` and `up`."""
    found: dict[tuple[str, int], Place] = {}
    for name, unit in block.units.items():
        parts = (("gate", 0), ("up", 1)) if name == "gate_up" else ((name, None),)
        found |= {(projection, e): (unit, e, part) for projection, part in parts for e in range(unit.experts)}
    return found


def held(side: Side, block: Block) -> int:
    """Bytes in memory while experts are taken apart: the largest stored projection, and what an expert is in float64."""
    most = 0
    for unit in block.units.values():
        sizes = [max(side.reader.tensors[name].nbytes for name in names) for names in unit.names]
        elements = (unit.i + unit.o) * max(scale.rank for scale in unit.scales)
        most = max(most, sum(sizes) + 4 * _FLOAT * elements)
    return most


def _rows(array: NDArray[Any], e: int, experts: int) -> slice:
    rank = len(array) // experts
    return slice(e * rank, (e + 1) * rank)


def _values(reader: Reader, name: str) -> NDArray[Any]:
    spec = reader.tensors[name]
    bits = reader.read(name, tuple(slice(0, size) for size in spec.shape))
    return bits.view(numpy_dtype(spec.dtype))


def same(one: Factors | None, other: Factors | None) -> bool:
    """Whether the factors are the same numbers, an absent one being zero."""
    if one is None or other is None:
        return all(each is None or not each.b.size for each in (one, other))
    pairs = ((one.a, other.a), (one.b, other.b))
    return all(np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b)) for a, b in pairs)


def difference(one: Factors | None, other: Factors | None, room: int) -> str:
    """How two delta W differ, in words; nothing but for the order of sums if they do not. Products take `room` bytes."""
    if one is None or other is None:
        return f"only in the {'second' if one is None else 'first'}"
    shapes = [(each.b.shape[0], each.a.shape[1]) for each in (one, other)]
    if shapes[0] != shapes[1]:
        return f"delta W has shape {shapes[0]} and {shapes[1]}"
    (rows, columns), count, first = shapes[0], 0, ""
    step = max(1, room // (_BESIDE * _FLOAT * max(1, columns)))
    for start in range(0, rows, step):
        deltas, apart = _apart(*(Factors(a=each.a, b=each.b[start : start + step]) for each in (one, other)))
        if not first and apart.any():
            row, column = np.argwhere(apart)[0]
            left, right = (delta[row, column] for delta in deltas)
            first = f"[{row + start}, {column}]: {left:g} and {right:g}"
        count += int(apart.sum())
    return f"{count} of {rows * columns} elements of delta W differ, first {first}" if count else ""


def _apart(one: Factors, other: Factors) -> tuple[list[Floats], NDArray[np.bool_]]:
    """Both products, and where they differ by more than the order of sums may change."""
    with np.errstate(invalid="ignore", over="ignore"):
        deltas = [each.b @ each.a for each in (one, other)]
        bound = np.abs(one.b) @ np.abs(one.a) + np.abs(other.b) @ np.abs(other.a)
        return deltas, ~(np.abs(deltas[0] - deltas[1]) <= _ROUNDING * bound)
