"""How a tensor is stored, read from the text of its pattern: the verifier's own reading of the language of layouts.

In: a pattern's text, sizes, a stored block; sections. Out: the block in logical axes; positions. It never imports
`layouts.language`, but for how sections are written down.

`layouts.language.pattern` finds blocks in stored tensors for the code that converts. This module takes whole stored arrays
apart, with NumPy and einops, so that a mistake of one of the two shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from layouts.language.sections import Turns

ORDER = {"wi": ("g", "k", "s", "c", "n", "d", "u"), "wo": ("n", "k", "d", "u")}
"""Role -> the logical order of axes; shards and chunks of `n` stand before it, so that together they are the logical `n`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """An axis as it is stored: `size` without and `stored` with its padding.

    Of `n` that is padded before it is cut into chunks `c`, all real columns are the size, and `c` has size 1.
    """

    name: str
    size: int
    stored: int
    reverse: bool


class Cut(NamedTuple):
    """A part of an expert along one logical axis: from `start` to `stop`, or to the end with its padding if that is None."""

    axis: str
    start: int
    stop: int | None


def dimensions(text: str, sizes: Mapping[str, int]) -> list[list[Axis]]:
    """The axes of each stored dimension of a pattern such as `e k (s=8 g n%128)`."""
    return [[*axes] for axes in _dimensions(text, tuple(sizes.items()))]


@lru_cache(maxsize=1 << 10)
def _dimensions(text: str, known: tuple[tuple[str, int], ...]) -> Sequence[Sequence[Axis]]:
    """A pattern is read once for all experts: there may be 100,000 tensors, and a few patterns."""
    sizes, inside = dict(known), False
    turn = re.search(r"\bn=(\d+)%(\w+)", text)
    width, columns = (int(turn[1]), _padded(sizes["n"], turn[2], sizes.get("s", 1))) if turn else (0, 0)
    found: list[list[Axis]] = []
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word in "()":
            inside = word == "("
            found += [[]] if inside else []
            continue
        axis = _axis(word, sizes)
        if turn and axis.name in "cn":
            axis = replace(axis, stored=columns // width if axis.name == "c" else width)
        if inside:
            found[-1].append(axis)
        else:
            found.append([axis])
    return found


def _axis(word: str, sizes: Mapping[str, int]) -> Axis:
    reverse, word = word.startswith("-"), word.lstrip("-")
    name, _, multiple = word.partition("%")
    name = name.partition("=")[0]
    return Axis(name=name, size=sizes[name], stored=_padded(sizes[name], multiple, sizes.get("s", 1)), reverse=reverse)


def _padded(size: int, multiple: str, shards: int) -> int:
    if not multiple:
        return size
    if multiple != "maxtext":
        step = int(multiple)
        return (size + step - 1) // step * step
    if size % 256 == 0:
        return size
    total = 1
    while total < size * shards or total // shards < 256:
        total *= 2
    return total // shards


def logical(block: NDArray[Any], dims: Sequence[Sequence[Axis]], role: str) -> NDArray[Any]:
    """A stored block in its logical axes, `wi` (2, K, N), `wo` (N, K), without those that it lacks.

    Raises:
        ValueError: there is something in the padding.
    """
    return arranged(block, dims, ORDER[role])


def arranged(block: NDArray[Any], dims: Sequence[Sequence[Axis]], wanted: Sequence[str]) -> NDArray[Any]:
    """A stored block with the axes in this order, `s c n` as one dimension, without those that it lacks.

    Raises:
        ValueError: there is something in the padding.
    """
    axes = [axis for dimension in dims for axis in dimension]
    split = block.reshape([axis.stored for axis in axes])
    if any(axis.name == "c" and axis.stored > axis.size for axis in axes):
        split, axes = _joined(split, axes)
    for at, axis in enumerate(axes):
        here = (slice(None),) * at
        if axis.stored > axis.size:
            if split[(*here, slice(axis.size, None))].any():
                raise ValueError(f"there is more than zeros behind the first {axis.size} ({axis.name})")
            split = split[(*here, slice(axis.size))]
        split = np.flip(split, at) if axis.reverse else split
    names = [axis.name for axis in axes]
    order = [name for name in wanted if name in names]
    cut = [name for name in order if name in ("s", "c", "n")]
    right = [f"({' '.join(cut)})" if cut and name == cut[-1] else name for name in order if name not in cut[:-1]]
    return np.asarray(rearrange(split, f"{' '.join(names)} -> {' '.join(right)}"))


def _joined(split: NDArray[Any], axes: Sequence[Axis]) -> tuple[NDArray[Any], list[Axis]]:
    """With chunks of `n` behind one another, as one axis."""
    names = [axis.name for axis in axes]
    right = [f"({'c n' if name == 'n' else name})" for name in names if name != "c"]
    joined = np.asarray(rearrange(split, f"{' '.join(names)} -> {' '.join(right)}"))
    kept = [axis for axis in axes if axis.name != "c"]
    return joined, [replace(axis, stored=size) for axis, size in zip(kept, joined.shape, strict=True)]


def positions(turns: Turns, tensor: int) -> NDArray[Any]:
    """For each row of a tensor its place in the joined one: this is laid out as (groups, rows of a group) and cut apart."""
    lengths = [length for part in turns.parts for length in part]
    every = np.arange(turns.groups * sum(lengths)).reshape(turns.groups, -1)
    sections = iter(np.split(every, np.cumsum(lengths)[:-1], axis=1))
    own = [[next(sections).ravel() for _ in part] for part in turns.parts]
    return np.concatenate(own[tensor])


def rows_of(whole: NDArray[Any], turns: Turns, tensor: int, at: int) -> NDArray[Any] | None:
    """The rows of one tensor, of the joined one, whose dimension `at` has those of all; None if it has not so many."""
    return whole.take(positions(turns, tensor), at) if whole.shape[at] == turns.total else None


def stretches(turns: Turns, tensor: int) -> list[range]:
    """The same, as ranges that follow one another in the tensor."""
    places = positions(turns, tensor)
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [range(int(run[0]), int(run[-1]) + 1) for run in runs]
