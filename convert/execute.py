"""Write the tensors of a plan into safetensors files: the only home of threads.

Each worker fills one tensor, strip by strip: assemble a strip, hash it, write it at its planned offset. Tensors of different
files are taken in turn, because two threads that write one file wait for each other.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from convert.blocks import SLAB, assemble
from convert.commit import Stage
from convert.planner import Target
from convert.shards import File
from layouts.checkpoint import Reader, itemsize

Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call, from one thread at a time."""


def ignore(done: int) -> None:
    """Progress that nobody watches."""


STRIP = 8 << 20
"""Bytes of a strip: large enough to hide the cost of a call, small enough that many workers fit a small budget."""
SYNC = 1 << 30
"""Bytes written between two syncs: what a power cut can cost."""
BASE = 160 << 20
"""Bytes that the process needs before the first block (interpreter, NumPy, plan of a large checkpoint)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many workers may run, and the bytes each may hold: one strip being filled and one slab of a source."""

    jobs: int
    strip: int

    @property
    def peak(self) -> int:
        """The bound on resident memory that the plan prints, in bytes."""
        return BASE + self.jobs * (self.strip + SLAB)


def make_budget(memory: int, jobs: int | None) -> Budget:
    """Fit as many workers as asked for (default: one per CPU, at most 8) into `memory` bytes."""
    each = SLAB + STRIP
    fit = max(1, (memory - BASE) // each)
    return Budget(jobs=min(jobs or min(8, os.cpu_count() or 1), fit), strip=STRIP)


@dataclass(frozen=True, slots=True)
class _Task:
    target: Target
    path: Path
    offset: int


def write_tensors(
    targets: Sequence[Target], files: Sequence[File], reader: Reader, stage: Stage, budget: Budget, progress: Progress
) -> dict[str, str]:
    """Write every tensor that the stage does not hold yet, and return the digest of each (xxh3-128 of its bytes, hex).

    Raises:
        OSError: the disk is full or failing; finished tensors are journalled.
    """
    digests = dict(stage.done)
    for file in files:
        _preallocate(stage.path / file.name, file)
    tasks = [task for task in _in_turn(targets, files, stage.path) if task.target.spec.name not in digests]
    progress(sum(t.spec.nbytes for t in targets if t.spec.name in digests))
    stop = threading.Event()
    lock = threading.Lock()

    def work(task: _Task) -> str:
        return _write(task, reader, budget.strip, stop, lambda done: _locked_call(lock, progress, done))

    with ThreadPoolExecutor(budget.jobs) as pool:
        try:
            _drain(pool, work, tasks, stage, digests, budget.jobs)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return digests


def _locked_call(lock: threading.Lock, progress: Progress, done: int) -> None:
    with lock:
        progress(done)


def _drain(
    pool: ThreadPoolExecutor,
    work: Callable[[_Task], str],
    tasks: Sequence[_Task],
    stage: Stage,
    digests: dict[str, str],
    jobs: int,
) -> None:
    """Keep the workers busy, and journal what is finished once its data is on the disk."""
    waiting: dict[Future[str], _Task] = {}
    queue = iter(tasks)
    unsynced: list[_Task] = []
    while True:
        for task in itertools.islice(queue, 2 * jobs - len(waiting)):
            waiting[pool.submit(work, task)] = task
        if not waiting:
            break
        finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
        for future in finished:
            task = waiting.pop(future)
            digests[task.target.spec.name] = future.result()
            unsynced.append(task)
        if sum(task.target.spec.nbytes for task in unsynced) >= SYNC:
            _sync(unsynced, stage, digests)
            unsynced = []
    _sync(unsynced, stage, digests)


def _sync(tasks: Sequence[_Task], stage: Stage, digests: dict[str, str]) -> None:
    for path in sorted({task.path for task in tasks}):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if tasks:
        stage.record({task.target.spec.name: digests[task.target.spec.name] for task in tasks})


def _preallocate(path: Path, file: File) -> None:
    """Reserve the file's space, so that a full disk shows now; what an earlier run wrote into it stays."""
    with path.open("r+b" if path.exists() else "x+b") as handle:
        os.posix_fallocate(handle.fileno(), 0, file.size)
        os.pwrite(handle.fileno(), file.head, 0)
        os.fsync(handle.fileno())


def _in_turn(targets: Sequence[Target], files: Sequence[File], stage: Path) -> Iterator[_Task]:
    home = {name: (file, offset) for file in files for name, offset in file.offsets.items()}
    queues: dict[str, list[_Task]] = {file.name: [] for file in files}
    for target in targets:
        file, offset = home[target.spec.name]
        queues[file.name].append(_Task(target, stage / file.name, offset))
    for turn in itertools.zip_longest(*queues.values()):
        yield from (task for task in turn if task is not None)


def _write(task: _Task, reader: Reader, strip: int, stop: threading.Event, progress: Progress) -> str:
    """Write one tensor front to back."""
    target, offset = task.target, task.offset
    digest = xxhash.xxh3_128()
    descriptor = os.open(task.path, os.O_WRONLY)
    try:
        for box in target.target.pattern.strips(target.sizes, max(1, strip // itemsize(target.spec.dtype))):
            if stop.is_set():
                raise InterruptedError("stopped")
            block = assemble(target, box, reader).reshape(-1).view(np.uint8).data
            digest.update(block)
            offset += _pwrite_all(descriptor, block, offset)
            progress(len(block))
            reader.release(next(target.pieces(box)).source)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _pwrite_all(descriptor: int, block: memoryview, offset: int) -> int:
    done = 0
    while done < len(block):
        done += os.pwrite(descriptor, block[done:], offset + done)
    return done
