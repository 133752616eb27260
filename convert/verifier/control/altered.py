"""A checkpoint of which some bits are others, in memory alone.

In: an open checkpoint, tensors, elements, bits. Out: a reader. It never writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Empty
from layouts.reader import Reader, ReadLimits, ReadUnit
from layouts.side_files import SideFiles
from layouts.tensors import TensorSpec
from layouts.windows import Windows


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
class AlteredReader:
    """`inner` with some bits flipped; see `layouts.reader.Reader`."""

    inner: Reader
    flips: tuple[Flip, ...]

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return self.inner.path

    @property
    def format(self) -> str:
        """As it is."""
        return self.inner.format

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """As they are."""
        return self.inner.tensors

    @property
    def config(self) -> Mapping[str, Any]:
        """As it is."""
        return self.inner.config

    @property
    def record(self) -> Mapping[str, Any] | None:
        """As it is."""
        return self.inner.record

    @property
    def records(self) -> Mapping[str, Any]:
        """As they are."""
        return self.inner.records

    @property
    def side_files(self) -> SideFiles:
        """As they are."""
        return self.inner.side_files

    @property
    def headers(self) -> Mapping[str, str]:
        """As they are."""
        return self.inner.headers

    @property
    def custom_metadata(self) -> Any:
        """Of a tree, as it is."""
        return getattr(self.inner, "custom_metadata", None)

    @property
    def windows(self) -> Windows:
        """As they are."""
        return self.inner.windows

    def where(self, name: str) -> str:
        """As it is."""
        return self.inner.where(name)

    def unit(self, name: str) -> ReadUnit | None:
        """As it is."""
        return self.inner.unit(name)

    def extent(self, name: str) -> None:  # noqa: ARG002
        """None: nothing may be read past `read`."""
        return

    def hold(self, limits: ReadLimits, windows: Windows) -> None:
        """As the checkpoint does."""
        self.inner.hold(limits, windows)

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
