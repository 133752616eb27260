"""Sort the names of a checkpoint into groups: which layout knows each, and what its name says of its place.

In: names, the layouts to try in order. Out: the names of each group, and those that no layout knows. It never looks at a shape.

A checkpoint may have 100,000 names in a few hundred groups. So a name is only taken apart into texts, and what these mean is
looked up: a group is worked out once for all names that have the same texts but for their projection and expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from layouts.errors import PlanError
from layouts.language.layout import ROLES, Placed
from layouts.matching.candidates import Known
from layouts.matching.group import Block
from layouts.matching.refusal import Refusal
from layouts.reader import Reader
from layouts.tables.families import Family

Key = tuple[str, int, Block]
"""Role, number of the part, block."""


class Found(NamedTuple):
    """The tensors of a group, where their names are from, and the experts that these speak of."""

    known: Known
    placed: Placed
    names: list[str]
    experts: set[str]


Sorted = dict[Key, Found]


class _Reading:
    """A layout to try, with what was found of names by their texts; None where these fit no place of it."""

    def __init__(self, known: Known, placed: Placed) -> None:
        self.known, self.placed, self.match = known, placed, placed.key.match
        inner = [slot for slot in placed.key.plain_slots if slot in ROLES[known.role]]
        self.outer = tuple(at for slot, at in placed.key.at.items() if slot not in inner)
        self.expert = placed.key.at["e"] if "e" in inner else None
        self.seen: dict[str | tuple[str, ...], Found | None] = {}


def sort_names(reader: Reader, family: Family, known: Sequence[Known]) -> tuple[Sorted, list[str]]:
    """The groups by the first layout that knows each name, and the names that belong to none.

    Raises:
        PlanError: a name is an expert's that no table knows, or two layouts hold the same weights.
    """
    readings = [_Reading(each, each.layout.place(family.experts)) for each in known]
    refuse = Refusal(reader, family)
    matched: Sorted = {}
    verbatim = []
    for name in reader.tensors:
        for reading in readings:
            if (match := reading.match(name)) is None:
                continue
            texts = match.group(*reading.outer) if reading.outer else ""
            if texts not in reading.seen:
                reading.seen[texts] = _first(reader, reading, name, matched)
            if (found := reading.seen[texts]) is not None:
                found.names.append(name)
                if reading.expert is not None:
                    found.experts.add(match[reading.expert])
                break
        else:
            refuse.unknown_expert(name)
            verbatim.append(name)
    return matched, verbatim


def _first(reader: Reader, reading: _Reading, name: str, matched: Sorted) -> Found | None:
    """The group that the first name with its texts belongs to; None if the layout does not know it."""
    if (index := reading.placed.key.parse(name)) is None:
        return None
    role, part, expert = reading.known.role, int(index.pop("part", 0)), str(index.get("e", 0))
    block = frozenset((axis, at) for axis, at in index.items() if axis not in ROLES[role])
    found = matched.setdefault((role, part, block), Found(reading.known, reading.placed, [], set()))
    if found.placed is not reading.placed and found.placed != reading.placed:
        raise PlanError(f"{reader.path}: {name} and {found.names[0]} hold the same weights in two layouts; remove one")
    found.experts.add(expert)
    return found
