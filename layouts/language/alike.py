"""Names that differ in nothing but whole numbers between dots. Pure.

In: names. Out: those that are alike, with their numbers as columns. It knows no template.

A checkpoint may have 100,000 names of a few dozen forms: what is asked of names is asked of one of each form, and what differs
among them is arithmetic on columns. A number is as templates read it, without leading zeros; `experts.07` is a form of its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")
"""A number between dots, where a name's beginning and end count as dots."""
_DIGITS = 9
"""Of the longest number: see `layouts.language.slots`."""
_BLOCK = 1 << 12
"""Names at a time: their letters stay in the cache of a core."""


class Alike(NamedTuple):
    """Names of one form: their places among all in order (R,), and their numbers (R, C)."""

    rows: NDArray[np.intp]
    numbers: NDArray[np.int64]

    def by(self, places: Sequence[int]) -> Iterator[Alike]:
        """Those that have these of their numbers in common."""
        keys = self.numbers[:, places]
        order = np.lexsort(keys.T[::-1]) if places else np.arange(len(self.rows))
        changes = (keys[order[1:]] != keys[order[:-1]]).any(axis=1).nonzero()[0] + 1
        yield from (Alike(self.rows[part], self.numbers[part]) for part in np.split(order, changes))


def alike(names: Sequence[str]) -> list[Alike]:
    """All names by their form, in the order of the first ones."""
    if not names:
        return []
    known = defaultdict[bytes, int](count().__next__)
    forms, numbers = [], []
    for at in range(0, len(names), _BLOCK):
        some = names[at : at + _BLOCK]
        text = "\0".join(["", *some, ""])
        if text.count("\0") > len(some) + 1:  # a name with NUL in it, as no file has one
            return [Alike(np.array([row]), np.array([_numbers(name)], np.int64)) for row, name in enumerate(names)]
        found, values = _apart(text.encode("utf-8", "surrogatepass"))
        forms.append(np.fromiter(map(known.__getitem__, found), np.intp, len(some)))
        numbers.append(values)
    form, values = np.concatenate(forms), np.concatenate(numbers)
    width = np.array([one.split(b".").count(b"0") for one in known], np.intp)
    first = width[form].cumsum() - width[form]
    each = np.split(form.argsort(kind="stable"), np.bincount(form).cumsum()[:-1])
    return [Alike(rows, values[first[rows, None] + np.arange(wide)]) for rows, wide in zip(each, width, strict=True)]


def _numbers(name: str) -> list[int]:
    return [int(found) for found in NUMBER.findall(name)]


def _apart(text: bytes) -> tuple[list[bytes], NDArray[np.int64]]:
    """Names with NUL before and behind each: the same with 0 in the place of each number, and the numbers of all in order."""
    letters = np.frombuffer(text, np.uint8).copy()
    digit = letters - ord("0") < 10  # below "0" it wraps around
    edges = (digit[1:] != digit[:-1]).nonzero()[0] + 1
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    around = letters[edges - np.tile([1, 0], len(starts))].reshape(-1, 2)
    outside = ((around == 0) | (around == ord("."))).all(axis=1)
    whole = outside & (lengths <= _DIGITS) & ((lengths == 1) | (letters[starts] != ord("0")))
    starts, lengths = starts[whole], lengths[whole]
    values, kept = np.zeros(len(starts), np.int64), np.ones(len(letters), bool)
    for place in range(lengths.max(initial=0)):
        more = lengths > place
        at = starts[more] + place
        values[more] = values[more] * 10 + letters[at] - ord("0")
        letters[at], kept[at] = ord("0"), place == 0
    return letters[kept].tobytes()[1:-1].split(b"\0"), values
