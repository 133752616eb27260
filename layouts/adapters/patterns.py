r"""PEFT's `rank_pattern` and `alpha_pattern`: which value a module has.

In: a mapping of patterns, names of modules. Out: values. A pattern is input: only words, dots, `.*`, `\d+` and simple choices
are taken, so that none of them can run for ever.

PEFT and vLLM match `(.*\.)?(PATTERN)$` from the start of a module's name, and the first match wins.
Source: PEFT 0.21 `tuners/tuners_utils.py` (`get_pattern_key`), vLLM 0.33 `lora/peft_helper.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from layouts.errors import PlanError

_LONGEST, _WILDCARDS = 500, 3
_PLAIN = re.compile(r"(?:[A-Za-z0-9_-]|\\?\.)+")
_WILD = re.compile(r"\.[*+]|\\d\+|\[0-9\]\+")
_PIECE = re.compile(rf"{_WILD.pattern}|\\?\.|[A-Za-z0-9_-]+|\(\?:|[()|]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """Patterns in their order; `plain` ones are ends of names, found at once however many there are."""

    values: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    plain: Mapping[str, int] = field(default_factory=dict)
    others: tuple[tuple[int, re.Pattern[str]], ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any], where: object) -> Patterns:
        """Look patterns through.

        Raises:
            PlanError: one is more than this tool reads.
        """
        plain, others = dict[str, int](), []
        for order, key in enumerate(values):
            if _PLAIN.fullmatch(key) and len(key) <= _LONGEST and not _WILD.search(key):
                plain.setdefault(key.replace("\\.", "."), order)
            else:
                others.append((order, _compiled(key, where)))
        return cls(values=values, keys=tuple(values), plain=plain, others=tuple(others))

    def key(self, module: str) -> str | None:
        """The first pattern that matches a module."""
        orders = [self.plain[end] for end in _ends(module) if end in self.plain]
        orders += [order for order, regex in self.others if regex.match(module)]
        return self.keys[min(orders)] if orders else None

    def get(self, module: str, default: Any) -> Any:
        """The value of a module."""
        return default if (key := self.key(module)) is None else self.values[key]


def _ends(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while module:
        yield module
        module = module.partition(".")[2]


def _compiled(key: str, where: object) -> re.Pattern[str]:
    body = key.removeprefix("^").removesuffix("$")
    rest = _PIECE.sub("", body)
    if not body or rest or len(key) > _LONGEST or len(_WILD.findall(body)) > _WILDCARDS:
        raise PlanError(
            f"{where}: the pattern {key[:80]!r} holds more than words, dots, .*, \\d+ and (a|b); write out the modules' names"
        )
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise PlanError(f"{where}: the pattern {key[:80]!r} cannot be read: {error}") from None
