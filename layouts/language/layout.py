"""A layout: a key template and an axis pattern for each role.

In: a key and a pattern. Out: a checked layout. It knows no model.

The role `wi` is the gate (`g` = 0, `wi_0`) and the up (`g` = 1, `wi_1`) projection, with the logical axes `e k g n`; `wo` is
the down projection, `e n k`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from layouts.language.parts import words
from layouts.language.pattern import Pattern
from layouts.language.template import Template

ROLES: Mapping[str, frozenset[str]] = {"wi": frozenset("ekgn"), "wo": frozenset("enk")}
"""Every role with the axes that its key and its pattern must hold between them."""
_MAY = {"...", "s", "c", "part", "path", "l", "moe", "kind", "within"}
"""What they may hold besides: scan axes, the chunks of `n`, the word of a companion, and a place that is not the family's."""
OPEN = "*first+"
"""Stands in a key before `e` for the number of experts of the first kind, where a layer has two kinds, numbered through."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one role is stored.

    In the key, `{experts}` stands for the family's place of experts, `{beside}` for the module around it with its dot, and
    `{part}` for the word of the weight or of a companion (see `layouts.language.parts`); a key without it has no companions.
    """

    key: str
    pattern: str

    def filled(self, first: int) -> Layout:
        """This layout, for so many experts of the first kind."""
        return Layout(self.key.replace(OPEN, f"*{first}+"), self.pattern)

    @lru_cache(maxsize=1 << 10)  # noqa: B019 - rows of tables, which are there for ever, and a few of a record
    def place(self, experts: str) -> Placed:
        """This layout below a place, ready to parse and render."""
        return Placed(self.template(experts), Pattern(self.pattern))

    @lru_cache(maxsize=1 << 10)  # noqa: B019
    def template(self, experts: str) -> Template:
        """The full key alone."""
        return Template(words(self.located(experts).key).replace("{experts}", experts))

    def located(self, experts: str) -> Layout:
        """This layout with the module around these experts, and its dot, for `{beside}`."""
        around = experts.removesuffix("experts") if experts.endswith("experts") else f"{experts}."
        return Layout(self.key.replace("{beside}", around), self.pattern)


@dataclass(frozen=True, slots=True)
class Placed:
    """A layout with its full key."""

    key: Template
    pattern: Pattern


Layouts = Mapping[str, Layout]
"""A complete layout of a MoE block: one `Layout` per role."""


def located(table: Layouts, experts: str) -> Layouts:
    """Both roles of a layout with the module around these experts for `{beside}`."""
    return {role: layout.located(experts) for role, layout in table.items()}


def layouts(*, wi: tuple[str, str], wo: tuple[str, str]) -> Layouts:
    """Build and check one row: each logical axis of a role is held exactly once, by the key or by the pattern.

    Raises:
        ValueError: an axis is missing, held twice, or unknown.
    """
    return {"wi": checked("wi", *wi), "wo": checked("wo", *wo)}


def checked(role: str, key: str, pattern: str) -> Layout:
    """One entry of a row.

    Raises:
        ValueError: an axis is missing, held twice, or unknown.
    """
    axes = [*Template(words(key).replace("{experts}", "").replace("{beside}", "")).slots, *_axes(pattern)]
    if sorted(set(axes) - _MAY) != sorted(ROLES[role]) or len(axes) != len(set(axes)):
        raise ValueError(f"{role} needs each of {sorted(ROLES[role])} once, {key} '{pattern}' has {axes}")
    return Layout(key, pattern)


@cache  # of 100 rows, most have one of a dozen patterns
def _axes(pattern: str) -> tuple[str, ...]:
    return Pattern(re.sub(r"\{(shards|align|block)\}", "1", pattern.replace("{pad}", ""))).axes
