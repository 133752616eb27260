"""How each projection of an output is made of those of the input, and with which scale. Pure.

In: descriptions of blocks, what was seen of their data. Out: recipes. They hold moves and zeros; the one arithmetic is to
multiply B by a power of two, where two scales become one, and that is looked at to lose no bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from convert.errors import PlanError
from layouts.adapters.forms import DOWN, GATE_UP, Form
from layouts.adapters.settings import Scale
from layouts.adapters.units import Block, Unit

How = Literal["as it is", "shared A", "block diagonal", "one alone", "halves", "rows"]
"""`halves`: the blocks of a block-diagonal B; `rows`: gate and up keep the whole A, each with its rows of B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the data of one block shows: whether A of gate and up are the same bits; the rank of each of two diagonal blocks."""

    shared: bool = False
    half: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One projection of the output. `shifts` are the powers of two for B: source -> one for each expert."""

    unit: str
    how: How
    sources: tuple[str, ...]
    rank: int
    scales: tuple[Scale, ...]
    shifts: Mapping[str, tuple[int, ...]]
    i: int
    o: int
    dtypes: Mapping[str, str]


def recipes(block: Block, form: Form, seen: Seen) -> tuple[Recipe, ...]:
    """The projections of one block in another form.

    Raises:
        PlanError: scales, ranks or element types that cannot become one without rounding.
    """
    found = []
    units = dict(block.units)
    pair: dict[str, Unit] = {name: units.pop(name) for name in ("gate", "up") if form.fused and name in units}
    if pair:
        found.append(_fused(block, form, pair, seen))
    elif not form.fused and (fused := units.pop(GATE_UP, None)):
        found += [_part(block, form, name, fused, seen) for name in ("gate", "up")]
    found += [_alone(block, form, name, unit, unit.rank, "as it is", unit.o, (name,)) for name, unit in units.items()]
    return tuple(sorted(found, key=lambda recipe: recipe.unit == DOWN))


def _fused(block: Block, form: Form, pair: Mapping[str, Unit], seen: Seen) -> Recipe:
    first, *rest = pair.values()
    if any(each.dtypes != first.dtypes for each in rest):
        raise PlanError(f"{block.path}.experts: gate and up have other element types ({first.dtypes}, {rest[0].dtypes})")
    if not rest:
        return _alone(block, form, GATE_UP, first, first.rank, "one alone", 2 * first.o, tuple(pair))
    how: How = "shared A" if seen.shared else "block diagonal"
    rank = first.rank if seen.shared else first.rank + rest[0].rank
    scales, shifts = _common(block, form, pair, rank)
    return Recipe(
        unit=GATE_UP,
        how=how,
        sources=tuple(pair),
        rank=max(scale.rank for scale in scales),
        scales=scales,
        shifts=shifts,
        i=first.i,
        o=2 * first.o,
        dtypes=first.dtypes,
    )


def _part(block: Block, form: Form, name: str, fused: Unit, seen: Seen) -> Recipe:
    half = seen.half if all(scale.at(seen.half) for scale in fused.scales if seen.half) else 0
    how: How = "halves" if half else "rows"
    return _alone(block, form, name, fused, half or fused.rank, how, fused.o // 2, (GATE_UP,))


def _alone(block: Block, form: Form, name: str, unit: Unit, rank: int, how: How, rows: int, sources: tuple[str, ...]) -> Recipe:
    if form.per_expert:  # each keeps its own rank and its own scale
        scales: tuple[Scale, ...] = tuple(scale.at(rank) or scale if how == "halves" else scale for scale in unit.scales)
        shifts: Mapping[str, tuple[int, ...]] = {sources[0]: (0,) * unit.experts}
    else:
        scales, shifts = _common(block, form, {sources[0]: unit}, rank)
    top = max(scale.rank for scale in scales)
    return Recipe(
        unit=name, how=how, sources=sources, rank=top, scales=scales, shifts=shifts, i=unit.i, o=rows, dtypes=unit.dtypes
    )


def _common(
    block: Block, form: Form, units: Mapping[str, Unit], rank: int
) -> tuple[tuple[Scale, ...], dict[str, tuple[int, ...]]]:
    """One scale for what becomes one tensor, by expert, and what each B has to be multiplied by.

    Raises:
        PlanError: there is none without rounding.
    """
    experts = next(iter(units.values())).experts
    groups: Sequence[Sequence[int]] = [[e] for e in range(experts)] if form.per_expert else [range(experts)]
    scales: list[Scale] = []
    shifts = {name: [0] * experts for name in units}
    for group in groups:
        first = next(iter(units.values())).scales[group[0]]
        for name, unit in units.items():
            for e in group:
                shifts[name][e] = _shift(block, name, e, unit.scales[e], first)
        one = first.at(rank) or first.at(2 * rank)
        if one is None:
            raise PlanError(
                f"{block.path}.experts: no alpha gives rank {rank} the scale {first.factor} of rank {first.rank} to the last "
                f"bit{' with use_rslora' if first.rslora else ''}; this cannot be done without rounding"
            )
        scales += [one] * len(group)
    return tuple(scales), {name: tuple(each) for name, each in shifts.items()}


def _shift(block: Block, name: str, expert: int, have: Scale, wanted: Scale) -> int:
    """The power of two between two scales."""
    if have.factor == wanted.factor:
        return 0
    ratio = have.factor / wanted.factor if wanted.factor else 0.0
    fraction, power = math.frexp(ratio)
    if fraction != 0.5 or wanted.factor * ratio != have.factor:
        raise PlanError(
            f"{block.path}.experts: {name} of expert {expert} has scale {have.factor}, which in one tensor has to become "
            f"{wanted.factor}: their ratio is no power of two, so that this would round. Keep them apart (--layout=per-expert)"
        )
    return power - 1
