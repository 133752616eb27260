"""Write the tensors of a plan into safetensors files, several at a time.

In: targets and files. Out: finished tensors, their digests, a journal. It never publishes.

Each worker writes one tensor, or a batch of small ones (see `convert.engine.copying`). Batches of different files are taken
in turn, because two threads that write one file wait for each other. Tensors that are read from Orbax keep their order (see
`convert.engine.reading`).
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from convert.commit.below import free
from convert.commit.files import Folder
from convert.commit.manifest import SOURCE
from convert.commit.stage import Stage
from convert.engine.budget import SYNC, Budget
from convert.engine.copying import SHORT, Worker, write_tensor, write_together
from convert.engine.direct import Output
from convert.hf.shards import File
from convert.planning.targets import Target
from convert.progress import Progress, stoppable
from layouts.checkpoint import growing
from layouts.reader import Reader

AHEAD = 64
"""Batches handed out per worker, so that none waits while finished ones are synced."""
BATCH, BATCH_BYTES = 256, 1 << 20
"""Tensors and bytes of a batch at most, unless it is of one tensor: to open a file and to wake a thread is no small thing."""


@dataclass(slots=True)
class _Task:
    """Tensors of one file with their offsets, one after another, and the digests of those that are finished."""

    file: str
    parts: list[tuple[Target, int]] = field(default_factory=list)
    nbytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)


def write_tensors(
    targets: Sequence[Target],
    files: Sequence[File],
    reader: Reader,
    stage: Stage,
    budget: Budget,
    progress: Progress,
    *,
    beside: int = 0,
    ordered: bool = False,
    sources: bool = True,
) -> dict[str, str]:
    """Write every tensor that the stage does not hold yet, and return the digests (xxh3-128 of the bytes, hex).

    They stand under the names of the tensors; those of the sources they were made from under `SOURCE` + name. The disk must
    have room for `beside` more bytes, of what stands beside them. If they are `ordered`, neighbours are written together.
    Without `sources` these have no digests: what is computed would have to be computed once more.

    Raises:
        OSError: the disk is full or failing; finished tensors are journalled.
    """
    digests = _kept(files, stage)
    _check_space(files, stage.folder, beside)
    for file in files:
        _preallocate(stage.folder, file)
    with growing():
        tasks = _tasks([target for target in targets if target.spec.name not in digests], files, turns=not ordered)
    progress(sum(t.spec.nbytes for t in targets if t.spec.name in digests))
    stop = threading.Event()
    told = stoppable(progress, stop)

    def work(task: _Task) -> None:
        with Output(stage.folder, task.file) as output:
            found, left = write_together(task.parts, output, own.worker, told)
            task.digests.update(found)
            for target, offset in left:
                task.digests.update(write_tensor(target, output, offset, own.worker, told))

    def begin() -> None:
        own.worker = Worker.make(reader, budget.strip, sources=sources)

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
    work: Callable[[_Task], None],
    tasks: Sequence[_Task],
    stage: Stage,
    digests: dict[str, str],
    jobs: int,
) -> None:
    """Keep the workers busy, and journal what is finished once its data is on the disk."""
    waiting: dict[Future[None], _Task] = {}
    queue = iter(tasks)
    written: set[str] = set()
    fresh: dict[str, str] = {}
    dirty = 0
    try:
        while True:
            for task in itertools.islice(queue, AHEAD * jobs - len(waiting)):
                waiting[pool.submit(work, task)] = task
            if not waiting:
                break
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for task in map(waiting.pop, finished):  # all before any may raise: one that failed has finished tensors, too
                fresh.update(task.digests)
                written.add(task.file)
                dirty += task.nbytes
            for future in finished:
                future.result()
            if dirty >= SYNC:
                _sync(written, stage, fresh, digests)
                dirty = 0
    except OSError:
        _sync(written, stage, fresh, digests)  # a full disk should not cost what is finished
        raise
    _sync(written, stage, fresh, digests)


def _sync(written: set[str], stage: Stage, fresh: dict[str, str], digests: dict[str, str]) -> None:
    """Make finished tensors durable, then say so in the journal."""
    for name in sorted(written):
        stage.folder.sync(name)
    if fresh:
        stage.record(fresh)
    digests.update(fresh)
    written.clear()
    fresh.clear()


def _kept(files: Sequence[File], stage: Stage) -> dict[str, str]:
    """The digests of tensors that an earlier run finished and whose file is still there, whole."""
    kept = {key: digest for key, digest in stage.done.items() if key.startswith(SOURCE)}
    for file in files:
        found = stage.folder.stat(file.name)
        if found is not None and found.st_size == file.size:
            kept.update({name: stage.done[name] for name in file.offsets if name in stage.done})
        else:
            stage.folder.remove(file.name)
    return kept


def _check_space(files: Sequence[File], folder: Folder, beside: int) -> None:
    """Find a disk that is too small before anything is reserved on it."""
    there = [found for file in files if (found := folder.stat(file.name)) is not None]
    needed = beside + sum(file.size for file in files) - sum(512 * found.st_blocks for found in there)
    if needed > (left := free(folder)):
        text = f"{os.strerror(errno.ENOSPC)}: {needed:,} more bytes are needed, {left:,} are free"
        raise OSError(errno.ENOSPC, text, str(folder.path))


def _preallocate(folder: Folder, file: File) -> None:
    """Reserve the file's space, so that a full disk shows now; what an earlier run wrote into it stays."""
    folder.reserve(file.name, file.size, head=file.head)


def _tasks(targets: Iterable[Target], files: Sequence[File], *, turns: bool) -> list[_Task]:
    """Neighbours of one file in batches: of different files in turn, or else in the order of the targets."""
    home: dict[str, File] = {}
    for file in files:
        home |= dict.fromkeys(file.offsets, file)
    placed = [(target, home[target.spec.name], target.spec.nbytes) for target in targets]
    if turns:  # small ones first and as they will stand, so that neighbours are written at once; others as they are read
        placed.sort(key=lambda part: part[1].offsets[part[0].spec.name] if part[2] < SHORT else part[1].size)
    queues: dict[str, list[_Task]] = {}
    for target, file, nbytes in placed:
        name = file.name
        if (queue := queues.get(name if turns else "")) is None:
            queue = queues[name if turns else ""] = []
        last = queue[-1] if queue else None
        if last is None or last.file != name or len(last.parts) == BATCH or last.nbytes + nbytes > BATCH_BYTES:
            queue.append(last := _Task(name))
        last.parts.append((target, file.offsets[target.spec.name]))
        last.nbytes += nbytes
    return [task for turn in itertools.zip_longest(*queues.values()) for task in turn if task is not None]
