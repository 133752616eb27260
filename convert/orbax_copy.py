"""Copy the files of a database as they are, while the chunks in it are hashed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from io import FileIO
from pathlib import Path

import numpy as np

from convert.commit import Stage
from convert.direct import Output, Scratch
from convert.execute import SYNC, Progress
from convert.orbax_budget import OrbaxBudget
from convert.orbax_digest import stored_digest
from convert.orbax_keep import Kept, database_files, kept_chunks
from convert.portions import Portion, total
from convert.processes import Processes
from layouts.errors import InputError
from layouts.orbax import OrbaxReader

_STEP = 64 << 20
"""Bytes that the kernel copies at a time."""


def copy_database(
    reader: OrbaxReader,
    item: Path,
    stage: Stage,
    copied: bool,
    portions: Sequence[Portion],
    kept: Kept,
    budget: OrbaxBudget,
    progress: Progress,
    processes: Processes,
) -> dict[str, str]:
    """Copy the files, durably, if an earlier run has not `copied` them, and hash what it has not; the new digests by `key`.

    Of several processes, each copies and hashes its share.

    Raises:
        OSError: the disk is full or failing.
        InputError: data of the input cannot be read.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(_copy_files, reader.item, item, copied, stop, processes, budget.box)
        try:
            digests: dict[str, str] = {}
            own = [portions[number] for number in processes.mine([portion.nbytes for portion in portions])]
            progress(total(portion for portion in own if portion.key in stage.done))
            left = [portion for portion in own if portion.key not in stage.done]
            for fresh in _batches(_hashed(left, kept, reader, budget.jobs, stop)):
                if copying.done():
                    copying.result()
                stage.record({portion.key: digest for portion, digest in fresh})
                progress(total(portion for portion, _ in fresh))
                digests |= {portion.key: digest for portion, digest in fresh}
            copying.result()
        except BaseException:
            stop.set()
            raise
    return digests


def _hashed(
    portions: Sequence[Portion], kept: Kept, reader: OrbaxReader, jobs: int, stop: threading.Event
) -> Iterator[tuple[Portion, str]]:
    """Hash several at a time, the largest first; each as it is finished."""

    def told(_: int) -> None:
        if stop.is_set():
            raise InterruptedError("stopped")

    def work(portion: Portion) -> str:
        return stored_digest(reader, kept_chunks(portion.target, kept, reader, portion.rows), told)

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(work, portion): portion for portion in sorted(portions, key=lambda portion: -portion.nbytes)}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
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


def _copy_files(source: Path, target: Path, copied: bool, stop: threading.Event, processes: Processes, box: int) -> None:
    every = list(database_files(source))
    # The manifest is written anew in the copy, so that it is always copied, and by the process that does so.
    tops = [file for file in every if file.parent == source and processes.first]
    below = [file for file in every if file.parent != source and not copied]
    files = tops + [below[number] for number in processes.mine([file.stat().st_size for file in below])]
    needed = sum(file.stat().st_size for file in files)
    if needed > (free := shutil.disk_usage(target).free):
        text = f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, text, str(target))
    scratch = Scratch(box)
    for file in files:
        _copy(file, target / file.relative_to(source), stop, scratch)


def _copy(source: Path, target: Path, stop: threading.Event, scratch: Scratch) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    size = source.stat().st_size
    with target.open("wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    with source.open("rb", buffering=0) as reading, Output(target) as output:
        done = 0
        while done < size:
            if stop.is_set():
                raise InterruptedError("stopped")
            done += _step(reading, output, done, size - done, scratch)
        os.fsync(output.descriptor)


def _step(reading: FileIO, output: Output, at: int, left: int, scratch: Scratch) -> int:
    """Copy some bytes: past the page cache, else in the kernel, else through it."""
    if not output.passes_cache(left) and (done := output.copy(reading.fileno(), at, min(left, _STEP), at)):
        return done
    block = scratch.empty((min(left, scratch.nbytes),), np.uint8, at).data
    done = os.preadv(reading.fileno(), [block], at)
    if not done:
        raise InputError(f"{reading.name}: it ends {left} bytes before it did; does something else write it?")
    output.put(block[:done], at)
    return done
