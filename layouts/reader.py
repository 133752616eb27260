"""What a checkpoint is to the rest of the tool: the `Reader` protocol, and what reading costs.

In: nothing; `layouts.checkpoint` opens readers. Out: the words in which every reader is asked. It knows no format.
`Reader` and `Writer` (`convert.engine.writer`) are the only two seams where formats differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Empty, Extent, Extents
from layouts.side_files import SideFiles
from layouts.tensors import TensorSpec
from layouts.windows import Windows


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadUnit:
    """What reading any element of a tensor has to decode: a chunk of this shape, `nbytes` large once it is decoded.

    A `streamable` chunk can be decoded piece by piece, from front to back.
    """

    shape: tuple[int, ...]
    nbytes: int
    streamable: bool

    def streams(self, above: int) -> bool:
        """Whether it is decoded piece by piece, if chunks above this size are."""
        return self.streamable and self.nbytes > above


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """What reading may hold, in bytes.

    `cache` is for decoded chunks. Chunks above `stream` are decoded piece by piece, as far as their codec can be; `streams` of
    them are open at a time, or as many as one read takes. `threads` decode at a time.
    """

    cache: int = 256 << 20
    stream: int = 512 << 20
    streams: int = 32
    threads: int | None = None

    @property
    def at_once(self) -> int:
        """Chunks of a window that are on their way at a time."""
        return (self.threads or 4) + 1


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
        """`config.json`, which also lies beside an Orbax item that came from Hugging Face; empty where there is none."""

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What this tool wrote about the layout of this checkpoint, if it made it."""

    @property
    def records(self) -> Mapping[str, Any]:
        """The same from each other place where it stands, by that place; they have to agree."""

    @property
    def side_files(self) -> SideFiles:
        """All files that hold none of the tensors, by their names from `path`."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the files that hold the tensors, by name, where files can be made again from them; else empty."""

    @property
    def windows(self) -> Windows:
        """Parts of arrays that stay decoded while they are read bit by bit; see `hold`."""

    def where(self, name: str) -> str:
        """The place of a tensor, for messages: a shard's name."""

    def unit(self, name: str) -> ReadUnit | None:
        """What reading a part of a tensor costs; None where any part can be read alone."""

    def extent(self, name: str) -> Extent | None:
        """Where a tensor lies as it is read. None where it is decoded or computed."""

    def extents(self, names: Sequence[str]) -> Iterable[Extents] | None:
        """The same of many at once, file by file. None where some may be decoded or computed."""

    def hold(self, limits: ReadLimits, windows: Windows) -> None:
        """Read within these limits, and through these windows, from now on; nothing for who decodes nothing."""

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block of the stored tensor as bits (see `bits`): in memory that `empty` gives, or where it was decoded anyway.

        It must not be written to. It stays good for as long as the memory that `empty` gave does.
        """

    def close(self) -> None:
        """Let go of all."""


def is_chunked(reader: Reader) -> bool:
    """Whether tensors are stored in chunks that are decoded as a whole; all of a checkpoint are, or none."""
    return any(reader.unit(name) is not None for name in itertools.islice(reader.tensors, 1))


def remarks_of(reader: Reader) -> tuple[str, ...]:
    """What is to be told of the files that a checkpoint was read from, for those who read some."""
    return tuple(getattr(reader, "remarks", ()))


def scattered_of(reader: Reader) -> Collection[str]:
    """The tensors that are computed into what `empty` gives, whatever its strides: nobody needs to copy them from there."""
    found: Collection[str] = getattr(reader, "scattered", ())
    return found


def held_by(reader: Reader) -> int:
    """Bytes that each thread that reads holds beside what `empty` gives."""
    return int(getattr(reader, "held", 0))
