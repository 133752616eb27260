"""The neutral form of one projection's adapter, and the way into it and out of it: moves of bits alone.

In: arrays of unsigned integers, patterns. Out: `Pair`, or arrays. It never computes a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.adapters.forms import AXES
from layouts.language.pattern import Pattern

Bits = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A (e, r, i) and B (e, o, r) of all experts, as bits; experts of smaller rank have zeros behind."""

    a: Bits
    b: Bits


def unpacked(stored: Bits, side: str, pattern: Pattern, sizes: Mapping[str, int]) -> Bits:
    """A stored tensor along the axes of the neutral form."""
    split = stored.reshape([sizes[axis] for axis in pattern.axes])
    wanted = [axis for axis in AXES[side] if axis in pattern.axes]
    return split.transpose([pattern.axes.index(axis) for axis in wanted])


def repacked(neutral: Bits, side: str, pattern: Pattern) -> Bits:
    """The inverse; the result is in C order."""
    have = [axis for axis in AXES[side] if axis in pattern.axes]
    sizes = dict(zip(have, neutral.shape, strict=True))
    turned = neutral.transpose([have.index(axis) for axis in pattern.axes])
    return np.ascontiguousarray(turned).reshape(pattern.shape(sizes))


def stacked(experts: Sequence[Bits], rank_axis: int) -> Bits:
    """One array of all experts, whose ranks may differ: zeros behind."""
    rank = max(each.shape[rank_axis] for each in experts)
    if all(each.shape[rank_axis] == rank for each in experts):
        return np.stack(experts)
    return np.stack([padded(each, rank_axis, rank) for each in experts])


def padded(array: Bits, axis: int, size: int) -> Bits:
    """Zeros behind, up to a size along an axis."""
    room = [(0, size - have if at == axis % array.ndim else 0) for at, have in enumerate(array.shape)]
    return np.pad(array, room)


def joined(gate: Bits, up: Bits, *, interleaved: bool) -> Bits:
    """Rows of B for the fused projection, (e, n, r) and (e, n, r) -> (e, 2n, r): gate first, or taking turns."""
    both = np.stack((gate, up), axis=2 if interleaved else 1)
    return both.reshape(gate.shape[0], -1, gate.shape[2])


def parted(both: Bits, *, interleaved: bool) -> tuple[Bits, Bits]:
    """The inverse of `joined`."""
    if interleaved:
        return both[:, 0::2], both[:, 1::2]
    half = both.shape[1] // 2
    return both[:, :half], both[:, half:]
