"""Hash logical tensors, several at a time, and put the digests together.

In: units of reading. Out: `Content`. It knows no layout.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128

from convert import content
from convert.commit.processes import ALONE, Processes
from convert.errors import InputError, one_line, too_little
from convert.options.option import workers
from convert.progress import Progress
from convert.verifier.bits.order import by_place, hold, place_of
from convert.verifier.bits.work import in_order
from convert.verifier.share import joined
from layouts.reader import Reader, is_chunked
from layouts.windows import lengths

FORM = "moe-content-1"
"""The first line of what is hashed; another rule has another one."""
ROWS, TILE = 1 << 20, 64
"""Bytes that are turned at a time, where a tensor is stored along other axes, in squares of so many elements: 1.7 GB/s of
bfloat16, where NumPy turns the whole with 0.7 GB/s."""
BASE = 96 << 20
"""Bytes that the process needs besides what it hashes."""
HUGGING_FACE, OWN = content.TERMS, "the tree's own names and axes"
Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logical:
    """One logical tensor; `pieces` are its bits in the order of its axes."""

    name: str | list[Any]
    dtype: str
    shape: tuple[int, ...]
    pieces: Iterable[NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is read at a time: it begins in `array` at `slices`, and gives some logical tensors. `nbytes` are what it holds.

    `others` are read with it, in the same slices.
    """

    array: str
    slices: Slices
    nbytes: int
    read: Callable[[], Iterator[Logical]]
    others: tuple[str, ...] = ()

    @property
    def arrays(self) -> tuple[str, ...]:
        """All that are read."""
        return self.array, *self.others


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """Of `tensors` logical tensors with `nbytes` of data, in hex: the sha256, and the xxh3-128 that conversions make anyway."""

    sha256: str
    xxh3: str
    tensors: int
    nbytes: int

    def __str__(self) -> str:
        return f"sha256:{self.sha256}"

    def to_dict(self) -> dict[str, str | int]:
        """For programs."""
        return {"sha256": self.sha256, "xxh3": self.xxh3, "tensors": self.tensors, "bytes": self.nbytes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a checkpoint holds: the digest of the `model` and, of a MaxText tree, that of the `state` of its training.

    `terms` says by which names and axes, and `why` why not by those of Hugging Face.
    """

    model: Digest
    terms: str
    state: Digest | None = None
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For programs, and for manifests: nothing of it depends on where the checkpoint is."""
        return {"model": self.model.to_dict(), "state": self.state.to_dict() if self.state else None, "terms": self.terms}

    def told(self, path: object) -> str:
        """As `sha256sum` has it: digest and path; then what else there is to know."""
        lines = [f"{self.model}  {path}", f"xxh3:{self.model.xxh3}  {path}"]
        if self.state:
            lines.append(f"{self.state}  {path}, its training state ({self.state.tensors} tensors)")
        if self.terms != HUGGING_FACE:
            lines.append(f"note: {path}: by {self.terms}: {self.why}")
        return "\n".join(map(one_line, lines))


def rows_of(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """An array in pieces that lie in one piece in memory; one that is stored along other axes is turned tile by tile."""
    if array.flags.c_contiguous or array.ndim < 2:
        yield np.ascontiguousarray(array)
        return
    step = max(TILE, ROWS * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), step):
        rows = array[start : start + step]
        turned = np.empty(rows.shape, rows.dtype)
        for i, j in itertools.product(range(0, len(rows), TILE), range(0, rows.shape[1], TILE)):
            turned[i : i + TILE, j : j + TILE] = rows[i : i + TILE, j : j + TILE]
        yield turned


def digest_of(reader: Reader, units: Sequence[Unit], memory: int, progress: Progress, processes: Processes = ALONE) -> Digest:
    """Read all units and hash what they give, as many at a time as `memory` bytes allow; several processes a part of them each.

    Raises:
        InputError: one cannot be read, here or in another process.
        UsageError: not even one can be held.
    """
    fit = _fit(reader, units, memory)
    hold(reader, {unit.array: lengths(unit.slices) for unit in units}, 1, memory)
    ordered = by_place(units, lambda unit: [place_of(reader, unit.array, unit.slices)])
    own = ordered[processes.stretch([unit.nbytes for unit in ordered])]
    jobs = 1 if reader.windows.shapes else min(fit, workers(None))
    lines, fast, total, wrong = list[str](), list[str](), 0, list[str]()
    try:
        for found, others, nbytes in in_order(hashed, own, jobs):
            lines += found
            fast += others
            total += nbytes
            progress(nbytes)
    except InputError as error:
        if processes.count == 1:
            raise
        wrong = [str(error)]  # the others wait for this one, and say the same
    if wrong := joined(processes, wrong)[0]:
        raise InputError(wrong[0])
    (lines, (total,)), (fast, _) = joined(processes, lines, total), joined(processes, fast)
    whole = hashlib.sha256(f"{FORM}\n".encode())
    for line in sorted(lines):
        whole.update(f"{line}\n".encode())
    return Digest(sha256=whole.hexdigest(), xxh3=content.digest_of(fast), tensors=len(lines), nbytes=total)


def _fit(reader: Reader, units: Sequence[Unit], memory: int) -> int:
    """How many units can be held at a time; what is decoded is held twice."""
    each = (1 + is_chunked(reader)) * max((unit.nbytes for unit in units), default=0) + 2 * ROWS
    if (fit := (memory - BASE) // each) < 1:
        least = BASE + each >> 20
        raise too_little(memory, f"to hash the largest slice takes {least} MiB")
    return fit


def hashed(unit: Unit) -> tuple[list[str], list[str], int]:
    """A line for each logical tensor by sha256, one by xxh3-128, and their bytes."""
    lines, fast, total = list[str](), list[str](), 0
    for each in unit.read():
        digest, other = hashlib.sha256(), xxh3_128()
        for piece in each.pieces:
            digest.update(piece.data if piece.size else b"")
            other.update(piece.data if piece.size else b"")
            total += piece.nbytes
        for found, of in ((lines, digest), (fast, other)):
            found.append(content.line_of(each.name, each.dtype, each.shape, of.hexdigest()))
    return lines, fast, total
