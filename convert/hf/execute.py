"""Write the tensors of a plan into safetensors files: the only home of threads.

In: targets and files. Out: finished tensors, their digests, a journal. It never publishes.

Each worker writes one tensor (see `convert.engine.copying`). Tensors of different files are taken in turn, because two threads
that write one file wait for each other. Tensors that are read from Orbax keep their order (see `convert.engine.reading`).
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from convert.commit.manifest import SOURCE
from convert.commit.stage import Stage
from convert.engine.budget import SYNC, Budget
from convert.engine.copying import Worker, write_tensor
from convert.hf.shards import File
from convert.planning.targets import Target
from convert.progress import Progress
from layouts.reader import Reader, is_chunked

AHEAD = 64
"""Tensors handed out per worker, so that none waits while finished ones are synced."""


@dataclass(frozen=True, slots=True)
class _Task:
    target: Target
    path: Path
    offset: int


def write_tensors(
    targets: Sequence[Target],
    files: Sequence[File],
    reader: Reader,
    stage: Stage,
    budget: Budget,
    progress: Progress,
    *,
    beside: int = 0,
) -> dict[str, str]:
    """Write every tensor that the stage does not hold yet, and return the digests (xxh3-128 of the bytes, hex).

    They stand under the names of the tensors; those of the sources they were made from under `SOURCE` + name. The disk must
    have room for `beside` more bytes, of what stands beside them.

    Raises:
        OSError: the disk is full or failing; finished tensors are journalled.
    """
    digests = _kept(files, stage)
    _check_space(files, stage.path, beside)
    for file in files:
        _preallocate(stage.path / file.name, file)
    tasks = _tasks(targets, files, stage.path)
    tasks = [task for task in (tasks if is_chunked(reader) else _in_turn(tasks)) if task.target.spec.name not in digests]
    progress(sum(t.spec.nbytes for t in targets if t.spec.name in digests))
    stop = threading.Event()
    lock = threading.Lock()

    def told(done: int) -> None:
        if stop.is_set():
            raise InterruptedError("stopped")
        with lock:
            progress(done)

    def work(task: _Task) -> dict[str, str]:
        return write_tensor(task.target, task.path, task.offset, own.worker, told)

    def begin() -> None:
        own.worker = Worker.make(reader, budget.strip)

    own = threading.local()
    with ThreadPoolExecutor(budget.jobs, initializer=begin) as pool:
        try:
            _drain(pool, work, tasks, stage, digests, budget.jobs)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return digests


def _drain(
    pool: ThreadPoolExecutor,
    work: Callable[[_Task], dict[str, str]],
    tasks: Sequence[_Task],
    stage: Stage,
    digests: dict[str, str],
    jobs: int,
) -> None:
    """Keep the workers busy, and journal what is finished once its data is on the disk."""
    waiting: dict[Future[dict[str, str]], _Task] = {}
    queue = iter(tasks)
    paths: set[Path] = set()
    fresh: dict[str, str] = {}
    dirty = 0
    try:
        while True:
            for task in itertools.islice(queue, AHEAD * jobs - len(waiting)):
                waiting[pool.submit(work, task)] = task
            if not waiting:
                break
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(finished, key=lambda future: future.exception() is not None):  # keep what succeeded
                task = waiting.pop(future)
                fresh.update(future.result())
                paths.add(task.path)
                dirty += task.target.spec.nbytes
            if dirty >= SYNC:
                _sync(paths, stage, fresh, digests)
                dirty = 0
    except OSError:
        _sync(paths, stage, fresh, digests)  # a full disk should not cost what is finished
        raise
    _sync(paths, stage, fresh, digests)


def _sync(paths: set[Path], stage: Stage, fresh: dict[str, str], digests: dict[str, str]) -> None:
    """Make finished tensors durable, then say so in the journal."""
    for path in sorted(paths):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if fresh:
        stage.record(fresh)
    digests.update(fresh)
    paths.clear()
    fresh.clear()


def _kept(files: Sequence[File], stage: Stage) -> dict[str, str]:
    """The digests of tensors that an earlier run finished and whose file is still there, whole."""
    kept = {key: digest for key, digest in stage.done.items() if key.startswith(SOURCE)}
    for file in files:
        path = stage.path / file.name
        if path.exists() and path.stat().st_size == file.size:
            kept.update({name: stage.done[name] for name in file.offsets if name in stage.done})
        else:
            path.unlink(missing_ok=True)
    return kept


def _check_space(files: Sequence[File], folder: Path, beside: int) -> None:
    """Find a disk that is too small before anything is reserved on it."""
    paths = [folder / file.name for file in files]
    needed = beside + sum(file.size for file in files) - sum(512 * path.stat().st_blocks for path in paths if path.exists())
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        text = f"{os.strerror(errno.ENOSPC)}: {needed:,} more bytes are needed, {free:,} are free"
        raise OSError(errno.ENOSPC, text, str(folder))


def _preallocate(path: Path, file: File) -> None:
    """Reserve the file's space, so that a full disk shows now; what an earlier run wrote into it stays."""
    with path.open("r+b" if path.exists() else "x+b") as handle:
        os.posix_fallocate(handle.fileno(), 0, file.size)
        os.pwrite(handle.fileno(), file.head, 0)
        os.fsync(handle.fileno())


def _tasks(targets: Sequence[Target], files: Sequence[File], stage: Path) -> list[_Task]:
    home = {name: (stage / file.name, offset) for file in files for name, offset in file.offsets.items()}
    return [_Task(target, *home[target.spec.name]) for target in targets]


def _in_turn(tasks: Sequence[_Task]) -> Iterator[_Task]:
    """Tasks of different files in turn."""
    queues: dict[Path, list[_Task]] = {}
    for task in tasks:
        queues.setdefault(task.path, []).append(task)
    for turn in itertools.zip_longest(*queues.values()):
        yield from (task for task in turn if task is not None)
