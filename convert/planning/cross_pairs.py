"""The two places of every tensor of a model, in Hugging Face and in MaxText, from the tables of both. Pure.

In: a tree and `config.json`. Out: pairs of places. It never looks at a checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convert.planning.targets import OTHER
from layouts.errors import PlanError
from layouts.language.layout import Layout, Layouts, Placed
from layouts.language.parts import PARTS, companion, is_in_first, takes
from layouts.language.pattern import Pattern
from layouts.language.template import Template
from layouts.tables.families import Family
from layouts.tables.maxtext import HEADS, LAYERS, ROOT, Row, Stack, Tree, numbered
from layouts.tables.maxtext_trees import COMPUTED, TREES

_BIAS = next(number for number, part in enumerate(PARTS) if part.name == "bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two places of one kind of tensor. `counts` are the sizes of axes that no shape tells: names hold them, or heads.

    `real` are those of the source's axes that are stored with padding.
    """

    role: str
    part: str = ""
    source: Placed
    target: Placed
    counts: Mapping[str, int]
    real: Mapping[str, int] = field(default_factory=dict)
    optional: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What a cross conversion is between: the family, and how its experts are stored on both sides.

    `tree` is MaxText's family, which knows along which axis layers are stacked, if they are (`scan`). `real` are for each role
    the sizes of the axes that what is read stores with padding.
    """

    family: Family
    tree: Family
    hf: Layouts
    maxtext: Layouts
    scan: bool
    to_maxtext: bool
    real: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def trees_of(family: Family, where: object) -> tuple[Tree, ...]:
    """The family's trees: the one to write first.

    Raises:
        PlanError: it has none, or its MaxText form would change values.
    """
    if family.name in COMPUTED:
        raise PlanError(f"{where}: {COMPUTED[family.name]}; only layouts are converted here")
    if family.by_names:
        raise PlanError(
            f"{where}: config.json names no model that is known; its experts are ({family.name}), but a MaxText tree holds a "
            f"whole model. If it is one of {', '.join(sorted(TREES))}, say so with --family"
        )
    if family.name not in TREES:
        raise PlanError(f"{where}: no MaxText tree is known for family {family.name}; known: {', '.join(sorted(TREES))}")
    return TREES[family.name]


def pairs_of(tree: Tree, sides: Sides, config: Mapping[str, Any]) -> Iterator[Pair]:
    """Every kind of tensor that a model with this `config.json` may have, with its two places.

    Raises:
        PlanError: `config.json` does not say how many layers or experts there are.
    """
    text, vision = config.get("text_config"), config.get("vision_config")
    if not tree.vision or not isinstance(text, Mapping):
        yield from _pairs(tree, sides, config, "")
        return
    yield from _pairs(tree, sides, text, tree.wrapped)
    if isinstance(vision, Mapping):  # MaxText can leave that part of the model out
        yield from (replace(pair, optional=True) for pair in _pairs(tree.vision, sides, vision, ""))


def _pairs(tree: Tree, sides: Sides, config: Mapping[str, Any], wrapped: str) -> Iterator[Pair]:
    heads = {axis: config[word] for axis, word in HEADS.items() if type(config.get(word)) is int}
    for row in tree.outside:
        yield _pair(sides, _of_row(row, wrapped, ROOT), optional=row.optional, counts=heads)
    for stack in tree.stacks:
        count = _layers(stack, config)
        if not count:
            continue
        scan = sides.scan and stack.scanned is not None
        single = f"{ROOT}{stack.scanned if scan else stack.single}."
        layer = wrapped + _layer(stack, config)
        counts = {**heads, "l": count, **({"p": stack.run} if stack.run > 1 else {})}
        axes = tuple(axis for axis in LAYERS if axis in counts) if scan else ()
        for row in stack.rows:
            yield _pair(sides, _of_row(row, layer, single), scan=axes, optional=row.optional, counts=counts)
        if stack.experts:
            places = layer + tree.hf_experts, single + stack.experts
            yield from _experts(sides, places, axes, {**counts, "e": _expert_count(config), "g": 2})


def _layers(stack: Stack, config: Mapping[str, Any]) -> int:
    """How many layers a stack has; none if it is one for models of another kind."""
    first, last = (config.get(word) if isinstance(word, str) else word for word in (stack.first, stack.last))
    if type(first) is not int or type(last) is not int:
        raise PlanError(f"config.json does not say {stack.first} and {stack.last}, which say how many layers there are")
    if stack.when:
        word, values = stack.when
        if type(config.get(word)) is not int:
            raise PlanError(f"config.json does not say {word}, which says what kind of layers there are")
        if config[word] not in values:
            return 0
    if stack.run > 1 and last % stack.step:
        raise PlanError(f"{last} layers ({stack.last}) do not make whole cycles of {stack.step}, and MaxText has only such")
    return max(0, -(-(last - first) // stack.step))


def _layer(stack: Stack, config: Mapping[str, Any]) -> str:
    first = config[stack.first] if isinstance(stack.first, str) else stack.first
    return f"{stack.hf}.{numbered(first, stack.step, stack.run)}."


def _expert_count(config: Mapping[str, Any]) -> int:
    words = ("num_experts", "num_local_experts", "n_routed_experts")
    stated = {int(config[word]) for word in words if type(config.get(word)) is int}
    if len(stated) != 1:
        raise PlanError(f"config.json should state the number of experts once; found {sorted(stated)}")
    return stated.pop()


def _of_row(row: Row, hf: str, maxtext: str) -> tuple[Placed, Placed]:
    return (
        Placed(Template(hf + row.hf), Pattern(row.hf_axes)),
        Placed(Template(maxtext + row.maxtext), Pattern(row.maxtext_axes)),
    )


def _pair(
    sides: Sides,
    places: tuple[Placed, Placed],
    *,
    counts: Mapping[str, int],
    optional: bool,
    scan: tuple[str, ...] = (),
    role: str = OTHER,
    part: str = "",
) -> Pair:
    hf, maxtext = places
    if scan:
        maxtext = Placed(maxtext.key, _scanned(maxtext.pattern, scan, sides.tree.scan_axis))
    one, other = (hf, maxtext) if sides.to_maxtext else (maxtext, hf)
    real = {} if part and not sides.to_maxtext else sides.real.get(role, {})  # biases are not padded in MaxText
    return Pair(role=role, part=part, source=one, target=other, counts=counts, real=real, optional=optional)


def _scanned(pattern: Pattern, layers: tuple[str, ...], at: int) -> Pattern:
    """With the axes of the layers where they are stacked."""
    return Pattern(" ".join([*pattern.tokens[:at], *layers, *pattern.tokens[at:]]))


def _experts(sides: Sides, places: tuple[str, str], scan: tuple[str, ...], counts: Mapping[str, int]) -> Iterator[Pair]:
    """Weights and biases of the experts of a stack."""
    hf, maxtext = places
    for role, (number, optional) in itertools.product(("wi", "wo"), ((0, False), (_BIAS, True))):
        one, other = _hf_part(sides.hf[role], role, hf, number), _maxtext_part(sides.maxtext[role], role, maxtext, number)
        if one:
            part = PARTS[number].name
            yield _pair(sides, (one, other), scan=scan, counts=counts, optional=optional, role=role, part=part)


def _hf_part(layout: Layout, role: str, experts: str, number: int) -> Placed | None:
    """A weight or a bias in a layout of Hugging Face."""
    if not takes(layout.key, PARTS[number].name):
        return None
    pattern = _plain(layout)
    if number:
        pattern = companion(pattern, role, "out", in_first=is_in_first(pattern, role))
    return Placed(layout.template(experts).bind("part", number), pattern)


def _maxtext_part(layout: Layout, role: str, experts: str, number: int) -> Placed:
    """The same in MaxText, whose biases stay apart whatever its weights are."""
    if not number:
        return Placed(layout.template(experts).bind("part", number), _plain(layout))
    key, pattern = ("wi_{g:0,1}_bias", "e n") if role == "wi" else ("wo_bias", "e k")
    return Placed(Template(f"{experts}.{key}"), Pattern(pattern))


def _plain(layout: Layout) -> Pattern:
    return Pattern(" ".join(layout.pattern.replace("...", "").split()))


def names_of(pair: Pair) -> list[str]:
    """The tensors of a kind, as its source names them."""
    key = pair.source.key
    points = itertools.product(*(range(pair.counts[slot]) for slot in key.slots))
    return [key.render(dict(zip(key.slots, point, strict=True))) for point in points]
