"""Sections of unequal length: the rows of several tensors as those of one, in which they take turns.

In: a text, sizes. Out: which row of which tensor is which row of the joined one. It never holds data.

    a: a m + a m + b y | b y

are two tensors: the first holds three sections behind one another, the second one more. The length of a section is the product
of its axes. Each is cut into `a` groups of one length; the joined tensor holds the first group of each, then the second.
So Qwen3.5 has queries, keys and values of all heads, and gates apart; MaxText has the four of each head of keys together.
An axis `1` has that size: `1: w | w | w w` are three tensors that stand behind one another in the joined one.

In patterns the rows are the axis `u`, and in the key of the several tensors `{t:qkv,z}` says which. Every row has one place on
the other side by construction: a group has the rows of its parts, and nothing between them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

ROWS, TENSOR, ONE = "u", "t", "1"
"""The axis of the rows, the slot that says which tensor, and the axis whose size is 1."""


class Stretch(NamedTuple):
    """Rows that lie in one piece on both sides: `row` of a tensor and those behind it are the joined one's, from `at` on."""

    tensor: int
    row: int
    at: int
    length: int


@dataclass(frozen=True)
class Sections:
    """What stands in a table.

    Raises:
        ValueError: the text is not of this form.
    """

    text: str

    def __post_init__(self) -> None:
        by, colon, _ = self.text.partition(": ")
        axes = [axis for tensor in self._tensors for section in tensor for axis in section]
        full = len(self._tensors) > 1 and all(map(len, itertools.chain(*self._tensors)))
        if not colon or not full or not all((axis.isalpha() or axis == ONE) and len(axis) == 1 for axis in (by, *axes)):
            raise ValueError(f"{self.text!r}: sections are written 'a: a m + b y | b y', of two tensors or more")

    @cached_property
    def _tensors(self) -> list[list[list[str]]]:
        return [[section.split() for section in each.split("+")] for each in self.text.partition(": ")[2].split("|")]

    def of(self, sizes: Mapping[str, int]) -> Turns:
        """With the sizes of its axes.

        Raises:
            KeyError: an axis has none.
            ValueError: one is not positive, or a section does not divide into so many groups.
        """
        by, sizes = self.text[0], {**sizes, ONE: 1}
        groups, parts = sizes[by], []
        for tensor in self._tensors:
            lengths = [math.prod(sizes[axis] for axis in section) for section in tensor]
            known = {axis: sizes[axis] for axis in (by, *itertools.chain(*tensor))}
            if any(size < 1 for size in known.values()) or any(length % groups for length in lengths):
                raise ValueError(f"sections of {lengths} rows do not divide into groups ({by}) with {known}")
            parts.append(tuple(length // groups for length in lengths))
        return Turns(text=self.text, groups=groups, parts=tuple(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """Sections with their sizes: so many groups, and the rows that each section of each tensor has in a group."""

    text: str
    groups: int
    parts: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        """The rows of the joined tensor."""
        return self.groups * self._each

    def size(self, tensor: int) -> int:
        """The rows of one of the tensors."""
        return self.groups * sum(self.parts[tensor])

    def joined(self, rows: range) -> Iterator[Stretch]:
        """Where rows of the joined tensor are in the others, in order."""
        at = rows.start
        while at < rows.stop:
            group, rest = divmod(at, self._each)
            place = next(place for place in self.places() if rest < place.at + place.length)
            inside = rest - place.at
            length = min(place.length - inside, rows.stop - at)
            yield Stretch(place.tensor, self.groups * place.row + group * place.length + inside, at, length)
            at += length

    def apart(self, tensor: int, rows: range) -> Iterator[Stretch]:
        """Where rows of one of the tensors are in the joined one, in order."""
        places, at = [place for place in self.places() if place.tensor == tensor], rows.start
        while at < rows.stop:
            place = next(place for place in places if at < self.groups * (place.row + place.length))
            group, inside = divmod(at - self.groups * place.row, place.length)
            length = min(place.length - inside, rows.stop - at)
            yield Stretch(tensor, at, group * self._each + place.at + inside, length)
            at += length

    def boxes(self, rows: range, tensor: int | str | None) -> Iterator[tuple[dict[str, range], dict[str, range]]]:
        """Rows of the joined tensor, or of this one of the others, each stretch of them with the same on the other side."""
        for one, row, at, length in self.joined(rows) if tensor is None else self.apart(int(tensor), rows):
            part = {ROWS: range(row, row + length), TENSOR: range(one, one + 1)}
            joined = {ROWS: range(at, at + length)}
            yield (joined, part) if tensor is None else (part, joined)

    def places(self) -> Iterator[Stretch]:
        """Each section in one group: where it begins among those of its tensor, and among all."""
        at = 0
        for tensor, lengths in enumerate(self.parts):
            row = 0
            for length in lengths:
                yield Stretch(tensor, row, at, length)
                row, at = row + length, at + length

    @property
    def _each(self) -> int:
        return sum(map(sum, self.parts))
