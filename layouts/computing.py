"""A checkpoint with some of its tensors computed: each value times one number, as MaxText has it for some models.

In: an open checkpoint, factors. Out: a reader of what these make, or one of what they were made of, where that is kept. It
never decides which tensors they are for, or whether what is kept is theirs.

The product is taken in float32 and rounded once to the type of the tensor, to nearest even, as MaxText's converter does it
(`checkpoint_conversion/utils/param_mapping.py`, `scale_query_layer`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Empty, Extent
from layouts.errors import InputError
from layouts.hf import HFReader
from layouts.hf.header import read_shard
from layouts.reader import Reader
from layouts.side_files import ORIGINALS
from layouts.tensors import TensorSpec, bits, numpy_dtype
from layouts.through import Through

TYPES = ("BF16", "F16", "F32")
"""Element types that are computed."""
_PART = 1 << 17
"""Elements computed at a time: they stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputingReader(Through):
    """See `layouts.reader.Reader`; `factors` are for the tensors of these names."""

    factors: Mapping[str, float]

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """As they are."""
        return self.inner.tensors

    def extent(self, name: str) -> Extent | None:
        """None of what is computed: it may not be read past `read`."""
        return None if name in self.factors else self.inner.extent(name)

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block as bits, computed where there is a factor."""
        if name not in self.factors:
            return self.inner.read(name, slices, empty)
        spec, factor = self.tensors[name], np.float32(self.factors[name])
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


def computing(reader: Reader, factors: Mapping[str, float]) -> Reader:
    """The checkpoint with these tensors computed; itself if there are none."""
    return ComputingReader(inner=reader, factors=factors) if factors else reader


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
