"""Find the family of a checkpoint: `config.json` first, the names of its tensors second, and never from a shape.

In: `config.json` and names. Out: a family, or an error that names the nearest. It never looks at shapes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from layouts.errors import PlanError
from layouts.tables.families import NOT_GATED, Family, families_of

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_KINDS = 1_000
"""Kinds of names that a hint looks at: a model has dozens, and a header of 50,000 odd names must not cost seconds."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The names under which `config.json` gives the number of experts, at any depth; a cross-check of what the tensors say."""


def find_family(
    model_type: object,
    names: Sequence[str],
    *,
    where: Path,
    format: str,  # noqa: A002
    override: str | None = None,
) -> Family:
    """The family called `override`, else `model_type`; `describe` checks that the names agree with it.

    Raises:
        PlanError: no such family; says what was seen, and the nearest known one by word or else by the names of the experts.
    """
    known = {alias: f for f in families_of(format) for alias in (f.name, *f.model_types)}
    wanted = override or model_type
    if isinstance(wanted, str) and wanted in known:
        return known[wanted]
    if isinstance(wanted, str) and wanted in NOT_GATED:
        raise PlanError(
            f"{where}: {wanted!r} has {NOT_GATED[wanted]}: no gate, so there is nothing to fuse. Use the checkpoint as it is"
        )
    seen = f"model_type {wanted!r} in config.json is" if wanted else "config.json names no model_type, so this is"
    if override:
        seen = f"{override!r} is"
    near = get_close_matches(str(wanted), known, n=1) or [family.name for family in fitting(names, format)][:6]
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise PlanError(
        f"{where}: {seen} no known MoE family{hint}. convert --families lists the known ones. If it stores its experts as one "
        f"of these does, say so with --family; first tensors: {', '.join(sorted(names)[:3])}"
    )


def fitting(names: Iterable[str], format: str) -> list[Family]:  # noqa: A002
    """The families whose table knows some of these names as experts, for hints in messages; never to choose one."""
    found = []
    kinds = {_NUMBER.sub("0", name) for name in names}  # one name of each kind is enough
    likely = heapq.nsmallest(_KINDS, kinds, key=lambda name: ("expert" not in name, name))
    for family in families_of(format):
        keys = [layout.template(family.experts) for table in family.native for layout in table.values()]
        if any(key.parse(name) is not None for name in likely for key in keys):
            found.append(family)
    return found


def expert_counts(config: Mapping[str, Any]) -> frozenset[int]:
    """The numbers of experts that `config.json` states: several for models of several parts, none where it is silent."""
    return frozenset(_counts(config))


def _counts(config: Mapping[str, Any]) -> Iterator[int]:
    for key, value in config.items():
        if key in EXPERT_COUNTS and type(value) is int and value > 0:
            yield value
        elif isinstance(value, Mapping):
            yield from _counts(value)
