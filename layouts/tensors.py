"""Specs of tensors without data, and the words for element types.

In: nothing. Out: `TensorSpec`, and NumPy types for safetensors' codes. It never reads a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from layouts.errors import InputError

DTYPES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
"""safetensors' code of every element type that fills whole bytes -> its NumPy (ml_dtypes) name."""

_SIZES = {code: {"BOOL": 1, "BF16": 2}.get(code) or int(code.split("_")[0].lstrip("UIFC")) // 8 for code in DTYPES}
"""Bytes per element: looked up for every tensor, many times."""


def numpy_dtype(code: str) -> np.dtype[Any]:
    """The NumPy type of a safetensors code, for code that computes; copying uses `bits` and never needs it."""
    import ml_dtypes

    name = DTYPES[code]
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def itemsize(code: str) -> int:
    """Bytes per element.

    Raises:
        InputError: an element type that this tool does not know, or one that is packed below a byte.
    """
    if (size := _SIZES.get(code)) is None:
        raise InputError(f"element type {code!r} is not supported; known: {', '.join(DTYPES)}")
    return size


def bits(code: str) -> np.dtype[Any]:
    """The unsigned integer of the same width: data is moved as bits, so that NaN payloads survive."""
    return np.dtype(f"u{itemsize(code)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, element type (safetensors code) and stored shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return math.prod(self.shape) * (_SIZES.get(self.dtype) or itemsize(self.dtype))
