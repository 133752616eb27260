"""A checkpoint that is read as another one: what any reader says that shows another reader with something changed.

In: an open checkpoint. Out: what it says, unchanged. Who derives from it says what is different, and nothing else; here
that is the names of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Empty, Extent
from layouts.reader import Reader, ReadLimits, ReadUnit, held_by, remarks_of
from layouts.side_files import SideFiles
from layouts.tensors import TensorSpec
from layouts.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Through:
    """See `layouts.reader.Reader`, of which `tensors` and `read` are left to whoever derives from it; `inner` is asked."""

    inner: Reader

    @property
    def path(self) -> Path:
        """The directory as the user gave it."""
        return self.inner.path

    @property
    def format(self) -> str:
        """That of the checkpoint."""
        return self.inner.format

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
    def remarks(self) -> tuple[str, ...]:
        """As they are."""
        return remarks_of(self.inner)

    @property
    def held(self) -> int:
        """As the checkpoint does."""
        return held_by(self.inner)

    @property
    def windows(self) -> Windows:
        """Those of the checkpoint."""
        return self.inner.windows

    def where(self, name: str) -> str:
        """As it is."""
        return self.inner.where(name)

    def unit(self, name: str) -> ReadUnit | None:
        """As it is."""
        return self.inner.unit(name)

    def extent(self, name: str) -> Extent | None:  # noqa: ARG002
        """None: nothing may be read past `read`."""
        return None

    def extents(self, names: Sequence[str]) -> None:
        """None, as `extent`."""

    def hold(self, limits: ReadLimits, windows: Windows) -> None:
        """As the checkpoint does."""
        self.inner.hold(limits, windows)

    def close(self) -> None:
        """Close the checkpoint."""
        self.inner.close()


@dataclass(frozen=True, kw_only=True)
class RenamedReader(Through):
    """See `layouts.reader.Reader`; `names` are those in the checkpoint, by those that tensors have here."""

    names: Mapping[str, str]

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """All of them, by their names here."""
        return {name: replace(self.inner.tensors[stored], name=name) for name, stored in self.names.items()}

    def where(self, name: str) -> str:
        """Where it is, and what it is called there."""
        stored = self.names[name]
        return f"{self.inner.where(stored)}{'' if stored == name else f' as {stored}'}"

    def unit(self, name: str) -> ReadUnit | None:
        """As it is."""
        return self.inner.unit(self.names[name])

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """As it is."""
        return self.inner.read(self.names[name], slices, empty)

    def hold(self, limits: ReadLimits, windows: Windows) -> None:
        """As the checkpoint does, in whose names it reads; windows keep the names that they have here."""
        called = {stored: name for name, stored in self.names.items()}
        self.inner.hold(limits, replace(windows, called=called))
