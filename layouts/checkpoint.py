"""What a checkpoint is to the rest of the tool: specs without data, a reader, and the words for element types.

`Reader` and `Writer` (in `convert.hf.execute`) are the only two seams where formats differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from layouts.errors import InputError
from layouts.places import is_remote, place
from layouts.tensors import TensorSpec


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
    from layouts.orbax.reader import OrbaxReader, find_item

    if (item := find_item(path)) is not None:
        return OrbaxReader.open(path, item)
    raise InputError(f"{path}: neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here")
