"""Read many short runs of bytes out of files, those that are near one another together.

In: runs, and where each is to stand in memory. Out: their bytes there. It never reads more at a time than `cover` of a file.

A checkpoint may have 100,000 tensors of a few bytes: a call for each costs more than all of their bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layouts.disk.pread import Ranged


class Part(NamedTuple):
    """`nbytes` of a file from `start`, that are to stand at `at` in memory."""

    file: Ranged
    start: int
    nbytes: int
    at: int


def gather(parts: Iterable[Part], out: memoryview) -> None:
    """Put these parts in their places; the rest of `out` stays as it is.

    Raises:
        InputError, OSError: see `InputFile.read`.
    """
    files: dict[int, list[Part]] = {}
    for part in parts:
        files.setdefault(id(part.file), []).append(part)
    for held in files.values():
        held.sort(key=itemgetter(1))
        gap, cover = held[0].file.gap, held[0].file.cover
        run, begin, end = [held[0]], held[0].start, held[0].start + held[0].nbytes
        for part in held[1:]:
            _, start, nbytes, _ = part
            if start > end + gap or start + nbytes - begin > cover:
                _read(run, begin, end, out)
                run, begin, end = [], start, start
            run.append(part)
            end = max(end, start + nbytes)
        _read(run, begin, end, out)


def gathered(file: Ranged, starts: NDArray[np.int64], nbytes: int) -> NDArray[np.uint8]:
    """(R, nbytes): so many bytes from each of `starts` (R,) of a file.

    Raises:
        InputError, OSError: see `InputFile.read`.
    """
    out = np.empty((len(starts), nbytes), np.uint8)
    order = starts.argsort(kind="stable")
    near = starts[order]
    far = np.diff(near) > nbytes + file.gap
    runs = np.concatenate([[0], far.cumsum()])
    begins = near[np.concatenate([[True], far])][runs]
    change = far | (np.diff((near - begins) // file.cover) > 0)
    for rows in np.split(order, change.nonzero()[0] + 1):
        at = starts[rows]
        if len(rows) == 1:
            file.read(out[rows[0]].data, int(at[0]))
            continue
        held = np.empty(at[-1] - at[0] + nbytes, np.uint8)
        file.read(held.data, int(at[0]))
        out[rows] = held[(at - at[0])[:, None] + np.arange(nbytes)]
    return out


def _read(run: Sequence[Part], begin: int, end: int, out: memoryview) -> None:
    """Parts that lie between `begin` and `end` of a file, in one call."""
    file, _, nbytes, at = run[0]
    if len(run) == 1:
        file.read(out[at : at + nbytes], begin)
        return
    held = memoryview(bytearray(end - begin))
    file.read(held, begin)
    for _, start, nbytes, at in run:
        out[at : at + nbytes] = held[start - begin : start - begin + nbytes]
