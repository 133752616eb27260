"""Windows: parts of arrays that stay decoded while they are read bit by bit.

In: blocks that somebody reads in turn. Out: the same blocks, from parts that stay decoded. It knows no format.

TensorStore decodes a chunk as a whole, however little of it is wanted. A run on many devices saves stacks of layers in chunks
that hold some rows of every expert of every layer. Reading expert after expert would decode every chunk again for each expert.
So reads go through a window: a larger part of the array that is decoded at once and stays until others need its room. Reading
in the order of windows decodes nothing twice, if a window holds whole chunks or if chunks are read as streams.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

Slices = tuple[slice, ...]
Load = Callable[[str, Slices], NDArray[Any]]
"""Reads a block of an array, which may reach beyond its end."""
_Key = tuple[str, tuple[int, ...]]


def lengths(block: Slices) -> list[int]:
    """The shape of a block."""
    return [part.stop - part.start for part in block]


def window_shape(
    shape: Sequence[int], chunk: Sequence[int], unit: Sequence[int], read: Sequence[int], limit: int
) -> tuple[int, ...] | None:
    """A window of at most `limit` elements for who reads blocks of the shape `read` in turn, a `unit` of them after another.

    It holds whole chunks and whole units if it can, else whole units, else whole reads. None where it is not needed, because
    no chunk reaches across reads, or where not even a read is within the limit.
    """
    if all(length >= size or length % step == 0 for size, step, length in zip(shape, chunk, read, strict=True)):
        return None
    found = [min(size, math.lcm(step, length)) for size, step, length in zip(shape, chunk, unit, strict=True)]
    for least in (unit, read):
        for axis, low in enumerate(least):  # outer axes first, so that chunks that are streams are read forward
            whole = math.prod(found)
            if whole > limit:
                length = max(low, limit * found[axis] // whole // low * low)
                found[axis] = length - length % chunk[axis] if low == 1 and length > chunk[axis] else length
    return tuple(found) if math.prod(found) <= limit else None


class _Held(NamedTuple):
    """A window that is there, or on its way."""

    nbytes: int
    block: Future[NDArray[Any]]


@dataclass(slots=True, kw_only=True)
class Windows:
    """The windows of some arrays, by `shapes`; of what they hold, `limit` bytes stay, those that were used last.

    Who asks for windows may have other names for arrays than what is read has: `called` has them by those.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    limit: int = 0
    called: Mapping[str, str] = field(default_factory=dict)
    _held: dict[_Key, _Held] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def number(self, name: str, slices: Slices) -> tuple[int, ...]:
        """The window in which a block begins, by its place in the grid of windows; nothing for an array without."""
        return tuple(part.start // length for part, length in zip(slices, self.shapes.get(name, ()), strict=False))

    def read(self, name: str, slices: Slices, width: int, load: Load) -> NDArray[Any] | None:
        """A block, which must not be written to; nothing if it is in no single window. `width` is the size of an element."""
        called = self.called.get(name, name)
        if (shape := self.shapes.get(called)) is None:
            return None
        at = self.number(called, slices)
        starts = [i * length for i, length in zip(at, shape, strict=True)]
        if any(part.stop > start + length for part, start, length in zip(slices, starts, shape, strict=True)):
            return None
        window = tuple(slice(start, start + length) for start, length in zip(starts, shape, strict=True))
        block = self._window((name, at), window, math.prod(shape) * width, load)
        return block[tuple(slice(part.start - start, part.stop - start) for part, start in zip(slices, starts, strict=True))]

    def _window(self, key: _Key, window: Slices, nbytes: int, load: Load) -> NDArray[Any]:
        """As it is held, or once it is loaded: by one thread, while others wait."""
        with self._lock:
            held = self._held.pop(key, None)
            mine = held is None
            held = held or self._new(nbytes)
            self._held[key] = held  # the last one used stands last
        if mine:
            try:
                held.block.set_result(load(key[0], window))
            except BaseException as error:
                held.block.set_exception(error)
                self._held.pop(key, None)
                raise
        return held.block.result()

    def _new(self, nbytes: int) -> _Held:
        """One more, once others have made room for it."""
        while self._held and sum(held.nbytes for held in self._held.values()) + nbytes > self.limit:
            del self._held[next(iter(self._held))]
        return _Held(nbytes, Future())
