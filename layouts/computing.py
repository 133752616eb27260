"""A checkpoint with some of its tensors computed, as MaxText has them for some models: times one number, of another type, ones.

In: an open checkpoint, what to compute. Out: a reader of what this makes, or one of what it was made of, where that is kept.
It never decides which tensors they are, or whether what is kept is theirs.

A product is taken in float32 and rounded once to the type of the tensor, to nearest even, as MaxText's converter does it
(`checkpoint_conversion/utils/param_mapping.py`, `scale_query_layer`). Of another type are only values that both types have.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Empty, Extent
from layouts.errors import InputError
from layouts.hf import HFReader
from layouts.hf.header import read_shard
from layouts.reader import Reader, ReadUnit, scattered_of
from layouts.side_files import ORIGINALS
from layouts.tensors import TensorSpec, bits, numpy_dtype
from layouts.through import Through

TYPES = ("BF16", "F16", "F32")
"""Element types that are computed."""
_PART = 1 << 17
"""Elements computed at a time: they stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What is computed, by names of tensors: by what their values are multiplied, of what type they are to be, which are ones.

    Of what are ones, a checkpoint of Hugging Face has none, and a tree has them.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    ones: Mapping[str, TensorSpec] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is computed."""
        return bool(self.factors or self.types or self.ones)


NOTHING = Values()


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputingReader(Through):
    """See `layouts.reader.Reader`; `tensors` are those that there are, with other types, and `made` ones besides."""

    values: Values
    tensors: Mapping[str, TensorSpec]
    made: Mapping[str, TensorSpec]

    @property
    def scattered(self) -> Collection[str]:
        """Those of the checkpoint: what is multiplied goes where it is wanted, too, and what gets another type is small."""
        return scattered_of(self.inner)

    def where(self, name: str) -> str:
        """As it is; nowhere for what the checkpoint does not have."""
        return "no file" if name in self.made else self.inner.where(name)

    def unit(self, name: str) -> ReadUnit | None:
        """As it is."""
        return None if name in self.made else self.inner.unit(name)

    def extent(self, name: str) -> Extent | None:
        """None of what is computed: it may not be read past `read`."""
        computed = name in self.values.factors or name in self.values.types or name in self.made
        return None if computed else self.inner.extent(name)

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block as bits, computed where it is to be.

        Raises:
            InputError: a value is none of the other type.
        """
        if name in self.values.types:
            return self._converted(name, self.inner.read(name, slices))
        if name in self.made:
            spec = self.made[name]
            lengths = [len(range(*cut.indices(size))) for cut, size in zip(slices, spec.shape, strict=True)]
            return ones(lengths, spec.dtype)
        if name not in self.values.factors:
            return self.inner.read(name, slices, empty)
        return self._times(name, slices, empty)

    def _converted(self, name: str, block: NDArray[Any]) -> NDArray[Any]:
        """Values of another type, if each of them comes back: 2**24 + 1, -0.0 and 0.5 do not."""
        was, code = (numpy_dtype(reader.tensors[name].dtype) for reader in (self.inner, self))
        values = np.ascontiguousarray(block).view(was)
        with np.errstate(all="ignore"):
            found = values.astype(code)
            lost = found.astype(was).view(block.dtype) != block
        if was.kind == "f":
            lost |= ~(np.abs(values) < 2.0**63)  # where a processor makes the largest integer of all that is larger
        if lost.any():
            raise InputError(
                f"{self.path}: {name} (in {self.where(name)}) holds {values[lost][0]!s}, and no {code} is the same; it is no "
                f"table of experts"
            )
        return found.view(bits(self.tensors[name].dtype))

    def _times(self, name: str, slices: tuple[slice, ...], empty: Empty) -> NDArray[Any]:
        spec, factor = self.tensors[name], np.float32(self.values.factors[name])
        spans = [range(*cut.indices(size)) for cut, size in zip(slices, spec.shape, strict=True)]
        out, dtype = empty([len(span) for span in spans], bits(spec.dtype)), numpy_dtype(spec.dtype)
        rows, step = spans[0], max(1, _PART // max(1, math.prod(map(len, spans[1:]))))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            block = np.ascontiguousarray(self.inner.read(name, (slice(part.start, part.stop), *slices[1:])))
            with np.errstate(all="ignore"):
                values = block.view(dtype).astype(np.float32) * factor
                out[start : start + len(part)] = values.astype(dtype).view(out.dtype)
        return out


def computing(reader: Reader, values: Values) -> Reader:
    """The checkpoint with these tensors computed; itself if there are none."""
    if not values:
        return reader
    made = {name: spec for name, spec in values.ones.items() if name not in reader.tensors}
    others = {name: replace(reader.tensors[name], dtype=code) for name, code in values.types.items()}
    tensors = {**reader.tensors, **others, **made} if made or others else reader.tensors
    return ComputingReader(inner=reader, values=values, tensors=tensors, made=made)


def ones(shape: Sequence[int], code: str) -> NDArray[Any]:
    """So many ones, as bits."""
    return np.ones(shape, numpy_dtype(code)).view(bits(code))


def uncomputed(reader: Reader) -> Reader:
    """The checkpoint as it is stored, of one that `computing` made."""
    return reader.inner if isinstance(reader, ComputingReader) else reader


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalsReader(Through):
    """A tree with the originals of computed tensors in their place: same names, shapes and types, the values as they were."""

    kept: Reader
    names: frozenset[str]
    """The computed tensors: no others are replaced."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """As they are."""
        return self.inner.tensors

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block as bits."""
        return (self.kept if name in self.names else self.inner).read(name, slices, empty)

    def close(self) -> None:
        """Close both."""
        self.kept.close()
        self.inner.close()


def open_originals(reader: Reader) -> Reader | None:
    """The originals of computed tensors that a tree keeps, if it does; the caller closes them. It opens no other file.

    Raises:
        InputError: they are damaged, or hold something else than tensors of the tree.
    """
    if ORIGINALS not in reader.side_files.plain:
        return None
    place = reader.path / ORIGINALS
    kept = HFReader.of(place.parent, read_shard(place))
    for name, spec in kept.tensors.items():
        if reader.tensors.get(name) != spec:
            raise InputError(
                f"{place}: it holds {name} as {spec.dtype} {spec.shape}, and the tree has no such tensor; "
                f"restore the file, or remove it to have values computed"
            )
    return kept
