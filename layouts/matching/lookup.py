"""Find the family of a checkpoint: `config.json` first, the names of its tensors second, and never from a shape.

In: `config.json` and names. Out: a family, or an error that names the nearest. It never looks at shapes.

`config.json` names it at its top or, for a model of several parts, in one of them (`text_config`, `llm_config`,
`thinker_config.text_config`, ...). Where it names none that is known, names whose words have one meaning tell the family.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from layouts.errors import PlanError
from layouts.language.alike import alike
from layouts.language.layout import Layout, Layouts
from layouts.tables.families import NOT_GATED, Family, families_of
from layouts.tables.natives import SOURCES
from layouts.tables.targets import TARGETS

_ALL: Mapping[str, Layouts] = {**TARGETS, **SOURCES}
_KINDS = 1_000
"""Kinds of names that a hint looks at: a model has dozens, and a header of 50,000 odd names must not cost seconds."""
EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    "moe_num_primary_experts",
)
"""The names under which `config.json` gives the number of experts, at any depth; a cross-check of what the tensors say."""

_KINDS_OF = "moe_num_experts"
"""The word for the number of experts of each kind, where a layer has several: a list, or one number for all of them."""
_LISTS = ("pyramid_num_routed", _KINDS_OF)
"""The names of lists of them, one for each layer (the vision encoder of Dots 3 Note), or for each kind (ERNIE 4.5 VL)."""


def find_family(
    config: Mapping[str, Any],
    names: Sequence[str],
    *,
    where: Path,
    format: str,  # noqa: A002
    override: str | None = None,
    layout: str | None = None,
) -> Family:
    """The family called `override`, else what `config.json` names, at any depth, else what the names tell.

    Where they tell nothing, but fit the `layout` that the user names, it is one that has no model. `describe` checks that the
    names agree with it.

    Raises:
        PlanError: no such family, or it has no gate; says what was seen, and the nearest by the names of the experts.
    """
    known = {alias: f for f in families_of(format) for alias in (f.name, *f.model_types)}
    stated = [override] if override else list(_model_types(config))
    first = stated[0] if stated else None
    if isinstance(first, str) and first in known and (override or not known[first].by_names):
        return known[first]
    _check_gated(stated[:1], where)
    if not override:
        found = _of_a_part(stated[1:], names) or told_by_names(names, format) or _said(layout, names, format)
        if found:
            return found
        _check_gated(stated, where)
    raise _unknown(first, bool(override), known, names, where, format)


def _model_types(config: Mapping[str, Any]) -> Iterator[object]:
    """Every `model_type` of `config.json`, from the top down; the first is that of the whole, which may be None."""
    yield config.get("model_type")
    level: list[Any] = list(config.values())
    while level:
        parts = [part for part in level if isinstance(part, Mapping)]
        yield from (part["model_type"] for part in parts if isinstance(part.get("model_type"), str))
        level = [value for part in parts for value in part.values()]


def _of_a_part(stated: Iterable[object], names: Iterable[str]) -> Family | None:
    """The family that a part of the model is of; if several are known, the one whose names are there, if it is one."""
    kinds = list(stated)
    found = [family for family in families_of("hf") if any(kind in family.model_types for kind in kinds)]
    if len(found) > 1:
        fit = fitting(names, "hf")
        found = [family for family in found if family in fit]
    return found[0] if len(found) == 1 else None


def told_by_names(names: Iterable[str], format: str) -> Family | None:  # noqa: A002
    """The family whose words for gate, up and down have one meaning, if all three are there, and no other's are."""
    kinds = _kinds(names)
    found = [family for family in families_of(format) if family.by_names and _has(kinds, family.native[0]["wi"], family)]
    return found[0] if len(found) == 1 and _has(kinds, found[0].native[0]["wo"], found[0]) else None


def _said(layout: str | None, names: Iterable[str], format: str) -> Family | None:  # noqa: A002
    """The family without a model, if the user names a layout that the names fit."""
    family = next((family for family in families_of(format) if family.by_names), None)
    fits = layout and family and layout.partition(":")[0] in rows_fitting(names, family, _ALL)
    return family if fits else None


def _has(kinds: Iterable[str], layout: Layout, family: Family) -> bool:
    """Whether all projections of a role are among the names."""
    key = layout.template(family.experts)
    return {index.get("g") for name in kinds if (index := key.parse(name)) is not None} in ({0, 1}, {None})


def _check_gated(stated: Iterable[object], where: Path) -> None:
    for kind in stated:
        if isinstance(kind, str) and kind in NOT_GATED:
            raise PlanError(
                f"{where}: {kind!r} has {NOT_GATED[kind]}: no gate, so there is nothing to fuse. Use the checkpoint as it is"
            )


