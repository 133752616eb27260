"""Where an update goes in a tensor of the base: its axes, and which part of a block belongs to which expert's gate or up.

In: patterns and slices. Out: cuts. It never reads data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layouts.adapters.forms import Form
from layouts.adapters.units import Unit
from layouts.language.cuts import lengths
from layouts.language.parts import CHUNKS
from layouts.language.pattern import Pattern
from layouts.language.slots import Index

_Numbers = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """The update scale[e] * B[e] @ A[e] of one projection: rows `first`, `first + step`, ... of B are its outputs."""

    form: Form
    unit: Unit
    first: int = 0
    step: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of A and B of all experts in float32."""
        return 4 * self.unit.experts * self.unit.rank * (self.unit.i + self.unit.o)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A tensor of the base that changes.

    `sizes` are those of the axes of `pattern`, `index` has the axes that its name tells. `axes` are the one that A reads and
    the one that B writes. `terms` are by `g`, or 0 where there is none. `instead` is the adapter's tensor that takes its place.
    """

    name: str
    pattern: Pattern
    sizes: Mapping[str, int]
    axes: tuple[str, str] = ("k", "n")
    index: Index = field(default_factory=dict)
    terms: Mapping[int, Term] = field(default_factory=dict)
    instead: str | None = None


class Cut(NamedTuple):
    """A part of a block: where it lies, whose it is, which elements of `axes` it has, and their dimensions."""

    window: tuple[slice, ...]
    expert: int
    g: int
    i: _Numbers
    o: _Numbers
    dims: tuple[int, int]


def cuts(site: Site, spans: Sequence[range]) -> Iterator[Cut]:
    """The parts of a block, given by its spans of the stored dimensions, that an update changes; padding is in none."""
    if not site.terms:
        return
    stored = site.pattern.stored(site.sizes)
    places = [_unraveled(site.pattern, group, stored, span) for group, span in zip(site.pattern.groups, spans, strict=True)]
    dims = tuple(next(d for d, group in enumerate(site.pattern.groups) if axis in group) for axis in site.axes)
    for e, g in itertools.product(_values(site, places, "e"), _values(site, places, "g")):
        if g not in site.terms:
            continue
        here = [_runs(_wanted(site, place, {"e": e, "g": g}, span)) for place, span in zip(places, spans, strict=True)]
        for window in itertools.product(*here):
            i, o = (_number(site, places[dim], axis)[window[dim]] for dim, axis in zip(dims, site.axes, strict=True))
            yield Cut(window, e, g, i, o, (dims[0], dims[1]))


def _unraveled(pattern: Pattern, group: Sequence[str], stored: Mapping[str, int], span: range) -> dict[str, _Numbers]:
    """Of each element of a stored dimension, its number along each axis."""
    sizes = [stored[axis] for axis in group]
    numbers = np.unravel_index(np.arange(span.start, span.stop), sizes)
    found = dict(zip(group, numbers, strict=True))
    return {axis: stored[axis] - 1 - each if axis in pattern.reversed else each for axis, each in found.items()}


def _values(site: Site, places: Sequence[Mapping[str, _Numbers]], axis: str) -> list[int]:
    found = next((place[axis] for place in places if axis in place), None)
    return [int(site.index.get(axis, 0))] if found is None else np.unique(found).tolist()


def _wanted(site: Site, place: Mapping[str, _Numbers], at: Mapping[str, int], span: range) -> _Numbers:
    """The elements of a stored dimension that are of this expert and of this one of gate and up, and no padding."""
    mask = np.ones(len(span), bool)
    for axis, numbers in place.items():
        if axis in at:
            mask &= numbers == at[axis]
        elif axis in site.pattern.padding:
            mask &= (_inside(site, place) if axis == "n" else numbers) < site.sizes[axis]
    return np.flatnonzero(mask)


def _runs(positions: _Numbers) -> list[slice]:
    """Positions as slices: one, of any step, if they are evenly spaced; else a slice for each run of neighbours."""
    steps = np.diff(positions)
    if not len(positions):
        return []
    if not len(steps) or (steps == steps[0]).all():
        return [slice(int(positions[0]), int(positions[-1]) + 1, int(steps[0]) if len(steps) else 1)]
    parts = np.split(positions, np.flatnonzero(steps != 1) + 1)
    return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]


def _number(site: Site, place: Mapping[str, _Numbers], axis: str) -> _Numbers:
    """The number along a logical axis; `n` may be cut into shards and chunks."""
    if axis != "n":
        return place[axis]
    inside = _inside(site, place)
    return inside + lengths(site.pattern, site.sizes)[1] * place["s"] if "s" in place else inside


def _inside(site: Site, place: Mapping[str, _Numbers]) -> _Numbers:
    """The number along `n` in a shard."""
    return place["n"] + lengths(site.pattern, site.sizes)[0] * place["c"] if "c" in place else place["n"]


def check_pattern(pattern: Pattern, axes: tuple[str, str], index: Index) -> str | None:
    """Why a tensor of this pattern cannot be computed, if it cannot."""
    known = {"e", "g", *axes, *CHUNKS}
    if strange := [axis for axis in pattern.axes if axis not in known]:
        return f"the axes {', '.join(strange)} of '{pattern.text}' stack several of them"
    homes = {d for d, group in enumerate(pattern.groups) for axis in group if axis in CHUNKS}
    inside = {axis for group in pattern.groups for axis in group} | index.keys()
    if len(homes) != 1 or not set(axes) <= inside:
        return f"'{pattern.text}' keeps {' and '.join(axes)} in no way that is known here"
    return None
