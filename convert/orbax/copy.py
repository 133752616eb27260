"""Copy files as they are, while the chunks in them are hashed.

In: files to copy and chunks to hash. Out: durable copies, and digests. It never decodes a chunk.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from io import FileIO
from queue import SimpleQueue
from typing import TypeVar

import numpy as np

from convert.commit.below import free
from convert.commit.files import Folder
from convert.commit.processes import Processes
from convert.commit.stage import Stage
from convert.engine.budget import SYNC
from convert.engine.direct import Output, Scratch
from convert.errors import readable
from convert.orbax.budget import OrbaxBudget
from convert.orbax.keeping.keep import Kept, kept_chunks
from convert.orbax.keeping.moves import Move
from convert.orbax.portions import Portion, total
from convert.progress import Progress
from layouts.errors import InputError
from layouts.orbax.digest import stored_digest

_STEP = 64 << 20
"""Bytes of a file that a worker copies at a time."""
_Thing = TypeVar("_Thing")
_Made = TypeVar("_Made")


def copy_and_hash(
    item: Folder,
    moves: Sequence[Move],
    stage: Stage,
    copied: bool,
    portions: Sequence[Portion],
    kept: Kept,
    budget: OrbaxBudget,
    progress: Progress,
    processes: Processes,
    beside: int,
) -> dict[str, str]:
    """Copy the files, durably, if an earlier run has not `copied` them, and hash what it has not; the new digests by `key`.

    Of several processes, each copies and hashes its share. The disk must have room for `beside` more bytes, of side files.

    Raises:
        OSError: the disk is full or failing.
        InputError: data of the input cannot be read.
    """
    first = [move for move in moves if move.own and processes.first]
    rest = [move for move in moves if not move.own and not copied]
    share = first + [rest[number] for number in processes.mine([move.nbytes for move in rest])]
    copier = _Copier(jobs=budget.jobs, box=budget.box, beside=beside)
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copier.copy, share, item)
        try:
            digests: dict[str, str] = {}
            own = [portions[number] for number in processes.mine([portion.nbytes for portion in portions])]
            progress(total(portion for portion in own if portion.key in stage.done))
            left = [portion for portion in own if portion.key not in stage.done]
            hashed = _told(_hashed(left, kept, budget.jobs, copier.stop), progress)
            for fresh in _batches(hashed):
                if copying.done():
                    copying.result()
                stage.record({portion.key: digest for portion, digest in fresh})
                digests |= {portion.key: digest for portion, digest in fresh}
            copying.result()
        except BaseException:
            copier.stop.set()
            raise
    return digests


def _told(found: Iterable[tuple[Portion, str]], progress: Progress) -> Iterator[tuple[Portion, str]]:
    """The same, each counted as soon as it is hashed and not once it is worth a line in the journal."""
    for portion, digest in found:
        progress(portion.nbytes)
        yield portion, digest


def _hashed(portions: Sequence[Portion], kept: Kept, jobs: int, stop: threading.Event) -> Iterator[tuple[Portion, str]]:
    """Hash several at a time, the largest first; each as it is finished."""

    def told(_: int) -> None:
        if stop.is_set():
            raise InterruptedError("stopped")

    def work(portion: Portion) -> tuple[Portion, str]:
        with readable(kept.reader.path):
            return portion, stored_digest(kept.reader, kept_chunks(portion.target, kept, portion.rows), told)

    return _each(work, sorted(portions, key=lambda portion: -portion.nbytes), jobs, stop)


def _each(work: Callable[[_Thing], _Made], things: Iterable[_Thing], jobs: int, stop: threading.Event) -> Iterator[_Made]:
    """What `work` makes of each thing, as it is finished; an error stops the others."""
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(work, thing) for thing in things]
        try:
            for future in as_completed(running):
                yield future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _batches(found: Iterable[tuple[Portion, str]]) -> Iterator[list[tuple[Portion, str]]]:
    """Digests, as many at a time as are worth a line in the journal."""
    fresh: list[tuple[Portion, str]] = []
    nbytes = 0
    for portion, digest in found:
        fresh.append((portion, digest))
        nbytes += portion.nbytes
        if nbytes > SYNC:
            yield fresh
            fresh, nbytes = [], 0
    yield fresh


@dataclass(slots=True, kw_only=True)
class _Copier:
    """Copies files with `jobs` workers, each with a block of `box` bytes; a large file is shared by them."""

    jobs: int
    box: int
    beside: int
    stop: threading.Event = field(default_factory=threading.Event)
    _idle: SimpleQueue[Scratch] = field(default_factory=SimpleQueue)

    def copy(self, moves: Sequence[Move], folder: Folder) -> None:
        """Copy all files into a folder; they are durable on return.

        Raises:
            OSError: the disk is full or failing.
            InputError: a file is shorter than it was.
        """
        needed, left = self.beside + sum(move.nbytes for move in moves), free(folder)
        if needed > left:
            text = f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed, {left:,} are free"
            raise OSError(errno.ENOSPC, text, str(folder.path))
        for _ in range(self.jobs):
            self._idle.put(Scratch(self.box))
        spans = ((move, at) for move in moves for at in range(0, max(1, move.nbytes), _STEP))
        deque(_each(lambda move: folder.reserve(move.target, move.nbytes, anew=True), moves, self.jobs, self.stop), 0)
        deque(_each(partial(self._span, folder), spans, self.jobs, self.stop), 0)
        deque(_each(lambda move: folder.sync(move.target), moves, self.jobs, self.stop), 0)

    def _span(self, folder: Folder, span: tuple[Move, int]) -> None:
        move, at = span
        scratch = self._idle.get()
        try:
            with move.source.open("rb", buffering=0) as reading, Output(folder, move.target) as output:
                stop = min(at + _STEP, move.nbytes)
                while at < stop:
                    if self.stop.is_set():
                        raise InterruptedError("stopped")
                    at += _step(reading, output, at, stop - at, scratch)
        finally:
            self._idle.put(scratch)


def _step(reading: FileIO, output: Output, at: int, left: int, scratch: Scratch) -> int:
    """Copy some bytes: past the page cache, else in the kernel, else through it."""
    if not output.passes_cache(left) and (done := output.copy(reading.fileno(), at, left, at)):
        return done
    block = scratch.empty((min(left, scratch.nbytes),), np.uint8, at).data
    done = os.preadv(reading.fileno(), [block], at)
    if not done:
        raise InputError(f"{reading.name}: it ends {left} bytes before it did; does something else write it?")
    output.put(block[:done], at)
    return done