def _unknown(
    stated: object,
    said: bool,
    known: Mapping[str, Family],
    names: Sequence[str],
    where: Path,
    format: str,  # noqa: A002
) -> PlanError:
    """The error that names what was seen, and what is near: by spelling for a word of the user, else by the names first."""
    seen = f"model_type {stated!r} in config.json is" if stated else "config.json names no model_type, so this is"
    if said:
        seen = f"{stated!r} is"
    fit = fitting(names, format)
    by_names = [] if said else [family for family in families_of(format) if family.by_names]
    rows = [row for family in by_names for row in rows_fitting(names, family, _ALL)]
    called = any(word in name.lower() for name in names for word in ("expert", "moe", "switch_mlp"))
    if names and not (said or fit or rows or called):
        return PlanError(
            f"{where}: {seen} no known MoE family, and none of its {len(names):,} tensors is called an expert's: a dense model "
            f"has nothing to fuse. If these are experts, say with --family how they are stored"
        )
    spelt = list(known) if said or not fit else [alias for family in fit for alias in (family.name, *family.model_types)]
    near = get_close_matches(str(stated), spelt, n=1) or [family.name for family in fit][:6]
    hint = f" (nearest: {', '.join(near)})" if near else ""
    if said:
        return PlanError(f"{where}: {seen} no known MoE family{hint}; --family takes one that convert --families lists")
    more = f", or how it does with --source-layout: {', '.join(dict.fromkeys(rows))}" if rows else ""
    return PlanError(
        f"{where}: {seen} no known MoE family{hint}. convert --families lists the known ones. If it stores its experts as one "
        f"of these does, say so with --family{more}; first tensors: {', '.join(heapq.nsmallest(3, names, key=_experts_first))}"
    )


def fitting(names: Iterable[str], format: str) -> list[Family]:  # noqa: A002
    """The models that know most of these names as experts, those that publish them so first; never to choose one."""
    kinds = _kinds(names)
    models = [family for family in families_of(format) if not family.by_names]
    known = [[_known(kinds, table, family) for table in family.native] for family in models]
    scores = [len(set().union(*found)) for found in known]
    best = [(not found[0], number) for number, found in enumerate(known) if scores[number] == max(scores) > 0]
    return [models[number] for _, number in sorted(best)]


def rows_fitting(names: Iterable[str], family: Family, tables: Mapping[str, Layouts] = SOURCES) -> list[str]:
    """The layouts by name that only a user can tell, and that some of these names fit as gate and up and as down."""
    kinds = _kinds(names)
    fit = (name for name, table in tables.items() if all(_has(kinds, layout, family) for layout in table.values()))
    own = family.native if family.by_names else family.stored
    return [name for name in fit if family.own(tables[name]) not in own and not name.startswith("maxtext")]


def knows(family: Family, names: Iterable[str]) -> bool:
    """Whether some of these names are experts as the family stores them."""
    return any(_known(_kinds(names), table, family) for table in family.stored)


def _known(kinds: Iterable[str], table: Layouts, family: Family) -> set[str]:
    """Those of these names that are experts in this layout; none without gate or up, for down is called the same in many."""
    found = {role: {name for name in kinds if table[role].template(family.experts).parse(name) is not None} for role in table}
    return found["wi"] | found["wo"] if found["wi"] else set()


def _kinds(names: Iterable[str]) -> list[str]:
    """The first name of each form, those of experts first, and no more than a model has."""
    every = list(names)
    return heapq.nsmallest(_KINDS, (every[each.rows[0]] for each in alike(every)), key=_experts_first)


def _experts_first(name: str) -> tuple[bool, str]:
    return "expert" not in name, name


def expert_counts(config: Mapping[str, Any]) -> frozenset[int]:
    """The numbers of experts that `config.json` states: several for models of several parts, none where it is silent."""
    found, more = frozenset(_counts(config)), idle_experts(config)
    return found | {count + more for count in found} if more else found


def experts_of_kinds(config: Mapping[str, Any], kinds: int) -> tuple[int, ...] | None:
    """How many experts a layer has of each kind, by `config.json` at any depth; None if it does not say one thing."""
    found = {tuple(value) if isinstance(value, list) else (value,) * kinds for value in _values(config, _KINDS_OF)}
    stated = found.pop() if len(found) == 1 else ()
    return stated if len(stated) == kinds and all(type(count) is int and count > 0 for count in stated) else None


def _values(config: Mapping[str, Any], word: str) -> Iterator[Any]:
    for key, value in config.items():
        if key == word and value is not None:
            yield value
        elif isinstance(value, Mapping):
            yield from _values(value, word)


def idle_experts(config: Mapping[str, Any]) -> int:
    """How many experts more `config.json` counts that are the identity; they have rows of gate and up, and none of down.

    Source: transformers `LongcatFlashExperts`, whose checkpoints have them; what is published has no rows at all.
    """
    stated = config.get("zero_expert_num")
    return stated if type(stated) is int and stated > 0 else 0


def _counts(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        counts = value if key in _LISTS and isinstance(value, list) else [value] if key in EXPERT_COUNTS else []
        if counts:
            yield from (count for count in counts if type(count) is int and count > 0)
        elif isinstance(value, Mapping):
            yield from _counts(value)
