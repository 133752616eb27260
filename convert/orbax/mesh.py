"""Along which dimensions the devices of a mesh cut an array that they restore, and into how many parts. Pure.

In: a plan with a mesh, what an Orbax input says of its shardings. Out: a number for each stored dimension. It never cuts.

A device that restores its part of an array decodes every chunk that it touches. Where chunks end with the parts, each chunk is
read once. The axes of the mesh along each dimension of an array are those that a sharding file names, else those that the input
has recorded, else those of MaxText's rules, by the axes of the tables (`layouts.tables.maxtext`). Of an array that none knows,
chunks are as without a mesh.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress

from convert.errors import UsageError
from convert.orbax.metadata import sharding_of, stored_name
from convert.orbax.origin import Origin
from convert.planning.planner import Plan
from convert.planning.targets import OTHER, Target
from layouts.language.layout import ROLES
from layouts.tables.maxtext import SHARDED


def cuts_of(plan: Plan, origin: Origin) -> dict[str, tuple[int, ...]]:
    """For each array into how many parts its dimensions are cut; nothing without a mesh.

    Raises:
        UsageError: the mesh has an axis that no array is cut along, or a sharding file knows none of the arrays.
    """
    if not plan.mesh:
        return {}
    if plan.shardings and not any(_said(target, plan, origin) for target in plan.targets):
        raise UsageError(f"--sharding: it names no array of the output, such as {stored_name(plan.targets[0], origin)}")
    axes = {target.spec.name: axes_of(target, plan, origin) for target in plan.targets}
    used = {axis for dimensions in axes.values() for names in dimensions for axis in names}
    for axis, count in plan.mesh.items():
        if axis not in used and count > 1 and not plan.shardings:
            raise UsageError(f"--mesh: no array is cut along {axis!r}; they are along {', '.join(sorted(used)) or 'none'}")
    found = {}
    for target in plan.targets:
        counts = [math.prod(plan.mesh.get(axis, 1) for axis in names) for names in axes[target.spec.name]]
        fitting = [c if size % c == 0 else 1 for c, size in zip(counts, target.spec.shape, strict=False)]
        found[target.spec.name] = tuple(fitting)
    return found


def axes_of(target: Target, plan: Plan, origin: Origin) -> Sequence[Sequence[str]]:
    """The axes of the mesh along each dimension."""
    text = _said(target, plan, origin) or sharding_of(target, origin)
    recorded = _recorded(text, len(target.spec.shape)) if text else None
    if recorded is not None:
        return recorded
    return list(_by_rule(target)) if target.role in (*ROLES, OTHER) and not target.part else ()


def _said(target: Target, plan: Plan, origin: Origin) -> str | None:
    """What the sharding file says of an array; `wi` lies as `wi_0` does, where the devices have not fused them."""
    name = stored_name(target, origin)
    return plan.shardings.get(name) or plan.shardings.get(re.sub(r"\bwi(?=\b|_lora_)", "wi_0", name))


def _recorded(text: str, rank: int) -> list[list[str]] | None:
    """What Orbax says of a `NamedSharding`; None of another kind, or if it does not fit."""
    with suppress(ValueError, KeyError, TypeError):
        spec = json.loads(text)["partition_spec"]
        names = [[each] if isinstance(each, str) else list(each or ()) for each in spec]
        if len(names) <= rank and all(isinstance(axis, str) for dimension in names for axis in dimension):
            return [*names, *([[]] * (rank - len(names)))]
    return None


def _by_rule(target: Target) -> Iterator[list[str]]:
    """By MaxText's rules; an axis of the mesh cuts one dimension, the first in their order."""
    groups, taken = target.target.pattern.groups, dict[str, str]()
    there = {axis for group in groups for axis in group}
    for letter, names in SHARDED.items():
        for axis in names if letter in there else ():
            taken.setdefault(axis, letter)
    for group in groups:
        yield [axis for axis, letter in taken.items() if letter in group]
