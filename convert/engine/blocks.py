"""Fill any block of a target tensor from its sources: the one copy that all conversions are made of.

In: a target, a block of it, an open input. Out: the bits of that block. It never computes a value.

Memory is bounded: a source is read in slabs of at most `SLAB` bytes, each into the same memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.errors import readable
from convert.planning.loras import NOT_DIAGONAL
from convert.planning.targets import HALF, Piece, Target
from layouts.disk.pread import Empty
from layouts.errors import InputError
from layouts.language.cuts import with_padding
from layouts.language.pattern import Box, Pattern
from layouts.reader import Reader, scattered_of
from layouts.tensors import bits

SLAB = 32 << 20
"""Bytes of a source that one worker may hold at a time."""
_BAND, _LINE, _ROWS, _PAD, _SMALL = 1024, 256, 1024, 32, 4096
"""The transpose: bytes of a packed row and of a written run, packed rows, padding and least size in elements (measured)."""


def assembled(target: Target, box: Box, reader: Reader, empty: Empty = np.empty, slab: Empty = np.empty) -> NDArray[Any]:
    """The block `box` of a target as bits, one dimension per axis, C-contiguous; it must not be written to.

    It is made in an array that `empty` gives, or is what the reader had decoded anyway. One that lies in one piece in its
    source is read straight into it. All else is read into arrays that `slab` gives, one at a time, and copied from there.
    """
    pieces = list(target.pieces(box))
    if len(pieces) == 1 and pieces[0].target_box == dict(box) and lies_alike(target, pieces[0]) is not None:
        block = _read(target, pieces[0], reader, empty)
        return block if block.flags.c_contiguous else block.copy()
    out = empty([len(box[axis]) for axis in target.target.pattern.axes], bits(target.spec.dtype))
    if target.target.pattern.padding or HALF in target.target.pattern.axes:
        out[...] = 0
    computed, axes = scattered_of(reader), target.target.pattern.axes
    for piece in pieces:
        source = target.way.stored[piece.number][0]
        direct = piece.source in computed and not source.padding
        for part in _slabs(target, piece, out.itemsize):
            into = out[_inside(target, part, box)]
            block = _read(target, part, reader, partial(_there, source.axes, axes, into, slab) if direct else slab)
            if not (direct and np.may_share_memory(block, into)):
                copy_block(into, block)
    return out


def _there(
    source: Sequence[str], wanted: Sequence[str], into: NDArray[Any], slab: Empty, shape: Sequence[int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Where a block of a source goes, ordered as the source; a slab if more is read than goes there, or in other dimensions."""
    turned = into.transpose([wanted.index(axis) for axis in source if axis in wanted] + [
        at for at, axis in enumerate(wanted) if axis not in source
    ])  # fmt: skip
    alike = [size for size in turned.shape if size > 1] == [size for size in shape if size > 1]
    return turned.reshape(shape) if alike else slab(shape, dtype)


def lies_alike(target: Target, piece: Piece) -> int | None:
    """Where a piece begins in its source, in elements; None unless it lies there in one piece, ordered as in the target."""
    pattern, sizes = target.way.stored[piece.number]
    start = first_of(pattern.axes, pattern.stored(sizes), piece.source_box)
    alike = _long(pattern, piece.source_box) == _long(target.target.pattern, piece.target_box)
    return start if alike and not pattern.padding else None


def first_of(axes: Sequence[str], sizes: Mapping[str, int], box: Box) -> int | None:
    """The position of the first element of a box that lies in one piece, or None if it does not."""
    start, cut = 0, False
    for axis in axes:
        if cut and len(box[axis]) < sizes[axis]:
            return None
        cut = cut or len(box[axis]) > 1
        start = start * sizes[axis] + box[axis].start
    return start


def _long(pattern: Pattern, box: Box) -> list[str]:
    return [axis for axis in pattern.axes if len(box[axis]) > 1]


def _inside(target: Target, piece: Piece, box: Box) -> tuple[slice, ...]:
    """Where a piece lies in the block `box`."""
    spans = ((piece.target_box[axis], box[axis].start) for axis in target.target.pattern.axes)
    return tuple(slice(span.start - start, span.stop - start) for span, start in spans)


def _read(target: Target, piece: Piece, reader: Reader, empty: Empty) -> NDArray[Any]:
    """A piece in the target's axes: read where it is stored, split, cut, transposed; no value is touched."""
    source, wanted = target.way.stored[piece.number][0], target.target.pattern.axes
    if HALF in source.axes:
        _check_beside(target, piece, reader)
    block = _cut(target, piece, reader, empty)
    only_source = tuple(i for i, axis in enumerate(source.axes) if axis not in wanted)
    order = [axis for axis in source.axes if axis in wanted]
    block = block.squeeze(only_source).transpose([order.index(axis) for axis in wanted if axis in order])
    return block[tuple(slice(None) if axis in order else np.newaxis for axis in wanted)]


