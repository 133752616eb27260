"""A tensor's name as a template: the axes of the logical weight that a checkpoint keeps in its names.

In: a key's text. Out: `parse` and `render`, exact inverses. It never uses regular expressions of a table.

A template parses a name into an index and renders an index into the name again; that one thing does both is why a layout needs
no inverse.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from layouts.language.slots import SLOT, Index, Slot

_NUMBER = re.compile(r"(?:^|\.)[0-9]+(?:\.|$)")
"""What may be a number between dots, wherever it stands."""


@dataclass(frozen=True)
class Template:
    """A tensor name with slots: `{e}` an index, `{g:gate,up}` a choice (its place is the index), `{path}` any text.

    `{within:?}` is up to three modules, each with the dot behind it, or nothing: `{l}.{within:?}experts`.

    An index may count otherwise than the name: `{l*4+1}` is 1, 5, 9, ... for `l` = 0, 1, 2, ..., and `{l*4+p}` has two: 6 is
    `l` = 1 and `p` = 2. `{kind*64+e:2}` has two kinds, and all numbers from 64 on are of the second. In
    `{kind*first+e:2}` the number is still open, and no name is of that form; see `Layout.filled`.

    Names match in full and indices are digits without leading zeros, so that `parse` and `render` are exact inverses.

    Raises:
        ValueError: a slot is misspelt, used twice or not set off from the next, or a choice has too few words.
    """

    text: str
    literal: bool = False
    """Whether braces are only braces: a table is ours, but checkpoints choose their names themselves."""

    def __post_init__(self) -> None:
        if self.literal:
            return
        if len(set(self.slots)) != len(self.slots):
            raise ValueError(f"{self.text!r}: a slot is used twice")
        if any(len(set(slot.words)) < max(2, len(slot.words)) for slot in self._slots if slot.words):
            raise ValueError(f"{self.text!r}: a choice needs two words or more, all different")
        if any(slot.inner and slot.factor == 1 for slot in self._slots):
            raise ValueError(f"{self.text!r}: of two axes in one number the first needs a factor")
        if any(brace in literal for literal in self._literals for brace in "{}") or self._run_together:
            raise ValueError(f"{self.text!r}: slots are written {{e}} or {{g:gate,up}}, with text between any two")

    @property
    def _run_together(self) -> bool:
        """Whether it could not be told where a slot ends and the next begins; of two choices it can, if all pairs differ."""
        for one, other, between in zip(self._slots, self._slots[1:], self._literals[1:], strict=False):
            pairs = {first + second for first in one.words for second in other.words}
            if not between and (not pairs or len(pairs) < len(one.words) * len(other.words)):
                return True
        return False

    @cached_property
    def _parts(self) -> list[str]:
        """Literal, axis, factor, offset, choices, literal, axis, ..., literal."""
        return [self.text] if self.literal else SLOT.split(self.text)

    @cached_property
    def _literals(self) -> list[str]:
        return self._parts[::5]

    @cached_property
    def _slots(self) -> tuple[Slot, ...]:
        return tuple(Slot.of(*self._parts[at : at + 4]) for at in range(1, len(self._parts), 5))

    @cached_property
    def _plain(self) -> tuple[tuple[str, Callable[[str], int | str]], ...]:
        """Each slot with how it is read, if all are read without arithmetic; a checkpoint may have 100,000 names."""
        found = [(slot.axis, slot.plain) for slot in self._slots]
        return tuple((axis, read) for axis, read in found if read) if all(read for _, read in found) else ()

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The axes stored in the name, in order of appearance."""
        return tuple(axis for slot in self._slots for axis in slot.axes)

    @cached_property
    def choices(self) -> Mapping[str, int]:
        """How many words each choice has."""
        return {slot.axis: len(slot.words) for slot in self._slots if slot.words}

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        pattern = re.escape(self._literals[0])
        for slot, literal in zip(self._slots, self._literals[1:], strict=True):
            pattern += slot.regex + re.escape(literal)
        return re.compile(pattern, re.DOTALL)

    def match(self, name: str) -> re.Match[str] | None:
        """Take a name apart into the texts of its slots, if it is of this form; what they mean, `parse` says."""
        for literal in self._literals:  # most templates meet no name that has these, and need no regular expression
            if literal not in name:
                return None
        return self._regex.fullmatch(name)

    @cached_property
    def at(self) -> Mapping[str, int]:
        """In which group of a match the text of each slot is, by the first axis of the slot."""
        return {slot.axis: number for number, slot in enumerate(self._slots, 1)}

    @cached_property
    def plain_slots(self) -> frozenset[str]:
        """The slots that are read without arithmetic."""
        return frozenset(slot.axis for slot in self._slots if slot.plain)

    @cached_property
    def uniform(self) -> bool:
        """Whether of names that are alike (`layouts.language.alike`) all are of this form, or none: it has no number itself."""
        around = zip(self._slots, self._literals, self._literals[1:], strict=False)
        texts = [f"{before}{word}{behind}" for slot, before, behind in around for word in slot.words]
        return not any(map(_NUMBER.search, (*self._literals, *texts)))

    @cached_property
    def _rendered(self) -> tuple[tuple[Slot, str], ...]:
        """Each slot with the text behind it."""
        return tuple(zip(self._slots, self._literals[1:], strict=True))

    def parse(self, name: str) -> dict[str, int | str] | None:
        """The index that `name` stands for, or None when the name is not of this form."""
        if not (match := self.match(name)):
            return None
        if self._plain:
            return {axis: read(text) for (axis, read), text in zip(self._plain, match.groups(), strict=True)}
        index: dict[str, int | str] = {}
        for slot, text in zip(self._slots, match.groups(), strict=True):
            if (found := slot.parse(text)) is None:
                return None
            index |= found
        return index

    def render(self, index: Index) -> str:
        """The name at `index`; entries that are not slots of this template are ignored.

        Raises:
            KeyError: the index lacks a slot.
            ValueError: the second axis of a number is beyond the factor of the first.
        """
        name = self._literals[0]
        for slot, literal in self._rendered:
            name += slot.render(index) + literal
        return name

    def names(self, index: Index, spans: Mapping[str, range]) -> Iterator[str]:
        """The names at an index where these axes run, the last one fastest: `render` for 100,000 names.

        What an axis is called is looked up once for each of its values, and not for each name.

        Raises:
            KeyError, ValueError: see `render`.
        """
        if any(slot.inner for slot in self._slots):
            for point in itertools.product(*spans.values()):
                yield self.render({**index, **dict(zip(spans, point, strict=True))})
            return
        slots = {slot.axis: slot for slot in self._slots}
        words = [slots[axis].texts(span) if axis in slots else [""] * len(span) for axis, span in spans.items()]
        number = {axis: at for at, axis in enumerate(spans)}
        name = _unformatted(self._literals[0])
        for slot, literal in self._rendered:
            at = number.get(slot.axis)
            name += (_unformatted(slot.render(index)) if at is None else f"{{{at}}}") + _unformatted(literal)
        yield from itertools.starmap(name.format, itertools.product(*words))

    @lru_cache(maxsize=1 << 10)  # noqa: B019 - as `Layout.place`
    def bind(self, slot: str, value: int) -> Template:
        """This template with one choice made; unchanged when it has no such slot."""
        for found in self._slots:
            if found.axis == slot and found.words:
                return Template(self.text.replace(f"{{{slot}:{','.join(found.words)}}}", found.words[value]))
        return self


def _unformatted(text: str) -> str:
    """With braces that `str.format` leaves."""
    return text.replace("{", "{{").replace("}", "}}")
