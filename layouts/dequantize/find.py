"""Which tensors of a checkpoint are stored in which format: by names and types, and only if all sizes fit.

In: an open checkpoint. Out: recipes. It reads no data but the sizes that packing hides, and never guesses a block's size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from layouts.dequantize.compute import GROUP, Recipe
from layouts.dequantize.formats import BESIDE, FLOATS, FORMATS, LEFT, ZERO, Format
from layouts.dequantize.values import KINDS
from layouts.errors import InputError, PlanError
from layouts.quantisation import block_of, weights_of
from layouts.reader import Reader
from layouts.tensors import itemsize, numpy_dtype

_ENDS = sorted({end for row in FORMATS for end in row.scale}, key=len, reverse=True)
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
"""Types of which no matrix of a model that is not quantised is."""


class _Said(NamedTuple):
    """What `config.json` says: the columns of groups and the bits of values, of any module, and rows and columns of a block."""

    groups: tuple[int, ...]
    bits: tuple[int, ...]
    block: tuple[int, int] | None


def recipes(reader: Reader) -> dict[str, Recipe]:
    """How each tensor that can be computed is, by its name in the bfloat16 model.

    Raises:
        InputError: data without scales, scales without data, or a grid that does not fit.
        PlanError: something is quantised in another way.
    """
    found: dict[str, Recipe] = {}
    said = _Said(_stated(reader, "group_size"), _stated(reader, "num_bits"), block_of(reader.config))
    for name in reader.tensors:
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end and (recipe := _recipe(reader, said, name, name.removesuffix(end), end)):
            if recipe.name in found or (recipe.name in reader.tensors and recipe.name != recipe.data):
                raise InputError(f"{reader.path}: {name} and another tensor both say what {recipe.name} is; remove one")
            found[recipe.name] = recipe
    _check_left(reader, found)
    return found


def hidden(reader: Reader, found: Mapping[str, Recipe]) -> frozenset[str]:
    """The tensors that are no more once the others are computed."""
    names = {each for recipe in found.values() for each in (recipe.data, recipe.scale, recipe.second, recipe.zero) if each}
    for recipe in found.values():
        stem = recipe.data.removesuffix(recipe.format.data)
        names |= {stem + end for end in (*BESIDE, recipe.format.shape) if end and stem + end in reader.tensors}
    return frozenset(names)


def _stated(reader: Reader, word: str) -> tuple[int, ...]:
    """What is said of weights by this word, where it is a size: `config.json` may say anything."""
    stated = (weights.get(word) for weights in weights_of(reader.config))
    return tuple(sorted({size for size in stated if type(size) is int and size > 0}))


def _recipe(reader: Reader, said: _Said, scale: str, stem: str, end: str) -> Recipe | None:
    rows = [row for row in FORMATS if end in row.scale]
    here = [row for row in rows if stem + row.data in reader.tensors]
    code = reader.tensors[scale].dtype
    kinds = [row for row in here if reader.tensors[stem + row.data].dtype in row.codes]
    if end == ".scale" and not kinds:
        return None  # of a norm or a router
    if not here:
        raise InputError(
            f"{reader.path}: {scale} (in {reader.where(scale)}) is for {stem}{rows[0].data}, which is not there: "
            f"it has no {stem}{rows[0].data} beside it"
        )
    near = [row for row in kinds if code in row.scales]
    fit = [row for row in near if not row.second or _dtype(reader, stem + row.second) in FLOATS]
    if not fit:
        data, seconds = stem + here[0].data, [stem + row.second for row in near]
        stored = f"{data} is {reader.tensors[data].dtype} with {code} in {scale}"
        beside = "".join(f" and {_dtype(reader, name) or 'no number'} in {name}" for name in seconds)
        raise PlanError(f"{reader.path}: {stored}{beside}; no such format is computed")
    for row in fit:
        if recipe := _fitted(reader, said, row, stem, scale):
            return recipe
    data, block = stem + fit[0].data, said.block
    if block is None and "block" in fit[0].grain and end != ".weight_scale":
        raise PlanError(
            f"{reader.path}: config.json states no quantization_config.weight_block_size, and a grid does not tell it ({scale})"
        )
    shapes = reader.tensors[scale].shape, reader.tensors[data].shape
    raise InputError(
        f"{reader.path}: {scale} {shapes[0]} (in {reader.where(scale)}) is no grid of blocks {block or ''} for "
        f"{data} {shapes[1]}, nor another form of {' or '.join(dict.fromkeys(row.name for row in fit))}"
    )


def _dtype(reader: Reader, name: str) -> str:
    """Of a tensor, or nothing."""
    return reader.tensors[name].dtype if name in reader.tensors else ""


def _fitted(reader: Reader, said: _Said, row: Format, stem: str, scale: str) -> Recipe | None:
    """The recipe of a format, if the sizes are such."""
    data, second = stem + row.data, row.second and stem + row.second
    shape, grid = reader.tensors[data].shape, reader.tensors[scale].shape
    if row.folded:
        if len(shape) < 3 or shape[-1] != GROUP:
            return None
        shape = (*shape[:-2], shape[-2] * GROUP)
    if len(shape) < 2 or not math.prod(shape):
        return None
    *lead, rows, stored = shape
    held = KINDS[row.values].per * itemsize(reader.tensors[data].dtype)
    columns = stored * held
    if row.shape:  # a few columns are one word, however many values that holds
        told, wide = _told(reader, stem + row.shape), 8 // KINDS[row.values].per
        if told[0] != rows or -(-told[1] // held) != stored or (said.bits and wide not in said.bits):
            return None
        columns = told[1]
    if second and reader.tensors[second].shape not in ((), (1,), tuple(lead), (*lead, 1)):
        return None
    for grain in row.grain:
        every = [(block, _spread(grid, tuple(lead), rows, columns, block)) for block in _blocks(said, grain, rows, columns)]
        fit = [(block, spread) for block, spread in every if spread]
        if len(fit) > 1 and fit[0][0][1] < columns:
            sizes = " and ".join(str(block[1]) for block, _ in fit)
            raise PlanError(f"{reader.path}: {scale} fits groups of {sizes} columns; config.json has modules with each")
        for block, spread in fit[:1]:
            name = stem if row.folded else f"{stem}.weight"
            along = -(-columns // block[1])
            zero = _zero(reader, row, stem, (*lead, -(-rows // (4 * KINDS[row.values].per)), along), grid)
            return Recipe(name=name, format=row, data=data, scale=scale, second=second, lead=tuple(lead), rows=rows,
                          columns=columns, block=block, spread=spread, zero=zero)  # fmt: skip
    return None


def _zero(reader: Reader, row: Format, stem: str, packed: Sequence[int], grid: Sequence[int]) -> str:
    """The zero points of a matrix by name, if it has some: packed along rows, or one beside each scale.

    Raises:
        InputError: they are of another type or shape.
    """
    spec = reader.tensors.get(stem + ZERO)
    if spec is None or not row.zeros:
        return ""
    wanted = tuple(packed if row.zeros == "I32" else grid)
    if (spec.dtype, spec.shape) != (row.zeros, wanted):
        raise InputError(
            f"{reader.path}: {spec.name} (in {reader.where(spec.name)}) should be zero points of {row.name}, {row.zeros} "
            f"{wanted}; found {spec.dtype} {spec.shape}"
        )
    return spec.name


def _blocks(said: _Said, grain: int | str, rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """What one scale may be for, rows and columns."""
    if isinstance(grain, int):
        yield from [(1, grain)] * (columns % grain == 0)
    elif grain == "group":
        yield from ((1, size) for size in said.groups)
    elif grain == "block":
        yield from filter(None, [said.block])
    else:
        yield (1, columns) if grain == "channel" else (rows, columns)


def _spread(grid: Sequence[int], lead: tuple[int, ...], rows: int, columns: int, block: tuple[int, int]) -> str | None:
    """How a tensor of this shape is a grid of scales for such blocks; None if it is none."""
    down, along = -(-rows // block[0]), -(-columns // block[1])
    forms = {"grid": [(*lead, down, along)], "ones": [(*lead, down, 1, along, 1)]}
    if along == 1:
        forms["rows"] = [(*lead, down)]
    if (down, along) == (1, 1) and block == (rows, columns):
        forms["one"] = [(), (1,), lead, (*lead, 1)]
    return next((spread for spread, shapes in forms.items() if tuple(grid) in shapes), None)


def _told(reader: Reader, name: str) -> tuple[int, int]:
    """The sizes that a tensor of two integers tells."""
    spec = reader.tensors.get(name)
    if spec is None or spec.shape != (2,) or spec.dtype not in ("I32", "I64"):
        raise InputError(f"{reader.path}: {name} should be there and be two integers, the sizes that packing hides")
    rows, columns = np.ascontiguousarray(reader.read(name, (slice(None),))).view(numpy_dtype(spec.dtype)).tolist()
    return rows, columns


def _check_left(reader: Reader, found: Mapping[str, Recipe]) -> None:
    """See that nothing is left that is quantised."""
    gone = hidden(reader, found)
    for name, spec in reader.tensors.items():
        if name in gone or not spec.nbytes:
            continue
        if spec.shape and spec.dtype.startswith("F8_"):
            stem = name.removesuffix(".weight") + ".weight_scale"
            raise InputError(
                f"{reader.path}: {name} (in {reader.where(name)}) is {spec.dtype} and has no {stem}_inv beside it, nor {stem}"
            )
        if name.endswith(LEFT) or (name.endswith(".weight") and len(spec.shape) > 1 and spec.dtype in _INTEGERS):
            raise PlanError(f"{reader.path}: {name} (in {reader.where(name)}) belongs to no format that is computed")
        if name.endswith("_blocks"):
            lost = name.removesuffix("_blocks") + "_scales"
            raise InputError(f"{reader.path}: {name} (in {reader.where(name)}) has no {lost} beside it")
    if not found:
        raise PlanError(f"{reader.path}: nothing here is quantised in a way that is computed; nothing to dequantise")
    for recipe in found.values():
        order = reader.tensors.get(f"{recipe.data.removesuffix(recipe.format.data)}.weight_g_idx")
        if order and order.nbytes:
            raise PlanError(f"{reader.path}: {order.name} (in {reader.where(order.name)}) orders columns; that is not computed")
