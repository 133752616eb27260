"""A block of one matrix, computed: bytes to values, times scales, to bfloat16.

In: a recipe, ranges. Out: bits. It never reads more than whole groups at the ends of what it was asked for.

What goes out in the other order than it is stored in is turned while it is bytes, of which there are fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.dequantize.formats import Format
from layouts.dequantize.values import KINDS, TILE, Room, codes, floats, numbers, put
from layouts.disk.pread import Empty
from layouts.reader import Reader
from layouts.tensors import itemsize

GROUP = 16
"""Bytes of the last dimension of what is folded."""
_WIDE = 256
"""Columns of a tile that is turned (measured)."""
_NARROW = 32
"""Columns below which a tile has no more rows: each has room behind it."""


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

    @property
    def group(self) -> int:
        """Columns that one scale is for, where a row has several; else 1."""
        return self.block[1] if self.block[1] < self.columns else 1

    @property
    def weight(self) -> float:
        """Bytes that a value takes in a `Block`."""
        return 1 / KINDS[self.format.values].per + (1 + bool(self.zero)) * 4 / self.block[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some rows of one matrix as they are stored, `columns` of it, of which the first begins a group.

    `raw` (rows, bytes); `scales` and `zeros`, if there are some, (rows or 1, groups).
    """

    recipe: Recipe
    columns: range
    raw: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.float32] | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.raw.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def load(reader: Reader, recipe: Recipe, point: Sequence[int], rows: range, columns: range, empty: Empty = np.empty) -> Block:
    """Read a block of one of its matrices; its bytes, into what `empty` gives."""
    per = KINDS[recipe.format.values].per
    held = per * (GROUP if recipe.format.folded else itemsize(reader.tensors[recipe.data].dtype))
    unit, wide = math.lcm(held, recipe.group), recipe.block[1]
    first = columns.start // unit * unit
    stop = min(-(-columns.stop // unit) * unit, -(-recipe.columns // held) * held)
    raw = _bytes(reader, recipe, point, rows, range(first // per, stop // per), empty)
    stop = min(stop, recipe.columns)
    down = range(rows.start // recipe.block[0], -(-rows.stop // recipe.block[0]))
    along = range(first // wide, -(-stop // wide))
    scales = floats(_grid(reader, recipe, recipe.scale, point, down, along), reader.tensors[recipe.scale].dtype)
    if (second := _second(reader, recipe, point)) is not None:
        scales = scales / second if recipe.format.divides else scales * second
    zeros = _zeros(reader, recipe, point, down, along) if recipe.zero else None
    if recipe.block[0] > 1 and len(scales) > 1:
        each = np.arange(rows.start, rows.stop) // recipe.block[0] - down.start
        scales, zeros = scales[each], None if zeros is None else zeros[each]
    return Block(recipe=recipe, columns=range(first, stop), raw=raw, scales=scales, zeros=zeros)


def compute(block: Block, columns: range, out: NDArray[Any], room: Room) -> None:
    """Fill `out` (rows, columns), whatever its strides, with bits of bfloat16: all rows of a block, and some of its columns."""
    recipe, kind, turned = block.recipe, KINDS[block.recipe.format.values], is_turned(out)
    unit = math.lcm(kind.per, recipe.group)
    step = max(unit, (_WIDE if turned else TILE) // unit * unit)
    step = min(step, -(-block.columns.stop // unit) * unit - columns.start // unit * unit)
    high = min(len(out), max(1, TILE // max(step, _NARROW)))
    room.hold(high * step, high)
    for first in range(columns.start // unit * unit, columns.stop, step):
        span = range(first, min(first + step, block.columns.stop))
        wanted = range(max(first, columns.start), min(first + step, columns.stop))
        for top in range(0, len(out), high):
            rows = slice(top, top + high)
            values = _tile(block, rows, span, room, turned=turned)
            into = out[rows, wanted.start - columns.start : wanted.stop - columns.start]
            cut = slice(wanted.start - first, wanted.stop - first)
            put(values[cut] if turned else values[:, cut], into.T if turned else into)


def is_turned(out: NDArray[Any]) -> bool:
    """Whether the rows of a matrix lie nearer to one another than its columns."""
    return out.strides[0] < out.strides[1]


def _tile(block: Block, rows: slice, span: range, room: Room, *, turned: bool) -> NDArray[np.float32]:
    """(rows, columns) of the values, or (columns, rows) if they are `turned`."""
    recipe, kind = block.recipe, KINDS[block.recipe.format.values]
    wide, begin = recipe.block[1], block.columns.start
    first = (span.start - begin) // kind.per
    found = codes(block.raw[rows, first : first + -(-len(span) // kind.per)], kind, room, turned=turned)
    values = numbers(found[: len(span)] if turned else found[:, : len(span)], kind, room)
    along = slice((span.start - begin) // wide, -(-(span.stop - begin) // wide))
    for do, grid in ((np.subtract, block.zeros), (np.multiply, block.scales)):
        if grid is not None:
            _each(do, values, (grid[rows] if len(grid) > 1 else grid)[:, along], wide, turned=turned)
    return values


def _each(do: np.ufunc, values: NDArray[Any], grid: NDArray[Any], wide: int, *, turned: bool) -> None:
    """Do something to values in place, with a grid (rows or 1, groups) of one number for so many columns."""
    count = values.shape[0 if turned else 1]
    if grid.shape[1] == 1:
        do(values, grid.T if turned else grid, out=values)
    elif count == grid.shape[1] * wide:
        parts = values.reshape((-1, wide, values.shape[1]) if turned else (len(values), -1, wide))
        do(parts, np.ascontiguousarray(grid.T)[:, None] if turned else grid[..., None], out=parts)
    else:
        each = np.repeat(grid, wide, 1)[:, :count]
        do(values, each.T if turned else each, out=values)


def _bytes(reader: Reader, recipe: Recipe, point: Sequence[int], rows: range, span: range, empty: Empty) -> NDArray[np.uint8]:
    """(rows, bytes) of the data of one matrix."""
    at = tuple(slice(each, each + 1) for each in point)
    size = itemsize(reader.tensors[recipe.data].dtype)
    last = (slice(span.start // GROUP, span.stop // GROUP), slice(None)) if recipe.format.folded else (
        slice(span.start // size, span.stop // size),
    )  # fmt: skip
    read = reader.read(recipe.data, (*at, slice(rows.start, rows.stop), *last), empty)
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
    held = 4 * KINDS[recipe.format.values].per
    width = 32 // held
    words = range(rows.start // held, -(-rows.stop // held))
    at = tuple(slice(each, each + 1) for each in point)
    found = reader.read(recipe.zero, (*at, slice(words.start, words.stop), slice(columns.start, columns.stop)))
    shifts = np.arange(0, 32, width, dtype=np.uint32)[:, None]
    each = np.asarray(found).reshape(len(words), 1, len(columns)) >> shifts & (2**width - 1)
    first = rows.start - words.start * held
    low: NDArray[np.float32] = each.reshape(-1, len(columns))[first : first + len(rows)].astype(np.float32)
    return low - np.float32(2 ** (width - 1))


def _second(reader: Reader, recipe: Recipe, point: Sequence[int]) -> np.float32 | None:
    if not recipe.second:
        return None
    spec = reader.tensors[recipe.second]
    found = floats(reader.read(recipe.second, (slice(None),) * len(spec.shape)), spec.dtype)
    one: np.float32 = found.reshape(-1)[0] if found.size == 1 else found.reshape(recipe.lead)[tuple(point)]
    return one
