"""What bytes stand for: tables of 256 entries, so that nothing is computed twice.

In: words of the table of formats. Out: arrays. It never reads a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.tensors import bits, numpy_dtype

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""E2M1 by its four bits; the lower half of a byte comes first."""
PER_BYTE: Mapping[str, int] = {"e4m3": 1, "int8": 1, "int8+128": 1, "e2m1": 2, "int4": 2}
"""The values of a byte."""


@cache
def table(values: str) -> NDArray[Any]:
    """(256,) words of all floats of a byte in float32: NumPy looks up words several times as fast as rows."""
    every = np.arange(256)
    halves = np.stack((every & 15, every >> 4), 1)
    tables = {
        "e4m3": every.astype("u1").view(numpy_dtype("F8_E4M3"))[:, None],
        "e2m1": np.array(FP4)[halves],
    }
    return tables[values].astype(np.float32).view(f"u{4 * PER_BYTE[values]}")[:, 0]


def unpacked(raw: NDArray[Any], values: str) -> NDArray[np.float32]:
    """(rows, bytes) as (rows, values): integers are taken apart by arithmetic, which takes half the time of looking them up."""
    if values == "int4":
        wide = raw.astype(np.uint16)
        wide |= wide << 4
        wide &= 0x0F0F  # two values in turn, the lower half of a byte first
        raw = wide.view(np.uint8)
        raw -= 8
    elif values == "int8+128":
        raw = raw ^ np.uint8(128)
    elif values != "int8":
        return np.take(table(values), raw).view(np.float32)
    return raw.view(np.int8).astype(np.float32)


def floats(stored: NDArray[Any], code: str) -> NDArray[np.float32]:
    """Scales as float32; those of one byte that are no FP8 are exponents (E8M0)."""
    stored = np.ascontiguousarray(stored)
    return _exponents()[stored] if code in ("U8", "F8_E8M0") else stored.view(numpy_dtype(code)).astype(np.float32)


@cache
def _exponents() -> NDArray[np.float32]:
    found = np.ldexp(np.float32(1), np.arange(255) - 127).astype(np.float32)
    return np.append(found, np.float32(np.nan))


@lru_cache(maxsize=64)
def products(values: str, code: str, second: float | None, *, divides: bool) -> NDArray[Any]:
    """(65536,) words of all values of a byte in bfloat16: entry 256 * scale + byte."""
    scales = floats(np.arange(256, dtype="u1"), code)
    with np.errstate(all="ignore"):
        if second is not None:
            scales = scales / np.float32(second) if divides else scales * np.float32(second)
        found = rounded(scales[:, None] * table(values).view(np.float32))
    return found.reshape(65536, -1).view(f"u{2 * PER_BYTE[values]}")[:, 0]


def rounded(values: NDArray[np.float32]) -> NDArray[Any]:
    """float32 as the bits of bfloat16, to nearest even."""
    with np.errstate(all="ignore"):
        return values.astype(numpy_dtype("BF16")).view(bits("BF16"))
