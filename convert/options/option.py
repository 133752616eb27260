"""What an option is: its sentence, how it is read, for what it is; and how those of a dataclass are completed.

In: a dataclass whose fields are annotated, and what a caller gives. Out: the dataclass with checked values. It knows no option.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, get_type_hints

from convert.errors import UsageError, did_you_mean
from convert.options import values

_Options = TypeVar("_Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What is said of an option besides its name, type and default.

    `text` is its sentence, `read` takes a word or a value and raises `ValueError` if it is none. `choices` are all there are.
    `show` stands for the value in the help, and `default` for the default where that reads better. `instead` is what may have
    been meant where an action does not take it. `of` is for how many checkpoints it is, where it is not for any number.
    """

    text: str
    read: Callable[[object], Any] = values.word
    choices: tuple[str, ...] = ()
    show: str = ""
    default: str = ""
    instead: str = ""
    of: int | None = None
    either: bool = False
    """Of a switch that is off: whether it can be said that it is off, since a command may turn it on."""


_OF = {
    1: "{flag} is for one checkpoint: where two are compared, every chunk is decoded",
    2: "{flag} is for two checkpoints: the digests of one are compared as a whole; name a second one",
}
"""Why an option is for so many checkpoints: what is said to who gives it for another number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """An option with its name and its default."""

    name: str
    default: Any
    option: Option

    @property
    def is_switch(self) -> bool:
        """Whether it is on or off."""
        return self.option.read is values.switch

    @property
    def flag(self) -> str:
        """As it is called on the command line; a switch that is on is called by what turns it off."""
        return f"--{'no-' if self.is_switch and self.default else ''}{self.name.replace('_', '-')}"

    @property
    def sentence(self) -> str:
        """What the option is, and its default where there is something to say."""
        usual = None if self.is_switch else self.default
        shown = self.option.default or ("" if usual is None else str(usual))
        whose = {1: "of one checkpoint: ", 2: "of two: "}.get(self.option.of or 0, "")
        return f"{whose}{self.option.text}{f' (default: {shown})' if shown else ''}"

    def value(self, given: object) -> Any:
        """What a caller gives, as the tool takes it.

        Raises:
            ValueError: it is not what the option takes.
        """
        if given is None and self.default is None:
            return None
        if self.option.choices and given not in self.option.choices:
            raise ValueError(
                f"{given!r} is none of {', '.join(self.option.choices)}{did_you_mean(str(given), self.option.choices)}"
            )
        return self.option.read(given)


def workers(jobs: int | None) -> int:
    """How many workers that is: as many as asked for, else one per CPU that we may use, at most 8."""
    return jobs or min(8, len(os.sched_getaffinity(0)))


def named(kind: type[Any]) -> tuple[Named, ...]:
    """The options of one of these dataclasses, in their order."""
    return _named(kind)  # type: ignore[arg-type]  # mypy takes no class for hashable


@cache  # annotations are text: to read those of all options takes longer than many a command
def _named(kind: type[Any]) -> tuple[Named, ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        Named(name=field.name, default=field.default, option=hints[field.name].__metadata__[0])
        for field in dataclasses.fields(kind)
    )


def complete(kind: type[_Options], given: Mapping[str, Any], *, of: int | None = None) -> _Options:
    """The options of this kind that are given, checked, and the defaults of the others, for this many checkpoints.

    Raises:
        UsageError: a value is not what its option takes, or it is for another number of checkpoints; names the argument.
    """
    found = {}
    for each in named(kind):
        if each.name in given:
            if of and each.option.of not in (None, of) and given[each.name] not in (None, False):
                raise UsageError(_OF[each.option.of].format(flag=each.flag))
            try:
                found[each.name] = each.value(given[each.name])
            except ValueError as error:
                raise UsageError(f"{each.name}: {error}") from None
    return kind(**found)
