"""A tensor's name as a template: the axes of the logical weight that a checkpoint keeps in its names.

A template parses a name into an index and renders an index into the name again; that one thing does both is why a layout needs
no inverse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

Index = Mapping[str, int | str]
"""Where a name puts its tensor: `{"l": 3, "e": 17, "g": 0}`; a path slot holds text."""

_SLOT = re.compile(r"\{([a-z]+)(?:\*([1-9]\d*))?(?:\+([1-9]\d*))?(?::([^{}]+))?\}")
_INTEGER = r"(0|[1-9][0-9]{0,8})"
"""Nine digits at most: no checkpoint has more of anything, and int() refuses what is much longer."""
_PATH = r"(.+)"


@dataclass(frozen=True)
class Template:
    """A tensor name with slots: `{e}` an index, `{g:gate,up}` a choice (its place is the index), `{path}` any text.

    An index may count otherwise than the name: `{l*4+1}` is 1, 5, 9, ... for `l` = 0, 1, 2, ...

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
        if any(len(set(words)) < max(2, len(words)) for words in self._choices.values()):
            raise ValueError(f"{self.text!r}: a choice needs two words or more, all different")
        if any(brace in literal for literal in self._literals for brace in "{}") or "" in self._literals[1:-1]:
            raise ValueError(f"{self.text!r}: slots are written {{e}} or {{g:gate,up}}, with text between any two")

    @cached_property
    def _parts(self) -> list[str]:
        """Literal, slot, factor, offset, choices, literal, slot, ..., literal."""
        return [self.text] if self.literal else _SLOT.split(self.text)

    @cached_property
    def _literals(self) -> list[str]:
        return self._parts[::5]

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The axes stored in the name, in order of appearance."""
        return tuple(self._parts[1::5])

    @cached_property
    def _scales(self) -> dict[str, tuple[int, int]]:
        """Factor and offset of the slots that have them."""
        found = zip(self.slots, self._parts[2::5], self._parts[3::5], strict=True)
        return {slot: (int(factor or 1), int(offset or 0)) for slot, factor, offset in found if factor or offset}

    @cached_property
    def _choices(self) -> dict[str, tuple[str, ...]]:
        pairs = zip(self.slots, self._parts[4::5], strict=True)
        return {slot: tuple(words.split(",")) for slot, words in pairs if words}

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        def slot(name: str) -> str:
            if words := self._choices.get(name):
                return "(" + "|".join(map(re.escape, words)) + ")"
            return _INTEGER if len(name) == 1 else _PATH

        pattern = re.escape(self._literals[0])
        for name, literal in zip(self.slots, self._literals[1:], strict=True):
            pattern += slot(name) + re.escape(literal)
        return re.compile(pattern, re.DOTALL)

    def parse(self, name: str) -> dict[str, int | str] | None:
        """The index that `name` stands for, or None when the name is not of this form."""
        if not (match := self._regex.fullmatch(name)):
            return None
        index = {slot: self._value(slot, text) for slot, text in zip(self.slots, match.groups(), strict=True)}
        for slot, (factor, offset) in self._scales.items():
            number, rest = divmod(int(index[slot]) - offset, factor)
            if rest or number < 0:
                return None
            index[slot] = number
        return index

    def _value(self, slot: str, text: str) -> int | str:
        if words := self._choices.get(slot):
            return words.index(text)
        return int(text) if len(slot) == 1 else text

    def render(self, index: Index) -> str:
        """The name at `index`; entries that are not slots of this template are ignored.

        Raises:
            KeyError: the index lacks a slot.
        """
        name = self._literals[0]
        for slot, literal in zip(self.slots, self._literals[1:], strict=True):
            words, (factor, offset) = self._choices.get(slot), self._scales.get(slot, (1, 0))
            text = words[int(index[slot])] if words else str(index[slot])
            name += (str(int(text) * factor + offset) if slot in self._scales else text) + literal
        return name

    def bind(self, slot: str, value: int) -> Template:
        """This template with one choice made; unchanged when it has no such slot."""
        words = self._choices.get(slot)
        if not words:
            return self
        return Template(self.text.replace(f"{{{slot}:{','.join(words)}}}", words[value]))
