"""One slot of a tensor name: what it may hold, how its text is read, and how it is written. Pure.

In: the text of a slot. Out: how names are matched there, and what axis and number stand for what text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Index = Mapping[str, int | str]
"""Where a name puts its tensor: `{"l": 3, "e": 17, "g": 0}`; a path slot holds text."""

SLOT = re.compile(r"\{([a-z]+)(?:\*([1-9]\d*|first))?(?:\+([1-9]\d*|[a-z]))?(?::([^{}]+))?\}")
_INTEGER = r"(0|[1-9][0-9]{0,8})"
"""Nine digits at most: no checkpoint has more of anything, and int() refuses what is much longer."""
_PATH = r"(.+)"
_NEVER = r"(?!)()"
"""No name: a template with a number that nobody has filled in must not be taken for one that has it."""
_WITHIN = r"((?:[^.]+\.){0,3})"
"""A few modules or none; not any number of them, as hostile names would be searched for each beginning again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A slot of a template: a path, `optional` modules with their dots, a choice of `words`, or a number.

    A number is `factor * axis` plus an `offset` or an `inner` axis, whose axis is below a `limit`; a factor of 0 is still open.
    """

    axis: str
    factor: int = 1
    offset: int = 0
    inner: str = ""
    limit: int = 0
    words: tuple[str, ...] = ()
    optional: bool = False

    @classmethod
    def of(cls, axis: str, factor: str | None, offset: str | None, words: str | None) -> Slot:
        """From what the text of a slot says."""
        inner = offset if offset and offset.isalpha() else ""
        limit = words if words and inner and words.isdecimal() else ""
        return cls(
            axis=axis,
            factor=0 if factor == "first" else int(factor or 1),
            offset=int(offset or 0) if not inner else 0,
            inner=inner,
            limit=int(limit or 0),
            words=tuple(words.split(",")) if words and words != "?" and not limit else (),
            optional=words == "?",
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that its text stands for."""
        return (self.axis, self.inner) if self.inner else (self.axis,)

    @property
    def regex(self) -> str:
        """What its text may be, as a group of a regular expression."""
        if self.words:
            return f"({'|'.join(map(re.escape, self.words))})"
        if not self.factor:
            return _NEVER
        return _WITHIN if self.optional else _INTEGER if self.is_number else _PATH

    @property
    def is_number(self) -> bool:
        """Whether its text is a number, and no path."""
        return len(self.axis) == 1 or bool(self.inner)

    @property
    def plain(self) -> Callable[[str], int | str] | None:
        """What a word stands for where that needs no arithmetic."""
        if self.words:
            return {word: at for at, word in enumerate(self.words)}.__getitem__
        if not self.is_number:
            return str
        return None if self.inner or self.offset or self.factor > 1 else int

    def parse(self, text: str) -> dict[str, int | str] | None:
        """What a text stands for; None if there is no such place."""
        if self.plain:
            return {self.axis: self.plain(text)}
        number, rest = divmod(int(text) - self.offset, self.factor)
        if self.limit and number >= self.limit:
            number, rest = self.limit - 1, int(text) - self.factor * (self.limit - 1)
        if self.inner:
            return {self.axis: number, self.inner: rest}
        return None if rest or number < 0 else {self.axis: number}

    def texts(self, span: range) -> list[str]:
        """The texts of its axis in a span, if it has one axis."""
        return [*map(str, span)] if self.plain is int else [self.render({self.axis: at}) for at in span]

    def render(self, index: Index) -> str:
        """The text at an index.

        Raises:
            KeyError: the index lacks an axis.
            ValueError: the second axis of a number is beyond the factor of the first.
        """
        if self.words:
            return self.words[int(index[self.axis])]
        if not self.is_number:
            return str(index[self.axis])
        if not self.inner and self.factor == 1 and not self.offset:
            return str(int(index[self.axis]))
        rest = int(index[self.inner]) if self.inner else self.offset
        if self.inner and rest >= self.factor > 0 and int(index[self.axis]) != self.limit - 1:
            raise ValueError(f"{self.inner} = {rest} is not below {self.factor}")
        return str(int(index[self.axis]) * self.factor + rest)
