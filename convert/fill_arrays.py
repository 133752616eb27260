"""Fill the arrays of an Orbax checkpoint with the tensors of a plan, within a memory budget.

Orbax asks the handlers here to write its leaves; a `Filler` does it: each worker takes one array, assembles it chunk by chunk
and keeps a few chunks in flight, which TensorStore compresses and writes behind its back.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash
from orbax.checkpoint import future

from convert.blocks import SLAB, assembled
from convert.chunks import Chunking, plan_chunks
from convert.execute import Budget, Progress
from convert.planner import Target
from layouts.checkpoint import TensorSpec, bits, itemsize, numpy_dtype
from layouts.orbax import CACHE, OrbaxReader

_THREADS = ("convert", "write_metadata_after_commits")
"""Names of the threads that Orbax starts for a save: that of our handlers, and its own that waits for them."""
_FULL = ("No space left", "Disk quota exceeded", "RESOURCE_EXHAUSTED")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LazyArray:
    """A leaf that Orbax takes for an array, without data."""

    name: str
    spec: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape."""
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's (or ml_dtypes') element type."""
        return numpy_dtype(self.spec.dtype)

    @property
    def size(self) -> int:
        """Elements."""
        return self.spec.nbytes // itemsize(self.spec.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.spec.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LazyScalar(LazyArray):
    """A leaf that Orbax is to restore as a Python number."""


@dataclass(slots=True, kw_only=True)
class Filler:
    """Writes arrays and keeps the digest of each (xxh3-128 of its bytes in storage order, hex)."""

    targets: Mapping[str, Target]
    reader: OrbaxReader
    budget: Budget
    progress: Progress
    digests: dict[str, str] = field(default_factory=dict)
    _failure: BaseException | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _busy: threading.Lock = field(default_factory=threading.Lock)
    _told: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around Orbax's save: an error of a worker is raised as it was, and no worker is left when this is over.

        Orbax's threads log what they die of, with its traceback; whoever calls us gets it as an exception instead.
        """
        others = set(threading.enumerate())
        log = logging.getLogger("absl")
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            yield
        except BaseException as error:
            self._stop.set()
            # Not by join: after a signal in the midst of one, Python 3.11 takes the thread for stopped (bpo-45274).
            while any(thread.name in _THREADS for thread in set(threading.enumerate()) - others):
                time.sleep(0.01)
            if self._failure is not None and isinstance(error, Exception):
                raise self._failure from None
            raise
        finally:
            log.setLevel(level)

    def fill(self, specs: Mapping[str, Mapping[str, Any]]) -> None:
        """Create and fill the arrays with these TensorStore specs; the keys are names of targets.

        Raises:
            OSError: the disk is full or failing.
        """
        with self._busy:
            try:
                self._fill(specs)
            except BaseException as error:
                self._failure = error
                raise

    def _fill(self, specs: Mapping[str, Mapping[str, Any]]) -> None:
        # No sync per write: all files are synced together before the checkpoint is published.
        context = ts.Context({"file_io_sync": False, "cache_pool#ocdbt": {"total_bytes_limit": SLAB}})
        # A source chunk that is read in parts must stay decoded until the last one, so arrays with large ones go one at a time.
        heavy = [name for name in specs if self._held(name) * self.budget.jobs > CACHE // 2]
        light = [name for name in specs if name not in set(heavy)]
        for jobs, names in ((1, heavy), (self.budget.jobs, light)):
            with ThreadPoolExecutor(jobs) as pool:
                waiting = [pool.submit(self._one, self.targets[name], specs[name], context) for name in names]
                done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
                if any(future.exception() for future in done):
                    self._stop.set()
                    pool.shutdown(cancel_futures=True)
                for finished in done:
                    finished.result()

    def _held(self, name: str) -> int:
        return self.plan(name).held * itemsize(self.targets[name].spec.dtype)

    def plan(self, name: str) -> Chunking:
        """How an array is cut."""
        target = self.targets[name]
        source = next(target.pieces(target.target.pattern.whole(target.sizes))).source
        size = itemsize(target.spec.dtype)
        return plan_chunks(target, self.reader.chunks[source], max(1, self.budget.strip // size), CACHE // 2 // size)

    def _one(self, target: Target, spec: Mapping[str, Any], context: Any) -> None:
        chunking = self.plan(target.spec.name)
        digest = xxhash.xxh3_128() if chunking.in_order() else None
        try:
            store = ts.open(spec, open=True, create=True, context=context).result()
            self._write(store, chunking, digest)
            hashed = digest or self._read_back(store, target)
        except ValueError as error:
            full = any(text in str(error) for text in _FULL)
            code, text = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, str(error))
            raise OSError(code, text, target.spec.name) from error
        self.digests[target.spec.name] = hashed.hexdigest()
        if self._held(target.spec.name) * self.budget.jobs > CACHE // 2:
            self.reader.close()  # the chunks of this array must not stay beside those of the next; it opens again by itself

    def _write(self, store: Any, chunking: Chunking, digest: xxhash.xxh3_128 | None) -> None:
        target = chunking.target
        pattern, dtype = target.target.pattern, numpy_dtype(target.spec.dtype)
        flying: deque[tuple[Any, int]] = deque()
        for box in chunking.boxes():
            if self._stop.is_set():
                raise InterruptedError("stopped")
            window = pattern.window(target.sizes, box).slices
            shape = pattern.shape({axis: len(span) for axis, span in box.items()})
            with assembled(target, box, self.reader) as block:
                if digest is not None:
                    digest.update(block.reshape(-1).view(np.uint8).data)
                written = store[window].write(block.reshape(shape).view(dtype))
                written.copy.result()
                flying.append((written, block.nbytes))
            while sum(nbytes for _, nbytes in flying) > SLAB - self.budget.strip:
                self._land(*flying.popleft())
        while flying:
            self._land(*flying.popleft())

    def _land(self, written: Any, nbytes: int) -> None:
        written.result()
        with self._told:
            self.progress(nbytes)

    def _read_back(self, store: Any, target: Target) -> xxhash.xxh3_128:
        """The digest of an array whose chunks were not written in storage order."""
        digest = xxhash.xxh3_128()
        limit = max(1, self.budget.strip // itemsize(target.spec.dtype))
        for box in target.target.pattern.strips(target.sizes, limit):
            if self._stop.is_set():
                raise InterruptedError("stopped")
            block = np.asarray(store[target.target.pattern.window(target.sizes, box).slices].read(order="C").result())
            digest.update(block.view(bits(target.spec.dtype)).reshape(-1).view(np.uint8).data)
        return digest


def handlers(filler: Filler) -> list[tuple[type, Any]]:
    """What Orbax needs to save a tree of lazy leaves and texts."""
    return [
        (LazyScalar, _ScalarHandler(filler)),
        (LazyArray, _ArrayHandler(filler)),
        (str, ocp.type_handlers.StringHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # there are none, but Orbax logs a warning where nobody could save one
    ]


class _ArrayHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Saves lazy leaves where and as Orbax saves NumPy arrays."""

    def __init__(self, filler: Filler) -> None:
        super().__init__()
        self._filler = filler

    async def serialize(self, values: Sequence[LazyArray], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Start the writing; Orbax waits for the future before it commits."""
        del args
        return [future.CommitFutureAwaitingContractedSignals(self._write(values, infos), name=_THREADS[0])]

    async def _write(self, values: Sequence[LazyArray], infos: Sequence[Any]) -> None:
        specs = {}
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            specs[value.name] = ocp.type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=self._filler.plan(value.name).shape,
                dtype=value.dtype,
                process_index=0 if info.is_ocdbt_checkpoint else None,
            )
        self._filler.fill(specs)


class _ScalarHandler(_ArrayHandler):
    """The same, under the name by which Orbax restores Python numbers."""

    def typestr(self) -> str:
        """Orbax's name of the kind."""
        return "scalar"
