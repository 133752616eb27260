"""Make tensors of a plan again from the input, to nobody: only their digests are kept.

In: targets, and the spans of each whose digests are wanted. Out: these digests, as they come. It never writes, and holds no
more than the conversion itself does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import xxhash

from convert.commit.manifest import Digest
from convert.commit.recorded import spans_of
from convert.engine.blocks import assembled
from convert.engine.budget import Budget
from convert.engine.copying import Worker
from convert.engine.reading import in_order
from convert.planning.targets import Target
from convert.progress import Progress, stoppable
from layouts.reader import Reader
from layouts.tensors import itemsize

_AHEAD = 4
"""Targets handed out per worker."""
Told = Callable[[int], None]
"""Is called with the bytes that were read; it raises to stop."""


class Remade(NamedTuple):
    """A tensor, or `rows` of its first dimension, its digest now and the one that was wanted."""

    name: str
    rows: range | None
    digest: str
    wanted: str


def remade(
    targets: Sequence[Target], wanted: Mapping[str, Digest], reader: Reader, budget: Budget, progress: Progress
) -> Iterator[Remade]:
    """Assemble targets as a conversion does, and hash them, span by span as `wanted` has them.

    Raises:
        InputError: data of the input cannot be read.
    """
    own = threading.local()

    def begin() -> None:
        own.worker = Worker.make(reader, budget.strip)

    def work(target: Target, rows: range | None, told: Told) -> str:
        return _digest(target, rows, own.worker, told)

    yield from each(work, in_order(targets, reader), wanted, budget.jobs, progress, begin)


def _digest(target: Target, rows: range | None, worker: Worker, told: Told) -> str:
    """The digest of a target's bytes in storage order, strip by strip."""
    digest = xxhash.xxh3_128()
    strip = max(1, worker.scratch.nbytes // itemsize(target.spec.dtype))
    for box in target.target.pattern.strips(target.sizes, strip, rows):
        block = assembled(target, box, worker.reader, partial(worker.scratch.empty, offset=0), worker.source)
        digest.update(block.reshape(-1).view(np.uint8).data)
        told(block.nbytes)
    return digest.hexdigest()


def each(
    work: Callable[[Target, range | None, Told], str],
    targets: Sequence[Target],
    wanted: Mapping[str, Digest],
    jobs: int,
    progress: Progress,
    begin: Callable[[], None] = lambda: None,
) -> Iterator[Remade]:
    """What `work` finds for each target, as it is finished; whoever stops asking, or an error, stops the workers.

    One worker takes all spans of a target, in their order, because a chunk that is read as a stream runs in one direction.
    """
    stop = threading.Event()
    told = stoppable(progress, stop)

    def spans(target: Target) -> list[Remade]:
        name = target.spec.name
        return [Remade(name, rows, work(target, rows, told), digest) for rows, digest in spans_of(wanted[name])]

    queue, waiting = iter(targets), set[Future[list[Remade]]]()
    with ThreadPoolExecutor(jobs, initializer=begin) as pool:
        try:
            while True:
                waiting |= {pool.submit(spans, target) for target in islice(queue, _AHEAD * jobs - len(waiting))}
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield from future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
