"""Which experts go through the GEMMs in one call, and when their weights are read, within a bound of memory.

In: layers, and bytes of memory. Out: ranges of experts; their weights, one side after the other. It never runs them.

A call takes few experts, whose weights stay in the cache of a CPU. Calls follow one another until all experts were taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from convert.verifier.bits.logical import Block, Sides
from convert.verifier.bits.order import experts_held
from convert.verifier.gemms.operands import Weights, load
from convert.verifier.gemms.probes import Answers
from layouts.orbax.malloc import keep_below
from layouts.tensors import itemsize

EXPERTS = 8
"""In a call, at most."""
NUMBERS = 20 << 20
"""Weights in a call, unless two experts have more."""
BASE = 400 << 20
"""Bytes that the process has without any weights: Python, JAX, what it has compiled."""
KEPT = 32 << 20
"""Bytes of a block that stays with the C library when it is freed, and is given again: the most that glibc takes."""
TOGETHER = 24
"""Bytes for each weight where the gradients of both sides are compared: in float32, as XLA makes and keeps them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What memory allows: so many `experts` in a call, the next side's read `ahead`, both sides `together` in memory."""

    experts: int
    ahead: bool
    together: bool


@dataclass(slots=True, kw_only=True)
class Call:
    """What one call has found so far: the rows that should be read back, and those that were; whether outputs differ."""

    label: str = ""
    experts: range = range(0)
    wanted: Mapping[str, NDArray[Any]] | None = None
    answers: list[Answers] = field(default_factory=list)
    unread: set[int] = field(default_factory=set)
    differ: bool = False


def values(block: Block) -> int:
    """Numbers in one expert's weights."""
    k, n = (block.groups["wi", ""].total(axis) for axis in "kn")
    return 3 * k * n


def needed(sides: Sides, experts: int = 1, *, ahead: bool = False, together: bool = False) -> int:
    """Bytes that a call takes: one side as it was read and as XLA turns it, and what else is there then."""
    width = max(itemsize(block.groups["wi", ""].dtype) for block in sides)
    number = {1: 4}.get(width, width)  # numbers of one byte are run in float32
    each = 2 * number + (number if ahead else 0) + (number + TOGETHER if together else 0)
    return BASE + experts * values(sides[0]) * each


def fit(sides: Sides, memory: int, ways: int = 1) -> Fit | None:
    """What so many bytes allow, where experts divide among so many devices; None where not even that many fit."""
    most = max(ways, min(EXPERTS, max(2, NUMBERS // values(sides[0]))) // ways * ways)
    for experts, ahead in [*((count, True) for count in range(most, 0, -ways)), (ways, False)]:
        if needed(sides, experts, ahead=ahead) <= memory:
            together = needed(sides, experts, ahead=ahead, together=True) <= memory
            return Fit(experts=experts, ahead=ahead, together=together)
    return None


def calls(sides: Sides, step: int, ways: int = 1) -> Iterator[range]:
    """The experts of each call: no more than a window holds, in calls of the same size if they divide into some."""
    held = max(ways, min(map(experts_held, sides)))
    for start in range(0, sides[0].experts, held):
        stop = min(start + held, sides[0].experts)
        each = _even(stop - start, step) // ways * ways or step
        yield from (range(first, min(first + each, stop)) for first in range(start, stop, each))


def _even(count: int, most: int) -> int:
    """The largest part, of at most so many, into which they divide; or nearly, if that would be less than half as large."""
    exact = next(size for size in range(min(count, most), 0, -1) if count % size == 0)
    return exact if 2 * exact >= min(count, most) else -(-count // -(-count // most))


def weights_of(every: Iterable[tuple[Sides, range]], *, ahead: bool) -> Iterator[Weights]:
    """The weights of each call, of the first side and then of the second; with `ahead`, read while those before are run."""
    keep_below(KEPT)
    wanted = ((block, experts) for sides, experts in every for block in sides)
    if not ahead:
        yield from (load(*each) for each in wanted)
        return
    coming: deque[Future[Weights]] = deque()
    with ThreadPoolExecutor(1) as reading:
        for each in wanted:
            coming.append(reading.submit(load, *each))
            if len(coming) > 1:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
