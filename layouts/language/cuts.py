"""Cut the logical `n` of a projection into shards and chunks, and find a part of it again. Pure.

In: sizes, a pattern, a box. Out: sizes; runs of `n`, and where they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from layouts.language.parts import CHUNKS
from layouts.language.pattern import Box, Pattern

CUT = CHUNKS[:2]
"""The axes into which `n` is cut."""
_PADS = "--layout=per-shard pads each shard, and --layout=interleaved has columns in turn"


class Run(NamedTuple):
    """A run of the logical `n` that lies in one chunk: the chunk, where it begins in `n`, and the range inside it."""

    chunk: dict[str, range]
    base: int
    inside: range


def cut(sizes: Mapping[str, int], pattern: Pattern) -> dict[str, int]:
    """Logical sizes with their `n`, all shards and chunks of it, cut as a pattern wants it.

    Raises:
        ValueError: it does not divide.
    """
    found = {axis: size for axis, size in {**sizes, **pattern.fixed}.items() if axis not in CHUNKS}
    if "n" not in sizes:
        return found
    rest = math.prod(sizes.get(axis, 1) for axis in CHUNKS)
    fixed: Mapping[str, int] = pattern.fixed
    for axis in CHUNKS:
        if axis in fixed:
            if rest % fixed[axis]:
                turns = f"; what takes turns is never padded, {_PADS}" if "c" in pattern.axes and axis == "n" else ""
                raise ValueError(f"n = {rest} does not divide into {axis} = {fixed[axis]}{turns}")
            rest //= fixed[axis]
            found[axis] = fixed[axis]
    if "c" in pattern.axes and "c" not in fixed:
        found["c"] = rest
    else:
        found["n"] = rest
    return found


def chunks(pattern: Pattern, sizes: Mapping[str, int], box: Box) -> Iterator[Run]:
    """The chunks of `n` that a box touches, in their logical order."""
    axes = [axis for axis in CUT if axis in pattern.axes]
    for point in itertools.product(*(box[axis] for axis in axes)):
        number = 0
        for axis, at in zip(axes, point, strict=True):
            number = number * sizes[axis] + at
        yield Run({axis: range(at, at + 1) for axis, at in zip(axes, point, strict=True)}, number * sizes["n"], box["n"])


def place(pattern: Pattern, sizes: Mapping[str, int], number: int) -> dict[str, range]:
    """Where chunk `number` is."""
    found = {}
    for axis in reversed([axis for axis in CUT if axis in pattern.axes]):
        number, at = divmod(number, sizes[axis])
        found[axis] = range(at, at + 1)
    return found
