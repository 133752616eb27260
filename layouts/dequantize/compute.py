"""A block of one matrix, computed: bytes to values, times scales, to bfloat16.

In: a recipe, ranges. Out: bits. It never computes more than it was asked for, but for whole groups at the ends.

Where scales have one byte there are 65,536 products at most, and each is looked up; else values are looked up, and multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.dequantize.formats import Format
from layouts.dequantize.values import PER_BYTE, floats, products, rounded, unpacked
from layouts.reader import Reader
from layouts.tensors import itemsize

GROUP = 16
"""Bytes of the last dimension of what is folded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one tensor is computed: `lead` are the sizes of the stack of matrices [rows, columns] that it is.

    `block` is what one scale is for, rows and columns, and `spread` how the dimensions of the scales lie: `grid`, `ones` (each
    with one of size 1 behind it), `rows`, or `one` for the whole matrix.
    """

    name: str
    format: Format
    data: str
    scale: str
    second: str
    lead: tuple[int, ...]
    rows: int
    columns: int
    block: tuple[int, int]
    spread: str
    zero: str = ""
    """Zero points, which are taken from values before they are multiplied; packed along rows, or as scales lie."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return (*self.lead, *((self.columns, self.rows) if self.format.folded else (self.rows, self.columns)))


def matrix(reader: Reader, recipe: Recipe, point: Sequence[int], rows: range, columns: range) -> NDArray[Any]:
    """A block of one of its matrices as bits of bfloat16."""
    per = PER_BYTE[recipe.format.values]
    held = per * itemsize(reader.tensors[recipe.data].dtype)
    unit = math.lcm(held, recipe.block[1]) if recipe.block[1] < recipe.columns else held
    first = columns.start // unit * unit
    stop = min(-(-columns.stop // unit) * unit, -(-recipe.columns // held) * held)
    raw = _bytes(reader, recipe, point, rows, range(first // per, stop // per))
    code = reader.tensors[recipe.scale].dtype
    down, along = (range(s.start // b, -(-s.stop // b)) for s, b in zip((rows, range(first, stop)), recipe.block, strict=True))
    along = range(along.start, min(along.stop, -(-recipe.columns // recipe.block[1])))
    stored = _grid(reader, recipe, recipe.scale, point, down, along)
    second = _second(reader, recipe, point)
    if itemsize(code) == 1 and recipe.block[0] == 1:
        words = products(recipe.format.values, code, second, divides=recipe.format.divides)
        index = raw.reshape(*stored.shape, -1) | (stored.astype(np.uint16) << 8)[..., None]
        found: NDArray[Any] = np.take(words, index).view(np.uint16).reshape(len(rows), -1)
    else:
        values = unpacked(raw, recipe.format.values)
        if recipe.zero:
            _each(np.subtract, values, _zeros(reader, recipe, point, down, along), rows, recipe.block)
        with np.errstate(all="ignore"):
            _each(np.multiply, values, floats(stored, code), rows, recipe.block)
        found = rounded(values)
    return found[:, columns.start - first : columns.stop - first]


def _each(do: np.ufunc, values: NDArray[Any], grid: NDArray[Any], rows: range, block: tuple[int, int]) -> None:
    """Do something to values (rows, columns) in place, with a grid of one number for a block; the first column begins one."""
    high, wide = block
    if high == 1 and values.shape[1] == grid.shape[1] * wide:
        parts = values.reshape(*grid.shape, wide)
        do(parts, grid[..., None], out=parts)
        return
    each = np.repeat(grid, wide, 1)[:, : values.shape[1]] if grid.shape[1] > 1 else grid
    if high == 1:
        do(values, each, out=values)
        return
    start = rows.start // high * high - rows.start
    for number, line in enumerate(each):
        part = values[max(0, start + number * high) : start + (number + 1) * high]
        do(part, line, out=part)


def _bytes(reader: Reader, recipe: Recipe, point: Sequence[int], rows: range, span: range) -> NDArray[Any]:
    """(rows, bytes) of the data of one matrix."""
    at = tuple(slice(each, each + 1) for each in point)
    size = itemsize(reader.tensors[recipe.data].dtype)
    last = (slice(span.start // GROUP, span.stop // GROUP), slice(None)) if recipe.format.folded else (
        slice(span.start // size, span.stop // size),
    )  # fmt: skip
    read = reader.read(recipe.data, (*at, slice(rows.start, rows.stop), *last))
    return np.ascontiguousarray(read).reshape(len(rows), -1).view(np.uint8)


def _grid(reader: Reader, recipe: Recipe, name: str, point: Sequence[int], rows: range, columns: range) -> NDArray[Any]:
    """(rows, columns) of the grid of scales of one matrix, or of zero points like it, as they are stored."""
    shape, whole = reader.tensors[name].shape, slice(None)
    at = tuple(slice(each, each + 1) for each in point) if len(shape) >= len(recipe.lead) else ()
    down, along = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
    spread = {"grid": (down, along), "ones": (down, whole, along, whole), "rows": (down,), "one": ()}[recipe.spread]
    slices = (*at, *spread)
    found = reader.read(name, (*slices, *[whole] * (len(shape) - len(slices))))
    return np.asarray(found).reshape((1, 1) if recipe.spread == "one" else (len(rows), len(columns)))


def _zeros(reader: Reader, recipe: Recipe, point: Sequence[int], rows: range, columns: range) -> NDArray[np.float32]:
    """(rows, columns) of the zero points of one matrix; where they are packed, a word has those of several rows."""
    if recipe.format.zeros == "I8":
        return _grid(reader, recipe, recipe.zero, point, rows, columns).view(np.int8).astype(np.float32)
    held = 4 * PER_BYTE[recipe.format.values]
    width = 32 // held
    words = range(rows.start // held, -(-rows.stop // held))
    at = tuple(slice(each, each + 1) for each in point)
    found = reader.read(recipe.zero, (*at, slice(words.start, words.stop), slice(columns.start, columns.stop)))
    shifts = np.arange(0, 32, width, dtype=np.uint32)[:, None]
    each = np.asarray(found).reshape(len(words), 1, len(columns)) >> shifts & (2**width - 1)
    first = rows.start - words.start * held
    low: NDArray[np.float32] = each.reshape(-1, len(columns))[first : first + len(rows)].astype(np.float32)
    return low - np.float32(2 ** (width - 1))


def _second(reader: Reader, recipe: Recipe, point: Sequence[int]) -> float | None:
    if not recipe.second:
        return None
    spec = reader.tensors[recipe.second]
    found = floats(reader.read(recipe.second, (slice(None),) * len(spec.shape)), spec.dtype)
    return float(found.reshape(-1)[0] if found.size == 1 else found.reshape(recipe.lead)[tuple(point)])
