"""Where two arrays of bits differ, whatever the order of their axes in memory.

In: two arrays of the same shape and type, often one the transpose of the other. Out: how many elements differ, and the first.

NumPy goes along one of the two, and touches a line of the cache for each element of the other; so it is given parts that are
one such line wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH = 32
"""Elements of a part along the axis that runs in memory: lines of 64 bytes of 16-bit numbers."""
PART = 1 << 17
"""Elements of a part: what is compared stays in the cache of a core."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`count` elements differ, the `first` of them at this place."""

    count: int
    first: tuple[int, ...]


def differing(x: NDArray[np.generic], y: NDArray[np.generic]) -> Difference | None:
    """Where they differ; None if nowhere.

    Raises:
        ValueError: they have not the same shape.
    """
    if x.shape != y.shape:
        raise ValueError(f"{x.shape} in one, {y.shape} in the other")
    if x.size <= PART and np.array_equal(x, y):  # as small experts are, of which there may be 100,000
        return None
    one, other = _turned(x, y) if x.ndim else (x, y)
    if all(np.array_equal(one[part], other[part]) for part in _parts(one, other)):
        return None
    unequal = np.not_equal(x, y)
    first = np.unravel_index(int(unequal.argmax()), unequal.shape)
    return Difference(int(np.count_nonzero(unequal)), tuple(map(int, first)))


def _turned(x: NDArray[np.generic], y: NDArray[np.generic]) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Both, with the axis last that runs in memory of `y`; NumPy's inner loop is over the last one where the two disagree."""
    return np.moveaxis(x, _running(y), -1), np.moveaxis(y, _running(y), -1)


def _running(array: NDArray[np.generic]) -> int:
    """The axis that runs in memory."""
    long = [axis for axis in range(array.ndim) if array.shape[axis] > 1]
    return min(long, key=lambda axis: abs(array.strides[axis]), default=array.ndim - 1)


def _parts(x: NDArray[np.generic], y: NDArray[np.generic]) -> Iterator[tuple[slice, ...]]:
    """Parts that cover both; narrow where they run along different axes."""
    steps = list(x.shape)
    if x.size > PART:
        if _running(x) != _running(y):
            steps[-1] = min(WIDTH, steps[-1])
        for axis in range(len(steps)):
            steps[axis] = max(1, min(steps[axis], PART * steps[axis] // math.prod(steps)))
    yield from _grid(x.shape, steps)


def _grid(shape: Sequence[int], steps: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    cuts = [range(0, size, step or 1) for size, step in zip(shape, steps, strict=True)]
    for starts in itertools.product(*cuts):
        yield tuple(slice(start, start + step) for start, step in zip(starts, steps, strict=True))
