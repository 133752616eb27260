"""Several comparisons at a time, within a bound of memory.

In: a function and what it is called with, one after another. Out: its results, in that order. It never compares.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from convert.options.option import workers
from convert.verifier.bits.order import STRIP
from layouts.reader import Reader, is_chunked

_WIDEST = 8
"""Bytes of an element, at most."""
_TURNS = 256
"""Turns of a thread at least: where there are 100,000 things, to hand over each by itself costs more than to compare it."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How many comparisons run at a time, and the bytes that each may hold."""

    jobs: int = 1
    each: int = 256 << 20

    @classmethod
    def within(cls, memory: int, jobs: int | None, largest: int) -> Work:
        """As many as asked for, but no more than half of the memory holds where each takes `largest` bytes.

        The other half is for windows, decoded chunks and the program itself.
        """
        fit = max(1, min(workers(jobs), memory // 2 // max(1, largest)))
        return cls(jobs=fit, each=memory // 2 // fit)

    @classmethod
    def in_strips(cls, memory: int, jobs: int | None, *readers: Reader) -> Work:
        """The same where two strips are held at a time; of what is decoded one, as that is done by many threads anyway."""
        return cls.within(memory, 1 if any(map(is_chunked, readers)) else jobs, 2 * _WIDEST * STRIP)


class Scratch(threading.local):  # no dataclass: threads would share its slots
    """Memory that a thread reads into again and again: new memory costs about as much as what is done with it."""

    def __init__(self) -> None:
        self._held: list[NDArray[np.uint8]] = []
        self._next = 0

    def rewind(self) -> None:
        """All that was given may be given again."""
        self._next = 0

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with anything in it, good until `rewind`."""
        nbytes = math.prod(shape) * dtype.itemsize
        if self._next == len(self._held):
            self._held.append(np.empty(nbytes, np.uint8))
        elif self._held[self._next].nbytes < nbytes:
            self._held[self._next] = np.empty(nbytes, np.uint8)
        self._next += 1
        return self._held[self._next - 1][:nbytes].view(dtype).reshape(shape)


def in_order(call: Callable[[_Item], _Result], items: Iterable[_Item], jobs: int) -> Iterator[_Result]:
    """What the function returns for each, so many at a time; what it raises is raised, and nothing new is begun then."""
    if jobs == 1:
        yield from map(call, items)
        return
    every, pool = list(items), ThreadPoolExecutor(jobs)
    some = max(1, len(every) // (jobs * _TURNS))
    try:
        for future in [pool.submit(_until, call, every[at : at + some]) for at in range(0, len(every), some)]:
            found, error = future.result()
            yield from found
            if error is not None:
                raise error
    finally:
        pool.shutdown(cancel_futures=True)


def _until(call: Callable[[_Item], _Result], items: Sequence[_Item]) -> tuple[list[_Result], Exception | None]:
    """What the function returns for each, until it raises."""
    found: list[_Result] = []
    try:
        found.extend(map(call, items))
    except Exception as error:
        return found, error
    return found, None
