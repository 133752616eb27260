"""Tensors whose values are others in MaxText: which, how they are computed, and the user's word that it may be so. Pure.

In: an open checkpoint, a tree, choices. Out: what is computed of the tensors that are read. It never reads data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from convert.errors import UsageError
from convert.planning.across.pairs import Pair, Sides, names_of, pairs_of, there
from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.computing import NOTHING, TYPES, Values
from layouts.errors import PlanError
from layouts.reader import Reader
from layouts.tables.maxtext import ONES, RULES, Tree
from layouts.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What is computed of tensors that are read, and what plan and manifest say of them; whether it is `exact`."""

    rule: str | None = None
    kinds: tuple[str, ...] = ()
    values: Values = NOTHING
    exact: bool = False


def factor_of(pair: Pair, spec: TensorSpec, *, to_maxtext: bool) -> float:
    """By what a tensor of this pair, which is in the shape of its source, is multiplied, before that is rounded to float32.

    Raises:
        ValueError: the shape is not that of the pair.
    """
    sizes = {**pair.counts, **pair.source.pattern.sizes(spec.shape, pair.counts)}
    rule = RULES[pair.computed]
    return rule.factor(sizes[rule.axis], to_maxtext=to_maxtext)


def originals_of(plan: Plan) -> tuple[Target, ...]:
    """Tensors of a tree whose values are computed on the way there: each is kept once more, with the values as they were."""
    factors = plan.values.factors if plan.format == "orbax" else {}
    return tuple(target for target in plan.targets if factors and target.first_source in factors)


def kept_bytes(plan: Plan) -> int:
    """Bytes of these originals."""
    return sum(target.spec.nbytes for target in originals_of(plan))


def computed_back(plan: Plan, forward: Plan, computed: Sequence[Target]) -> Plan:
    """`plan`, which turns `forward` round, with the values computed back that `forward` computes: of these targets of it."""
    factors = {target.spec.name: 1 / forward.values.factors[target.first_source] for target in computed}
    kinds = Counter(target.target.key.text for target in computed)
    word, values = str(forward.computed).partition(":")[0], Values(factors=factors)
    return replace(
        plan, computed=_times(word, factors), computed_kinds=tuple(f"{key}  x{n}" for key, n in kinds.items()), values=values
    )


def computed_in(reader: Reader, tree: Tree, sides: Sides, config: Mapping[str, Any], word: str | None) -> Computed:
    """What of a checkpoint is computed on the way to the other format.

    Raises:
        PlanError: something is, and the user has not said so; or it is of a type that is not computed.
        UsageError: nothing is, and the user has said so.
    """
    pairs = [pair for pair in there(pairs_of(tree, sides, config), reader.tensors) if pair.computed]
    rules = [RULES[name] for name in sorted({pair.computed for pair in pairs})]
    said = "; ".join(rule.said for rule in rules)
    exact = not any(rule.axis for rule in rules)
    if wanted := next((rule.word for rule in rules if rule.word != word), None):
        would = "no checkpoint of Hugging Face has so" if exact else "would change values"
        back = "the way back makes them what they were, bit for bit" if exact else "trees keep the originals for the way back"
        raise PlanError(
            f"{reader.path}: MaxText has {said} in this model, which {would}; with --compute={wanted} a conversion does so; "
            f"{back}"
        )
    if word and not rules:
        raise UsageError(f"{reader.path}: --compute={word}, and nothing of this model is computed on the way; do without it")
    values = _values(reader, pairs, sides)
    if not values:
        return Computed()
    return Computed(
        rule=f"{word}: {said}" if exact else _times(str(word), values.factors),
        kinds=tuple(f"{pair.source.key.text}  x{len(names_of(pair))}" for pair in pairs),
        values=values,
        exact=exact,
    )


def _values(reader: Reader, pairs: Iterable[Pair], sides: Sides) -> Values:
    factors, types, ones = dict[str, float](), dict[str, str](), dict[str, TensorSpec]()
    for rule, pair, name in [(RULES[each.computed], each, name) for each in pairs for name in names_of(each)]:
        if rule.ones:
            ones |= {spec.name: spec for spec in _ones(reader, name, to_maxtext=sides.to_maxtext)}
        elif name in reader.tensors and rule.types:
            types[name] = _type(reader, pair, name, to_maxtext=sides.to_maxtext)
        elif name in reader.tensors:
            factors[name] = _factor(reader, pair, name, sides)
    return Values(factors=factors, types=types, ones=ones)


def _times(word: str, factors: Mapping[str, float]) -> str:
    times = ", ".join(dict.fromkeys(f"{factor:.9g}" for factor in factors.values()))
    return f"{word}: times {times} in float32, rounded once to nearest even"


def _factor(reader: Reader, pair: Pair, name: str, sides: Sides) -> float:
    spec = reader.tensors[name]
    if spec.dtype not in TYPES:
        raise PlanError(
            f"{reader.path}: {name} (in {reader.where(name)}) is {spec.dtype}; {pair.computed} is computed of "
            f"{', '.join(TYPES)}"
        )
    try:
        return factor_of(pair, spec, to_maxtext=sides.to_maxtext)
    except ValueError as error:
        raise PlanError(f"{reader.path}: {name} (in {reader.where(name)}): {error}") from None


def _type(reader: Reader, pair: Pair, name: str, *, to_maxtext: bool) -> str:
    """Of what type the values are on the other side."""
    types = RULES[pair.computed].types or ("", "")
    here, there = types if to_maxtext else types[::-1]
    if (found := reader.tensors[name].dtype) != here:
        raise PlanError(f"{reader.path}: {name} (in {reader.where(name)}) is {found}; {pair.computed} is computed of {here}")
    return there


def _ones(reader: Reader, name: str, *, to_maxtext: bool) -> list[TensorSpec]:
    """What is to be ones in the other format, if there is that after which it is named; or what are ones in this one."""
    like = reader.tensors.get(name.removesuffix(ONES) if to_maxtext else name)
    if to_maxtext and name in reader.tensors:
        raise PlanError(f"{reader.path}: {name} (in {reader.where(name)}) has no place on the other side, which has ones there")
    return [replace(like, name=name, shape=like.shape[-1:] if to_maxtext else like.shape)] if like else []
