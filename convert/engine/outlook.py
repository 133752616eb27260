"""What a conversion is about to read and to write, how much of that is padding, and the room on the disk.

In: a plan, and the open input. Out: numbers, and one line for people. It reads no data, so that
the time that it tells is an assumption about the disk, which stands beside it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from convert.errors import StorageError
from convert.options.values import in_time
from convert.options.values import in_units as size
from convert.planning.across.computed import kept_bytes
from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.checkpoint import FORMATS
from layouts.disk.places import is_remote
from layouts.reader import Reader, is_chunked
from layouts.tensors import total_bytes
from layouts.through import Through

RATE = 1_000_000_000
"""Bytes a second, read and written together: a round number below those of local disks in `scripts/README.md`."""
SHORT = 10.0
"""Seconds of which nothing is said."""


class Planned(Protocol):
    """What is asked of a plan; that of an adapter has no padding."""

    @property
    def out(self) -> Path:
        """The place of the output."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in it."""

    @property
    def side_files(self) -> Mapping[str, int]:
        """The files that are copied as they are: name -> bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """Sizes in bytes: of tensors and side files together, but for `padding`, the zeros among what is written.

    Chunks of Orbax may be compressed, so that what is on the disk is less. `free` is None where nobody knows, as in a store.
    """

    read: int
    write: int
    padding: int
    free: int | None
    out: Path
    padded_by: str = ""
    """The layout that pads, as the user asks for it."""
    chunked: tuple[bool, bool] = (False, False)
    """Whether what is read, and what is written, may be compressed."""

    @property
    def seconds(self) -> float:
        """How long it takes where both together go at `RATE`."""
        return (self.read + self.write) / RATE

    def __str__(self) -> str:
        read, write = (f"{'up to ' * may}{size(n)}" for may, n in zip(self.chunked, (self.read, self.write), strict=True))
        left = "" if self.free is None else f", {size(self.free)} free"
        pads = f"; {self.padded_by} makes {size(self.write - self.padding)} into {size(self.write)}: padding"
        time = f", {in_time(self.seconds)} at {size(RATE)}/s" if self.seconds >= SHORT else ""
        return f"{read} to read, {write} to write{left}{time}{pads if self.padding else ''}"

    def check(self) -> None:
        """See that there is room.

        Raises:
            StorageError: there is too little, so that the run would stop at its beginning.
        """
        if self.free is not None and self.write > self.free and not self.chunked[1]:  # nobody knows how far chunks shrink
            there = _folder(self.out)
            raise StorageError(f"{there}: the disk is too small: {self.write:,} bytes are needed, {self.free:,} are free")


def outlook(plan: Planned, reader: Reader) -> Outlook:
    """What the conversion of this open input will take."""
    beside = sum(plan.side_files.values())
    if not isinstance(plan, Plan):
        return Outlook(read=_stored(reader) + beside, write=plan.nbytes + beside, padding=0, free=_free(plan.out), out=plan.out)
    padded = [(first, count) for first, count in plan.targets.forms if first.target.pattern.padding]
    padding = sum((first.spec.nbytes - _real(first)) * count for first, count in padded)
    shards = next((first.target.pattern.fixed["s"] for first, _ in padded if "s" in first.target.pattern.fixed), None)
    return Outlook(
        read=_read(plan, reader, plan.nbytes - padding) + beside,
        write=plan.nbytes + kept_bytes(plan) + beside,
        padding=padding,
        free=_free(plan.out),
        out=plan.out,
        padded_by=plan.layout + (f" --shards {shards}" if shards else ""),
        chunked=(is_chunked(reader), FORMATS[plan.format].chunked),
    )


def _read(plan: Plan, reader: Reader, real: int) -> int:
    """Bytes of the tensors that are read: what is written is what was read, unless it is computed."""
    if plan.merging:
        return real + plan.merging.nbytes
    if plan.computed:
        return _stored(reader.inner if isinstance(reader, Through) else reader)
    return real + sum(reader.tensors[name].nbytes for pair in plan.twins for name in pair)


def _stored(reader: Reader) -> int:
    return total_bytes(reader.tensors)


def _real(target: Target) -> int:
    """Bytes of a padded tensor without the zeros behind its real rows and columns."""
    pattern = target.target.pattern
    real, stored = (math.prod(sizes[axis] for axis in pattern.axes) for sizes in (target.sizes, pattern.stored(target.sizes)))
    return target.spec.nbytes * real // stored if stored else 0


def _folder(out: Path) -> Path:
    """The nearest folder above the output that is there already."""
    return next(folder for folder in Path(os.path.abspath(out)).parents if folder.is_dir())


def _free(out: Path) -> int | None:
    if is_remote(out):
        return None
    with suppress(OSError):  # that is told better by who writes there
        disk = os.statvfs(_folder(out))
        return disk.f_bavail * disk.f_frsize
    return None
