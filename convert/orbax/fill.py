"""Fill the arrays of an Orbax checkpoint with the tensors of a plan, within a memory budget.

In: portions of arrays, an open input. Out: written arrays, and digests. It never makes them durable.

Workers assemble boxes, in the order of the plan and a few ahead of it. One thread takes them in that order, hashes them and
hands them to TensorStore, which compresses and writes them in threads of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from convert.engine.blocks import assembled
from convert.orbax.budget import OrbaxBudget
from convert.orbax.chunks import Chunking
from convert.orbax.portions import Portion
from convert.planning.targets import Target
from convert.progress import Progress
from layouts.disk.faults import answer, writing
from layouts.language.pattern import Box
from layouts.reader import Reader
from layouts.tensors import bits, numpy_dtype


@dataclass(slots=True, kw_only=True)
class _Array:
    """A portion on its way: the store that it goes to, and the digest of what has gone there."""

    portion: Portion
    digest: xxhash.xxh3_128 | None
    store: Any = None

    @property
    def target(self) -> Target:
        return self.portion.target

    @property
    def name(self) -> str:
        return self.target.spec.name


@dataclass(slots=True, kw_only=True)
class Filler:
    """Writes portions of arrays; `fill` returns the digest of each (xxh3-128 of its bytes in storage order, hex).

    `open` creates the stored array of a tensor that is cut in this way.
    """

    reader: Reader
    budget: OrbaxBudget
    progress: Progress
    open: Callable[[Chunking], Any]
    _flying: deque[tuple[Any, _Array, NDArray[Any]]] = field(default_factory=deque)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fill(self, portions: Sequence[Portion]) -> dict[str, str]:
        """Create and fill these arrays; all is handed to the system on return, but not synced. Digests stand under `key`s.

        Raises:
            OSError: the disk is full or failing.
            InputError: data of the input cannot be read.
        """
        arrays = [_array(portion) for portion in portions]
        with ThreadPoolExecutor(self.budget.jobs) as pool:
            try:
                waiting: deque[tuple[_Array, Box, Future[NDArray[Any]]]] = deque()
                for array, box, future in self._submitted(arrays, pool):
                    waiting.append((array, box, future))
                    while len(waiting) > self.budget.jobs:
                        self._write(*waiting.popleft())
                while waiting:
                    self._write(*waiting.popleft())
                self._land(0)
            except BaseException:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._flying.clear()
                raise
        return {array.portion.key: self._digest(array).hexdigest() for array in arrays}

    def _submitted(
        self, arrays: Sequence[_Array], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[_Array, Box, Future[NDArray[Any]]]]:
        before: Future[NDArray[Any]] | None = None
        for array in arrays:
            with writing(array.name):
                array.store = self.open(array.portion.chunking)
            streamed = self._is_streamed(array.target)
            for box in array.portion.boxes():
                future = pool.submit(self._assemble, array.target, box, before if streamed else None)
                # Two tensors may be made from one, so that the order holds beyond the end of the first.
                before = future if streamed else before
                yield array, box, future

    def _is_streamed(self, target: Target) -> bool:
        """Whether boxes must be read one after another, because a stream runs in one direction."""
        pieces = target.pieces(target.target.pattern.whole(target.sizes))
        units = (self.reader.unit(piece.source) for piece in pieces)
        return any(unit is not None and unit.streams(self.budget.stream) for unit in units)

    def _assemble(self, target: Target, box: Box, before: Future[NDArray[Any]] | None) -> NDArray[Any]:
        """A box, once the box `before` is there."""
        if before is not None:
            before.exception()
        if self._stop.is_set():
            raise InterruptedError("stopped")
        return assembled(target, box, self.reader)

    def _write(self, array: _Array, box: Box, future: Future[NDArray[Any]]) -> None:
        block = future.result()
        if array.digest is not None:
            array.digest.update(block.reshape(-1).view(np.uint8).data)
        pattern = array.target.target.pattern
        window = pattern.window(array.target.sizes, box)
        shape = [part.stop - part.start for part in window.slices]
        with writing(array.name):
            data = block.reshape(shape).view(numpy_dtype(array.target.spec.dtype))
            written = array.store[window.slices].write(data, can_reference_source_data_indefinitely=True)
        self._flying.append((written, array, block))
        if sum(waiting.nbytes for _, _, waiting in self._flying) > self.budget.flying:
            self._land(self.budget.flying // 2)

    def _land(self, most: int) -> None:
        """Wait for writes until no more than `most` bytes are on their way."""
        while self._flying and (sum(block.nbytes for _, _, block in self._flying) > most or not most):
            written, array, block = self._flying.popleft()
            with writing(array.name):
                answer(written)
            self.progress(block.nbytes)

    def _digest(self, array: _Array) -> xxhash.xxh3_128:
        """The digest; that of an array whose boxes were not in storage order is of what can be read from the disk."""
        if array.digest is not None:
            return array.digest
        digest, target = xxhash.xxh3_128(), array.target
        for box in array.portion.strips(self.budget.box):
            with writing(array.name):
                slices = target.target.pattern.window(target.sizes, box).slices
                block = np.asarray(answer(array.store[slices].read(order="C")))
            digest.update(block.view(bits(target.spec.dtype)).reshape(-1).view(np.uint8).data)
        return digest


def _array(portion: Portion) -> _Array:
    return _Array(portion=portion, digest=xxhash.xxh3_128() if portion.chunking.in_order() else None)
