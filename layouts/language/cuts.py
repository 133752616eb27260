"""Cut the logical `n` of a projection into shards and chunks, and find a part of it again, or what is padding. Pure.

In: sizes, a pattern, a box. Out: sizes; runs of `n`, and where they are; boxes with their padding.
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
_PADS = "--layout=lane is padded with --align=128, --layout=per-shard always, and --layout=interleaved has columns in turn"


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
                turns = f"; {_PADS}" if "c" in pattern.axes and axis == "n" else ""
                raise ValueError(f"n = {rest} does not divide into {axis} = {fixed[axis]}{turns}")
            rest //= fixed[axis]
            found[axis] = fixed[axis]
    if pattern.width:
        found |= {"c": 1, "n": rest}
    elif "c" in pattern.axes and "c" not in fixed:
        found["c"] = rest
    else:
        found["n"] = rest
    return found


def lengths(pattern: Pattern, sizes: Mapping[str, int]) -> tuple[int, int]:
    """The columns of a chunk, the last one of a shard may have fewer, and those of a shard; without padding."""
    shard = sizes["n"] * (sizes["c"] if "c" in pattern.axes else 1)
    return pattern.width or sizes["n"], shard


def chunks(pattern: Pattern, sizes: Mapping[str, int], box: Box) -> Iterator[Run]:
    """The chunks of `n` that a box touches, in their logical order."""
    axes, (width, shard) = [axis for axis in CUT if axis in pattern.axes], lengths(pattern, sizes)
    for point in itertools.product(*(box[axis] for axis in axes)):
        at = dict(zip(axes, point, strict=True))
        begin = at.get("c", 0) * width
        inside = range(box["n"].start, min(box["n"].stop, shard - begin))
        yield Run({axis: range(i, i + 1) for axis, i in at.items()}, at.get("s", 0) * shard + begin, inside)


def place(pattern: Pattern, sizes: Mapping[str, int], column: int) -> Run:
    """Where a column of the logical `n` is: `inside` is the rest of its chunk."""
    width, shard = lengths(pattern, sizes)
    s, rest = divmod(column, shard)
    c, at = divmod(rest, width)
    here = {axis: range(i, i + 1) for axis, i in zip(CUT, (s, c), strict=True) if axis in pattern.axes}
    return Run(here, column - at, range(at, min(width, shard - c * width)))


def ends(pattern: Pattern, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Where each axis ends without its padding; chunks that are padded together end nowhere alone."""
    return {**sizes, **({axis: pattern.stored(sizes)[axis] for axis in "cn"} if pattern.width else {})}


def with_padding(pattern: Pattern, sizes: Mapping[str, int], box: Box) -> Box:
    """A box of real elements with the padding behind it; boxes that cover all that is real cover all padding so."""
    stored, last = pattern.stored(sizes), dict(sizes)
    if pattern.width:
        count = -(-sizes["n"] // pattern.width)
        is_last = box["c"].stop == count
        last |= {"c": count, "n": sizes["n"] - (count - 1) * pattern.width if is_last else pattern.width}
    stops = {axis: stored[axis] if span.stop == last[axis] else span.stop for axis, span in box.items()}
    return {axis: range(span.start, stops[axis]) for axis, span in box.items()}


def padding(pattern: Pattern, sizes: Mapping[str, int]) -> list[dict[str, slice]]:
    """Slices of a tensor, once every composed dimension is split, that together are all of its padding."""
    alone = {axis: size for axis, size in pattern.stored(sizes).items() if not (pattern.width and axis in "cn")}
    found = [{axis: slice(sizes[axis], None)} for axis, size in alone.items() if size > sizes[axis]]
    if pattern.width:
        full, rest = divmod(sizes["n"], pattern.width)
        found += [{"c": slice(full, full + 1), "n": slice(rest, None)}] if rest else []
        found += [{"c": slice(full + bool(rest), None)}]
    return found
