"""Rows of several arrays, or columns of gate and up, that take turns in one array, as array operations. Pure.

In: arrays of any library, and how they take turns (`layouts.language.sections`, `Pattern.width`). Out: the joined array, or the
rows of one of the others; columns with their chunks as one. It never computes a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from layouts.language.sections import Turns


class Operations(Protocol):
    """What a library has to do; NumPy and `jax.numpy` as they are."""

    def transpose(self, array: Any, axes: Sequence[int], /) -> Any:
        """The dimensions in this order."""

    def stack(self, arrays: Sequence[Any], axis: int, /) -> Any:
        """A new dimension, of these arrays."""

    def flip(self, array: Any, axis: int, /) -> Any:
        """A dimension last to first."""

    def pad(self, array: Any, widths: Sequence[tuple[int, int]], /) -> Any:
        """Zeros before and behind each dimension."""

    def concatenate(self, arrays: Sequence[Any], axis: int, /) -> Any:
        """Arrays behind one another along a dimension."""


def joined(arrays: Sequence[Any], turns: Turns, at: int, library: Operations) -> Any:
    """One array of an array for each tensor; rows are the dimension `at`."""
    parts = []
    for tensor, row, _, length in turns.places():
        rows = slice(turns.groups * row, turns.groups * (row + length))
        parts.append(_cut(arrays[tensor], at, rows, (turns.groups, length)))
    return _cut(library.concatenate(parts, at + 1), at, slice(None), (turns.total,), over=2)


def apart(array: Any, turns: Turns, tensor: int, at: int, library: Operations) -> Any:
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


def chunks_joined(array: Any, axes: Sequence[str], library: Operations) -> tuple[Any, list[str]]:
    """One dimension per axis, and their order, with the chunks of `n` behind one another: `c` is 1, `n` all of them."""
    order = [axis for axis in axes if axis != "c"]
    order.insert(order.index("n"), "c")
    array = library.transpose(array, [axes.index(axis) for axis in order])
    shape, c = array.shape, order.index("c")
    return array.reshape((*shape[:c], 1, shape[c] * shape[c + 1], *shape[c + 2 :])), order


def chunks_apart(array: Any, axes: Sequence[str], width: int, library: Operations) -> Any:
    """The reverse: such an array with chunks of so many columns, its axes in the order that they have."""
    n, order = axes.index("n"), [axis for axis in axes if axis != "c"]
    order.insert(order.index("n"), "c")
    shape = [size for axis, size in zip(axes, array.shape, strict=True) if axis != "c"]
    array = array.reshape((*shape[: n - 1], shape[n - 1] // width, width, *shape[n:]))
    return library.transpose(array, [order.index(axis) for axis in axes])
