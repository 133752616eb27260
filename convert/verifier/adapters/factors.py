"""The two factors of each expert's delta W, taken from the stored tensors by plain slices: nothing of what converts is used.

In: a described adapter. Out: A and scale * B in float64, and how two of them differ. It never writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
_Take = Callable[[NDArray[Any], NDArray[Any], int, int], tuple[NDArray[Any], NDArray[Any]]]
_TAKE: Mapping[str, _Take] = {
    "packed": lambda a, b, e, n: (a[_rows(a, e, n)], b[:, e::n]),
    "packed-grouped": lambda a, b, e, n: (a[_rows(a, e, n)], b[:, _rows(b.T, e, n)]),
    "packed-reversed": lambda a, b, e, n: (b[:, e::n].T, a[_rows(a, e, n)].T),
    "packed-reversed-grouped": lambda a, b, e, n: (b[:, _rows(b.T, e, n)].T, a[_rows(a, e, n)].T),
    "packed-3d": lambda a, b, e, _: (a[e], b[:, :, e]),
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


def factors_of(side: Side, block: Block) -> dict[tuple[str, int], Factors]:
    """(projection, expert) -> what it is made of; of a fused one in `gate` and `up`."""
    found = {}
    for name, unit in block.units.items():
        for e, (a, b) in enumerate(_experts(side, unit)):
            scaled = b * unit.scales[e].factor
            parts = {name: scaled}
            if name == "gate_up":
                half = len(scaled) // 2
                parts = (
                    {"gate": scaled[0::2], "up": scaled[1::2]} if side.turns else {"gate": scaled[:half], "up": scaled[half:]}
                )
            for projection, rows in parts.items():
                used = a.any(axis=1) & rows.any(axis=0)
                found[projection, e] = Factors(a=a[used], b=rows[:, used])
    return found


def _experts(side: Side, unit: Unit) -> Iterator[tuple[Floats, Floats]]:
    if side.described.form.per_expert:
        for pair in zip(*unit.names, strict=True):
            one, other = (_values(side.reader, name) for name in pair)
            yield one, other
        return
    one, other = (_values(side.reader, names[0]) for names in unit.names)
    take = _TAKE[side.described.form.name]
    for e in range(unit.experts):
        yield take(one, other, e, unit.experts)


def _rows(array: NDArray[Any], e: int, experts: int) -> slice:
    rank = len(array) // experts
    return slice(e * rank, (e + 1) * rank)


def _values(reader: Reader, name: str) -> Floats:
    spec = reader.tensors[name]
    bits = reader.read(name, tuple(slice(0, size) for size in spec.shape))
    found: Floats = bits.view(numpy_dtype(spec.dtype)).astype(np.float64)
    return found


def same(one: Factors | None, other: Factors | None) -> bool:
    """Whether the factors are the same numbers, an absent one being zero."""
    if one is None or other is None:
        return all(each is None or not each.b.size for each in (one, other))
    pairs = ((one.a, other.a), (one.b, other.b))
    return all(np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a), np.signbit(b)) for a, b in pairs)


def difference(one: Factors | None, other: Factors | None) -> str:
    """How two delta W differ, in words; nothing if they do not, but for the order of sums."""
    if one is None or other is None:
        return f"only in the {'second' if one is None else 'first'}"
    shapes = [(each.b.shape[0], each.a.shape[1]) for each in (one, other)]
    if shapes[0] != shapes[1]:
        return f"delta W has shape {shapes[0]} and {shapes[1]}"
    with np.errstate(invalid="ignore", over="ignore"):
        deltas = [each.b @ each.a for each in (one, other)]
        bound = np.abs(one.b) @ np.abs(one.a) + np.abs(other.b) @ np.abs(other.a)
        apart = ~(np.abs(deltas[0] - deltas[1]) <= _ROUNDING * bound)
    if not apart.any():
        return ""
    row, column = np.argwhere(apart)[0]
    first, second = (delta[row, column] for delta in deltas)
    return f"{int(apart.sum())} of {apart.size} elements of delta W differ, first [{row}, {column}]: {first:g} and {second:g}"
