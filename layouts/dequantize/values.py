"""What bytes stand for: codes of one byte for each value, and float32 of these, made by arithmetic on many at a time.

In: bytes, words of the table of formats, memory. Out: arrays in that memory. It never reads a checkpoint.

Looking a value up takes four times as long as this arithmetic. A float of few bits, its sign, exponent and mantissa put in the
place of those of float32, is too small by a power of two, and is exact once it is multiplied by that, subnormal or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.tensors import numpy_dtype

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1 by its four bits; the lower half of a byte comes first."""
TILE = 1 << 17
"""Values that are computed at a time: they stay in the cache."""
ROOM = 4 << 20
"""Bytes of a `Room` at most."""
_PAD = 64
"""Bytes behind a row that is going to be a column: rows that are powers of two apart fall on the same cache lines."""
BF16 = numpy_dtype("BF16")
_LEAST = np.array([1], np.uint32).view(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How values are stored, `per` of them to a byte; the bits of `flip` are turned over first, so that signs are extended.

    A float's code is moved left by `shift` and keeps the bits of `mask`; the float32 that this is lacks a factor of 2**`power`.
    `nan` is the code of a NaN without its sign, where there is one.
    """

    per: int = 1
    flip: int = 0
    shift: int = 0
    mask: int = 0
    power: int = 0
    nan: int | None = None


KINDS: Mapping[str, Kind] = {
    "e4m3": Kind(shift=20, mask=0x87F00000, power=120, nan=0x7F),
    "e2m1": Kind(per=2, flip=0x88, shift=22, mask=0x81C00000, power=126),
    "int8": Kind(),
    "int8+128": Kind(flip=0x80),
    "int4": Kind(per=2),
}


class Room:
    """Memory of one thread, used again and again: new pages for all that is computed would cost as much as the values."""

    def __init__(self) -> None:
        self.raw = self.codes = self.spare = np.empty(0, np.uint8)
        self.values = np.empty(0, np.float32)

    def hold(self, size: int, rows: int) -> None:
        """Have room for `size` values in `rows` rows."""
        if len(self.values) < size:
            self.codes, self.values = np.empty(size, np.uint8), np.empty(size, np.float32)
        if len(self.spare) < size + rows * _PAD:
            self.spare = np.empty(size + rows * _PAD, np.uint8)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array for what is read, good until the next one is."""
        nbytes = math.prod(shape) * dtype.itemsize
        if len(self.raw) < nbytes:
            self.raw = np.empty(nbytes, np.uint8)
        return self.raw[:nbytes].view(dtype).reshape(shape)


def codes(raw: NDArray[np.uint8], kind: Kind, room: Room, *, turned: bool) -> NDArray[np.int8]:
    """(rows, bytes) as (rows, values), or as (values, rows) if `turned`: a signed byte for each value."""
    rows, width = raw.shape
    if not turned and kind.per == 1:
        return (np.bitwise_xor(raw, np.uint8(kind.flip), out=_of(room.codes, raw.shape)) if kind.flip else raw).view(np.int8)
    if not turned:
        wide, found = (_of(each, (rows, 2 * width)).view(np.uint16) for each in (room.spare, room.codes))
        np.copyto(wide, raw)
        if kind.flip:
            wide ^= np.uint16(kind.flip)
        np.left_shift(wide, 4, out=found)
        found |= wide
        found &= np.uint16(0x0F0F)  # two values in turn, the lower half of a byte first
        halves = found.view(np.uint8)
    else:
        lines = _of(room.spare, (rows, width + _PAD))[:, :width]
        np.bitwise_xor(raw, np.uint8(kind.flip), out=lines)
        if kind.per == 1:
            found = _of(room.codes, (width, rows))
            np.copyto(found, lines.T)
            return found.view(np.int8)
        pairs = _of(room.values.view(np.uint8), (width, rows))
        np.copyto(pairs, lines.T)
        halves = _of(room.codes, (2 * width, rows))
        each = halves.reshape(width, 2, rows)
        np.bitwise_and(pairs, np.uint8(15), out=each[:, 0])
        np.right_shift(pairs, np.uint8(4), out=each[:, 1])
    halves -= np.uint8(8)
    return halves.view(np.int8)


def numbers(found: NDArray[np.int8], kind: Kind, room: Room) -> NDArray[np.float32]:
    """Codes as float32, of the same shape."""
    values = _of(room.values, found.shape)
    if not kind.mask:
        np.copyto(values, found)
    elif _is_nan(found, kind, room) or not (_LEAST * np.float32(2.0**kind.power)).all():  # a thread may flush subnormals
        np.take(table(kind), found.view(np.uint8), out=values, mode="clip")
    else:
        whole = values.view(np.int32)
        np.copyto(whole, found)
        np.left_shift(whole, kind.shift, out=whole)
        np.bitwise_and(whole.view(np.uint32), np.uint32(kind.mask), out=whole.view(np.uint32))
        np.multiply(values, np.float32(2.0**kind.power), out=values)
    return values


def _is_nan(found: NDArray[np.int8], kind: Kind, room: Room) -> bool:
    """Whether one of them is."""
    if kind.nan is None:
        return False
    plain = np.bitwise_and(found.view(np.uint8), np.uint8(kind.nan), out=_of(room.spare, found.shape))
    return bool(plain.max() == kind.nan)


@cache
def table(kind: Kind) -> NDArray[np.float32]:
    """(256,) numbers by the code of a float."""
    every = np.arange(256, dtype=np.uint8)
    found = np.array(FP4)[every & 15] if kind.per == 2 else every.view(numpy_dtype("F8_E4M3"))
    return found.astype(np.float32)


def floats(stored: NDArray[Any], code: str) -> NDArray[np.float32]:
    """Scales as float32; those of one byte that are no FP8 are exponents (E8M0)."""
    stored = np.ascontiguousarray(stored)
    return _exponents()[stored] if code in ("U8", "F8_E8M0") else stored.view(numpy_dtype(code)).astype(np.float32)


@cache
def _exponents() -> NDArray[np.float32]:
    found = np.ldexp(np.float32(1), np.arange(255) - 127).astype(np.float32)
    return np.append(found, np.float32(np.nan))


def put(values: NDArray[np.float32], out: NDArray[Any]) -> None:
    """float32 as the bits of bfloat16, to nearest even."""
    if out.strides[-1] == out.itemsize:
        np.copyto(out.view(BF16), values, casting="unsafe")
    else:  # casting takes four times as long where results lie apart
        np.copyto(out, values.astype(BF16).view(out.dtype))


def _of(memory: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The beginning of some memory in this shape."""
    return memory[: shape[0] * shape[1]].reshape(shape)
