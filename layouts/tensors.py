"""Specs of tensors without data, one by one or as columns, and the words for element types.

In: nothing. Out: `TensorSpec`, `Columns`, and NumPy types for safetensors' codes. It never reads a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

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
    name = DTYPES[code]
    if hasattr(np, name):
        return np.dtype(name)
    import ml_dtypes

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


class Kind(NamedTuple):
    """What tensors have in common but for their names: element type (safetensors code) and stored shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of data of each."""
        return math.prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns(Mapping[str, TensorSpec]):
    """The specs of many tensors by name, made when somebody asks for one: there may be 100,000, of few `kinds`.

    `kind` (T,) is the number of each one's kind. It has no slots, so that it keeps what it has looked up.
    """

    names: Sequence[str]
    kinds: Sequence[Kind]
    kind: NDArray[np.intp]
    _made: dict[str, TensorSpec] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """The place of each name; fewer than there are names where one stands twice."""
        return dict(zip(self.names, range(len(self.names)), strict=True))

    def __getitem__(self, name: str) -> TensorSpec:
        if (found := self._made.get(name)) is None:
            dtype, shape = self.kinds[self.kind[self.rows[name]]]
            found = self._made[name] = TensorSpec(name=name, dtype=dtype, shape=shape)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of each element type that is there."""
        found: dict[str, int] = {}
        for kind, count in zip(self.kinds, np.bincount(self.kind, minlength=len(self.kinds)).tolist(), strict=True):
            found[kind.dtype] = found.get(kind.dtype, 0) + count * kind.nbytes
        return found

    def picked(self, rows: NDArray[np.intp]) -> Picked:
        """Some of the names."""
        return Picked(self.names, rows)

    def of_each_kind(self, names: Picked) -> list[TensorSpec]:
        """Of some of the names, the first of each kind that is there."""
        firsts = dict(zip(reversed(self.kind[names.rows].tolist()), range(len(names) - 1, -1, -1), strict=True))
        return [self[names[at]] for at in sorted(firsts.values())]


@dataclass(frozen=True, slots=True, eq=False)
class Picked(Sequence[str]):
    """Some of many names, by their places (R,): no list of their own."""

    every: Sequence[str]
    rows: NDArray[np.intp]

    def __eq__(self, other: object) -> bool:
        """Whether both are the same names; two that are told to be alike may be of two checkpoints."""
        return isinstance(other, Picked) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Picked: ...
    def __getitem__(self, at: int | slice) -> str | Picked:
        return Picked(self.every, self.rows[at]) if isinstance(at, slice) else self.every[self.rows[at]]

    def __iter__(self) -> Iterator[str]:
        return map(self.every.__getitem__, self.rows.tolist())


def columns(tensors: Mapping[str, TensorSpec]) -> Columns:
    """The same as columns."""
    if isinstance(tensors, Columns):
        return tensors
    kinds = [Kind(spec.dtype, spec.shape) for spec in tensors.values()]
    known = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    kind = np.fromiter(map(known.__getitem__, kinds), np.intp, len(kinds))
    return Columns(names=list(tensors), kinds=list(known), kind=kind)


def total_bytes(tensors: Mapping[str, TensorSpec]) -> int:
    """Bytes of all: of many tensors there are few kinds."""
    return sum(columns(tensors).nbytes.values())


def joined(each: Sequence[Columns]) -> Columns:
    """The tensors of several, one behind the other."""
    known = {kind: number for number, kind in enumerate(dict.fromkeys(itertools.chain(*(one.kinds for one in each))))}
    kind = [np.array([known[kind] for kind in one.kinds], np.intp)[one.kind] for one in each]
    names = list(itertools.chain(*(one.names for one in each)))
    return Columns(names=names, kinds=list(known), kind=np.concatenate([np.empty(0, np.intp), *kind]))