def _cut(target: Target, piece: Piece, reader: Reader, empty: Empty) -> NDArray[Any]:
    """A piece in the source's axes. Padding behind it is read as well: it must be zeros, for it goes no further.

    Raises:
        InputError: it is not.
    """
    pattern, sizes = target.way.stored[piece.number]
    box = with_padding(pattern, sizes, piece.source_box) if pattern.padding else piece.source_box
    window = pattern.window(sizes, box)
    with readable(reader.path):
        read = reader.read(piece.source, window.slices, empty)
    block = read.reshape(window.shape)[window.inside]
    if not pattern.padding:
        return block
    for at, axis in enumerate(pattern.axes):
        real = len(piece.source_box[axis])
        if np.any(block[(slice(None),) * at + (slice(real, None),)]):
            axis = "n" if axis == "c" else axis  # chunks that are padded together
            raise InputError(
                f"{reader.path}: {piece.source} (in {reader.where(piece.source)}) should hold zeros behind the first "
                f"{sizes[axis]} ({axis}) as '{pattern.text}' says, and does not; is it in another layout?"
            )
    return block[tuple(slice(len(piece.source_box[axis])) for axis in pattern.axes)]


def _check_beside(target: Target, piece: Piece, reader: Reader) -> None:
    """See that a matrix is block diagonal: the ranks of up are zeros in the columns of gate, and the other way round.

    Raises:
        InputError: they are not, so that what is dropped would be lost.
    """
    other = 1 - piece.source_box[HALF].start
    beside = replace(piece, source_box={**piece.source_box, HALF: range(other, other + 1)})
    if np.any(_cut(target, beside, reader, np.empty)):
        raise InputError(f"{reader.path}: {piece.source} (in {reader.where(piece.source)}) should hold {NOT_DIAGONAL}")


def _slabs(target: Target, piece: Piece, itemsize: int) -> Iterator[Piece]:
    """Cut a piece along the first source axes that have a range, so that each part spans at most `SLAB` bytes of the source."""
    pattern, sizes = target.way.stored[piece.number]
    axes = pattern.axes
    cut = next((i for i, axis in enumerate(axes) if len(piece.source_box[axis]) > 1), None)
    if cut is None:
        yield piece
        return
    inner = itemsize
    stored = pattern.stored(sizes)
    for axis in axes[cut + 1 :]:
        inner *= stored[axis]
    axis, step = axes[cut], max(1, SLAB // max(1, inner))
    whole = piece.source_box[axis]
    for start in range(whole.start, whole.stop, step):
        part = range(start, min(start + step, whole.stop))
        slab = replace(
            piece,
            source_box={**piece.source_box, axis: part},
            target_box={**piece.target_box, axis: _shifted(part, piece.target_box[axis].start - whole.start)},
        )
        if inner > SLAB:
            yield from _slabs(target, slab, itemsize)
        else:
            yield slab


def _shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


def copy_block(target: NDArray[Any], source: NDArray[Any]) -> None:
    """Copy between two views of one shape, through the cache where their fastest axes differ.

    A plain NumPy assignment of a transposed view misses the cache on every element: 1.4 GB/s where this does 10 (2-byte
    elements, read + written, one thread). Rows of the source are first packed into a scratch that stays in L2 and whose rows
    are padded, because row strides that are powers of two fall on the same cache lines; the transpose then runs from there.
    """
    fast = min(range(source.ndim), key=lambda axis: _stride(source, axis), default=0)
    if source.ndim < 2 or fast == source.ndim - 1 or source.size < _SMALL:
        target[...] = source
        return
    into, of = np.moveaxis(target, fast, -2), np.moveaxis(source, fast, -2)
    for outer in np.ndindex(into.shape[:-2]):
        _transpose(into[outer], of[outer])


def _transpose(target: NDArray[Any], source: NDArray[Any]) -> None:
    """Both (A, B); `target` runs along B, `source` along A."""
    band, line = _BAND // source.itemsize, _LINE // source.itemsize
    scratch = np.empty((min(_ROWS, source.shape[1]), band + _PAD), source.dtype)
    for a in range(0, source.shape[0], band):
        for b in range(0, source.shape[1], _ROWS):
            part = source[a : a + band, b : b + _ROWS].T
            packed = scratch[: part.shape[0], : part.shape[1]]
            packed[...] = part
            into = target[a : a + band, b : b + _ROWS]
            for row in range(0, part.shape[0], line):
                into[:, row : row + line] = packed[row : row + line].T


def _stride(array: NDArray[Any], axis: int) -> int:
    """The step of an axis; one of length 1 has none worth having."""
    return abs(array.strides[axis]) if array.shape[axis] > 1 else 1 << 62
