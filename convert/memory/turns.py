"""Rows of several arrays that take turns in one (`layouts.language.sections`), as array operations. Pure.

In: arrays of any library, and how they take turns. Out: the joined array, or the rows of one of the others. It never computes
a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from layouts.language.sections import Turns


class Joining(Protocol):
    """What a library has to do; NumPy and `jax.numpy` as they are."""

    def concatenate(self, arrays: Sequence[Any], axis: int, /) -> Any:
        """Arrays behind one another along a dimension."""


def joined(arrays: Sequence[Any], turns: Turns, at: int, library: Joining) -> Any:
    """One array of an array for each tensor; rows are the dimension `at`."""
    parts = []
    for tensor, row, _, length in turns.places():
        rows = slice(turns.groups * row, turns.groups * (row + length))
        parts.append(_cut(arrays[tensor], at, rows, (turns.groups, length)))
    return _cut(library.concatenate(parts, at + 1), at, slice(None), (turns.total,), over=2)


def apart(array: Any, turns: Turns, tensor: int, at: int, library: Joining) -> Any:
    """The rows of one of the tensors, from the joined array."""
    groups = _cut(array, at, slice(None), (turns.groups, turns.total // turns.groups))
    parts = []
    for _, _, start, length in (place for place in turns.places() if place.tensor == tensor):
        rows = groups[(*(slice(None),) * (at + 1), slice(start, start + length))]
        parts.append(_cut(rows, at, slice(None), (turns.groups * length,), over=2))
    return library.concatenate(parts, at)


def _cut(array: Any, at: int, rows: slice, shape: tuple[int, ...], over: int = 1) -> Any:
    """Rows of the dimension `at`, and this shape in its place, and in that of those behind it: of as many as `over` says."""
    part = array[(*(slice(None),) * at, rows)]
    return part.reshape((*part.shape[:at], *shape, *part.shape[at + over :]))
