"""A checkpoint of which some bits are others, in memory alone.

In: an open checkpoint, tensors, elements, bits. Out: a reader. It never writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Empty
from layouts.tensors import TensorSpec
from layouts.through import Through


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """A `bit` of the element of a tensor at `at`."""

    name: str
    at: tuple[int, ...]
    bit: int

    def within(self, slices: tuple[slice, ...]) -> bool:
        """Whether a block holds it."""
        return all(part.start <= i < part.stop for part, i in zip(slices, self.at, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class AlteredReader(Through):
    """`inner` with some bits flipped; see `layouts.reader.Reader`."""

    flips: tuple[Flip, ...]

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """As they are."""
        return self.inner.tensors

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block, with the bits flipped that it holds."""
        block = self.inner.read(name, slices, empty)
        spans = tuple(slice(*part.indices(size)) for part, size in zip(slices, self.tensors[name].shape, strict=True))
        for flip in self.flips:
            if name == flip.name and flip.within(spans):
                block = block.copy()
                block[tuple(i - span.start for i, span in zip(flip.at, spans, strict=True))] ^= block.dtype.type(1 << flip.bit)
        return block

    def close(self) -> None:
        """The checkpoint is closed by who opened it."""
