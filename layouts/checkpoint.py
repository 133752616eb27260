"""What a checkpoint is to the rest of the tool: specs without data, a reader, and the words for element types.

`Reader` and `Writer` (in `convert.execute`) are the only two seams where formats differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from layouts.errors import InputError
from layouts.places import is_remote, place

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
    sizes = {"BOOL": 1, "BF16": 2, "C64": 8}
    if code not in DTYPES:
        raise InputError(f"element type {code!r} is not supported; known: {', '.join(DTYPES)}")
    return sizes.get(code) or int(code.split("_")[0].lstrip("UIF")) // 8


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
        return math.prod(self.shape) * itemsize(self.dtype)


class Reader(Protocol):
    """An open checkpoint: tensors by name, and what else lies in its directory."""

    @property
    def path(self) -> Path:
        """The directory as the user gave it."""

    @property
    def format(self) -> str:
        """`hf` or `orbax`."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor, in the order in which it is best read."""

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json`, or nothing for formats without one."""

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What this tool wrote about the layout of this checkpoint, if it made it."""

    @property
    def side_files(self) -> Sequence[str]:
        """Paths, relative to `path`, of all files that hold no tensors."""

    def where(self, name: str) -> str:
        """The place of a tensor, for messages: a shard's name."""

    def read(self, name: str, slices: tuple[slice, ...]) -> NDArray[Any]:
        """A block of the stored tensor as bits (see `bits`); it may be a read-only view of the file."""

    def release(self, name: str, slices: tuple[slice, ...]) -> None:
        """Let go of the memory behind a block; what `read` gave for these slices must no longer be used."""

    def close(self) -> None:
        """Let go of all."""


def open_checkpoint(path: str | Path) -> Reader:
    """Open a checkpoint directory, whichever format it is in; an Orbax one may lie in a store (`gs://`, `s3://`).

    Raises:
        InputError: there is none, or it is corrupt.
    """
    from layouts.hf import HFReader, is_checkpoint

    path = place(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; give the directory that holds the checkpoint")
    if is_checkpoint(path):
        if is_remote(path):
            raise InputError(f"{path}: safetensors are mapped, so they must lie on a disk; copy them there first")
        return HFReader.open(path)
    from layouts.orbax import OrbaxReader, find_item

    if (item := find_item(path)) is not None:
        return OrbaxReader.open(path, item)
    raise InputError(f"{path}: neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here")
