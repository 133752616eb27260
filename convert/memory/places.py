"""Where the dimensions of an array lie on the devices, and what they are called, when its layout changes. Pure.

In: what is said of each dimension of the sources. Out: what is said of each dimension of the targets. It never moves data.

What is said of a stored dimension is said of the logical axis in it: of `(g n)` and of `(s g n)` it is said of `n`. So a weight
that is cut over the devices along `n` stays cut along `n`, whatever stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from convert.memory.relay import Relay
from layouts.language.parts import CHUNKS


def carried(relay: Relay, said: Iterable[Any], fits: Callable[[int, Any], bool] | None = None) -> tuple[Any, ...]:
    """What is said of each dimension of a target, from what is said of a source's; None where nothing is, or does not fit."""
    words: dict[str, Any] = {}
    for group, entry in zip(relay.source.pattern.groups, said, strict=False):
        words[_logical(group)[0]] = entry
    found: list[Any] = []
    for group, size in zip(relay.target.pattern.groups, relay.target.shape, strict=True):
        entry = next((words.pop(axis) for axis in _logical(group) if words.get(axis) is not None), None)
        found.append(entry if entry is None or fits is None or fits(size, entry) else None)
    return tuple(found)


def sharding(relay: Relay, given: Any) -> NamedSharding | None:
    """The sharding of a target, from that of its first source; None where the compiler has to find it."""
    if not isinstance(given, NamedSharding):
        return None

    def divides(size: int, entry: Any) -> bool:
        axes = entry if isinstance(entry, tuple) else (entry,)
        return not size % math.prod(given.mesh.shape[axis] for axis in axes)

    spec = carried(relay, tuple(given.spec), divides)
    while spec and spec[-1] is None:
        spec = spec[:-1]
    where = PartitionSpec(*spec)  # type: ignore[no-untyped-call]
    return NamedSharding(given.mesh, where, memory_kind=given.memory_kind)


def _logical(group: Iterable[str]) -> list[str]:
    """The axes of a stored dimension; `n` for all that it is cut into, and gate and up last."""
    return sorted(dict.fromkeys("n" if axis in CHUNKS else axis for axis in group), key=lambda axis: axis == "g")
