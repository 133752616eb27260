"""Sort the names of a checkpoint into groups: which layout knows each, and what its name says of its place.

In: names, the layouts to try in order. Out: the names of each group, and those that no layout knows. It never looks at a shape.

A checkpoint may have 100,000 names in a few hundred groups. So a layout is asked about one name of each form, and a group is
worked out once for all names of a form that have the same numbers but for their expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from layouts.errors import PlanError
from layouts.language.alike import NUMBER, Alike, alike
from layouts.language.layout import ROLES, Placed
from layouts.matching.candidates import Known
from layouts.matching.group import Block
from layouts.matching.refusal import Refusal
from layouts.reader import Reader
from layouts.tables.families import Family

Key = tuple[str, int, Block]
"""Role, number of the part, block."""


@dataclass(slots=True)
class Found:
    """The tensors of a group by their places among all, where their names are from, and how many experts these speak of."""

    known: Known
    placed: Placed
    first: str
    rows: list[NDArray[np.intp]] = field(default_factory=list)
    experts: int = 1


Sorted = dict[Key, Found]


class _Some(NamedTuple):
    """Names that a layout, by its number, may put into one group; the `experts` (R,) of names that differ in nothing else."""

    names: Alike
    layout: int | None
    experts: NDArray[np.int64] | None = None


def sort_names(reader: Reader, family: Family, known: Sequence[Known]) -> tuple[Sorted, list[str]]:
    """The groups by the first layout that knows each name, and the names that belong to none.

    Raises:
        PlanError: a name is an expert's that no table knows, or two layouts hold the same weights.
    """
    every, placed = list(reader.tensors), [each.layout.place(family.experts) for each in known]
    refuse, matched = Refusal(reader, family), Sorted()
    waiting = [some for names in alike(every) for some in _parts(every, placed, names)]
    waiting.sort(key=lambda some: -some.names.rows[0])  # what is wrong is said of the first name
    rest: list[int] = []
    while waiting:
        names, number, experts = waiting.pop()
        if number is None:
            refuse.unknown_expert(every[names.rows[0]])
            rest += names.rows.tolist()
        elif (found := _group(reader, known[number], placed[number], every[names.rows[0]], matched)) is None:
            waiting += _parts(every, placed, names, number + 1)
        else:
            found[0].rows.append(names.rows)
            found[0].experts = max(found[0].experts, 1 + int(found[1] if experts is None else experts.max()))
    return matched, [every[row] for row in sorted(rest)]


def _parts(every: Sequence[str], placed: Sequence[Placed], names: Alike, first: int = 0) -> Iterator[_Some]:
    """Names of one form by the first layout, from this one on, that may know them: those that differ in their expert alone."""
    name = every[names.rows[0]]
    spans = [found.span() for found in NUMBER.finditer(name)]
    for number, key in enumerate((each.key for each in placed[first:]), first):
        if (match := key.match(name)) is None and key.uniform:
            continue
        expert = match.span(key.at["e"]) if match and key.uniform and "e" in key.plain_slots else None
        places = [place for place, span in enumerate(spans) if span != expert]
        for some in names.by(places):
            yield _Some(some, number, some.numbers[:, spans.index(expert)] if expert in spans else None)
        return
    yield _Some(names, None)


def _group(reader: Reader, known: Known, placed: Placed, name: str, matched: Sorted) -> tuple[Found, int] | None:
    """The group that a name belongs to, and the expert that it speaks of; None if the layout does not know it."""
    if (index := placed.key.parse(name)) is None:
        return None
    role, part, expert = known.role, int(index.pop("part", 0)), int(index.get("e", 0))
    block = frozenset((axis, at) for axis, at in index.items() if axis not in ROLES[role])
    found = matched.setdefault((role, part, block), Found(known, placed, name))
    if found.placed is not placed and found.placed != placed:
        raise PlanError(f"{reader.path}: {name} and {found.first} hold the same weights in two layouts; remove one")
    return found, expert
