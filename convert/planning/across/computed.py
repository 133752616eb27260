"""Tensors whose values are others in MaxText: which, by what factor, and the user's word that it may be so. Pure.

In: an open checkpoint, a tree, choices. Out: factors for the tensors that are read. It never reads data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from convert.errors import UsageError
from convert.planning.across.pairs import Pair, Sides, names_of, pairs_of, there
from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.computing import TYPES
from layouts.errors import PlanError
from layouts.reader import Reader
from layouts.tables.maxtext import RULES, Tree
from layouts.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """The factor of each tensor that is read, and what plan and manifest say of them."""

    rule: str | None = None
    kinds: tuple[str, ...] = ()
    factors: Mapping[str, float] = field(default_factory=dict)


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
    factors = plan.factors if plan.format == "orbax" else {}
    return tuple(target for target in plan.targets if factors and target.first_source in factors)


def kept_bytes(plan: Plan) -> int:
    """Bytes of these originals."""
    return sum(target.spec.nbytes for target in originals_of(plan))


def computed_back(plan: Plan, forward: Plan, computed: Sequence[Target]) -> Plan:
    """`plan`, which turns `forward` round, with the values computed back that `forward` computes: of these targets of it."""
    factors = {target.spec.name: 1 / forward.factors[target.first_source] for target in computed}
    kinds = Counter(target.target.key.text for target in computed)
    word = str(forward.computed).partition(":")[0]
    return replace(
        plan, computed=_rule(word, factors), computed_kinds=tuple(f"{key}  x{n}" for key, n in kinds.items()), factors=factors
    )


def computed_in(reader: Reader, tree: Tree, sides: Sides, config: Mapping[str, Any], word: str | None) -> Computed:
    """What of a checkpoint is computed on the way to the other format.

    Raises:
        PlanError: something is, and the user has not said so; or it is of a type that is not computed.
        UsageError: nothing is, and the user has said so.
    """
    pairs = [pair for pair in there(pairs_of(tree, sides, config), reader.tensors) if pair.computed]
    rules = sorted({pair.computed for pair in pairs})
    for name in rules:
        if word != name:
            raise PlanError(
                f"{reader.path}: MaxText has {RULES[name].said} in this model, which would change values; "
                f"with --compute={name} a conversion does so; trees keep the originals for the way back"
            )
    if word and not rules:
        raise UsageError(f"{reader.path}: --compute={word}, and nothing of this model is computed on the way; do without it")
    factors = {name: _factor(reader, pair, name, sides) for pair in pairs for name in names_of(pair) if name in reader.tensors}
    if not factors:
        return Computed()
    return Computed(
        rule=_rule(str(word), factors),
        kinds=tuple(f"{pair.source.key.text}  x{len(names_of(pair))}" for pair in pairs),
        factors=factors,
    )


def _rule(word: str, factors: Mapping[str, float]) -> str:
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
