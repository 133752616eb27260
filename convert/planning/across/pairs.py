"""The two places of every tensor of a model, in Hugging Face and in MaxText, from the tables of both. Pure.

In: a tree and `config.json`. Out: pairs of places. It never looks at a checkpoint.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convert.planning.across.stacks import Part, expert_count, layers_of, parts_of
from convert.planning.targets import OTHER
from layouts.errors import InputError, PlanError
from layouts.language.layout import Layout, Layouts, Placed
from layouts.language.parts import PARTS, companion, is_in_first, takes
from layouts.language.pattern import Pattern
from layouts.language.sections import Turns
from layouts.language.template import Template
from layouts.tables.families import Family
from layouts.tables.maxtext import LAYERS, ROOT, Row, Tree
from layouts.tables.maxtext_trees import TREES
from layouts.tables.natives import MAXTEXT_PART

_BIAS, GRID, _TREES_GRID = (
    next(number for number, part in enumerate(PARTS) if part.name == name) for name in ("bias", "scale_inv", MAXTEXT_PART)
)
"""The companions of experts that MaxText has: `weight_scale_inv` is `scale` there, one number for each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The two places of one kind of tensor. `counts` are the sizes of axes that no shape tells: names hold them, or heads.

    `real` are those of the source's axes that are stored with padding. Tensors of one `block`, say an encoder, are there
    together, or none is. A `twin` is in Hugging Face only, and holds what stands elsewhere as well. MaxText has other values by
    the rule `computed`. One side has as one what the other has as several, in `turns`; `parts` are the patterns of these, where
    they differ.
    """

    role: str
    part: str = ""
    block: str = ""
    twin: bool = False
    computed: str = ""
    turns: Turns | None = None
    parts: tuple[Pattern, ...] = ()
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
        PlanError: it has none.
    """
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
    for part in parts_of(tree, config):
        for pair in _pairs(part, sides):
            yield replace(pair, block=part.encoder) if part.encoder else pair


def there(pairs: Iterable[Pair], names: Collection[str]) -> list[Pair]:
    """Of the kinds of tensors that may be there, those of which the source has some, or should; `names` are its tensors.

    Raises:
        InputError: `config.json` says that there are more of a kind than there are tensors.
    """
    found = [(pair, _has_some(pair, names)) for pair in pairs]
    blocks = {pair.block for pair, has in found if has and not pair.twin}
    kept = [pair for pair, has in found if (has or not pair.optional) and (not pair.block or pair.block in blocks)]
    for pair in kept:
        if (count := _count(pair)) > len(names):
            such = f"{count:,} tensors such as {_first(pair)}"
            raise InputError(f"config.json says that there are {such}; {len(names):,} are there in all")
    return kept


def _has_some(pair: Pair, names: Collection[str]) -> bool:
    """Whether there is one of a kind, which is compared before it is counted out: a small file may say a billion."""
    return any(name in names for name in (names_of(pair) if _count(pair) <= len(names) else [_first(pair)]))


def _first(pair: Pair) -> str:
    return pair.source.key.render(dict.fromkeys(pair.source.key.slots, 0))


def _count(pair: Pair) -> int:
    return math.prod(pair.counts[slot] for slot in pair.source.key.slots)


def _pairs(part: Part, sides: Sides) -> Iterator[Pair]:
    heads = part.heads
    for row in part.tree.outside:
        pair = _pair(sides, _of_row(row, part.named(row.hf), ROOT), optional=row.optional, counts=heads)
        yield replace(pair, computed=row.computed)
    for layers in layers_of(part):
        stack, block = layers.stack, layers.block
        scan = sides.scan and stack.scanned is not None
        if scan and sides.to_maxtext and layers.total % stack.step:
            raise PlanError(
                f"{layers.total} layers ({stack.last}) do not make whole cycles of {stack.step}, and MaxText stacks only such; "
                f"--no-scan has a subtree for each layer"
            )
        single = f"{ROOT}{stack.scanned if scan else stack.single}."
        counts = {**heads, "l": layers.count, **({"p": stack.run} if stack.run > 1 else {})}
        axes = tuple(axis for axis in LAYERS if axis in counts) if scan else ()
        for row in (row for row in stack.rows if row.grid is None or part.block):
            place = single.replace(ROOT, part.tree.aside.format(row.aside), 1) if row.aside else single
            places = _of_row(row, layers.hf + row.hf, ROOT if row.twin else place)
            first = bool(row.aside) and not part.tree.aside_along
            pair = _pair(sides, places, scan=axes, first=first, optional=row.optional, counts=counts, block=block)
            parts = tuple(_scanned(Pattern(text), axes, sides.tree.scan_axis) for text in row.parts)
            yield replace(pair, twin=row.twin, computed=row.computed, turns=_turns(part, row), parts=parts)
        if stack.experts:
            at = layers.hf + part.tree.hf_experts, single + stack.experts
            experts = _experts(sides, at, axes, {**counts, "e": expert_count(part.config), "g": 2})
            scales = part.tree.scales and part.block
            yield from (replace(pair, block=block) for pair in experts if scales or pair.part != PARTS[GRID].name)


def _turns(part: Part, row: Row) -> Turns | None:
    if row.sections is None:
        return None
    sizes = part.heads
    for axis in (axis for axis in row.grid or "" if axis in sizes and part.block):
        if sizes[axis] % (block := part.block[0] if part.block else 1):
            word = dict(part.tree.heads)[axis]
            raise PlanError(
                f"config.json says {word} {sizes[axis]} and weight_block_size {block}: blocks of {row.hf} would be of two heads"
            )
        sizes[axis] //= block
    try:
        return row.sections.of(sizes)
    except KeyError as error:
        word = dict(part.tree.heads)[error.args[0]]
        raise PlanError(f"config.json does not say {word}, which says how the rows of {row.hf} lie") from None
    except ValueError as error:
        words = {axis: word for axis, word in part.tree.heads if f"'{axis}'" in str(error)}
        raise PlanError(f"config.json does not fit {row.hf}: {error}; the axes are {words}") from None


def _of_row(row: Row, hf: str, maxtext: str) -> tuple[Placed, Placed]:
    return (
        Placed(Template(hf), Pattern(row.hf_axes)),
        Placed(Template(maxtext + row.maxtext), Pattern((row.parts or (row.maxtext_axes,))[0])),
    )


def _pair(
    sides: Sides,
    places: tuple[Placed, Placed],
    *,
    counts: Mapping[str, int],
    optional: bool,
    scan: tuple[str, ...] = (),
    first: bool = False,
    role: str = OTHER,
    part: str = "",
    block: str = "",
) -> Pair:
    hf, maxtext = places
    counts = {**hf.key.choices, **maxtext.key.choices, **counts}
    if scan:
        maxtext = Placed(maxtext.key, _scanned(maxtext.pattern, scan, 0 if first else sides.tree.scan_axis))
    one, other = (hf, maxtext) if sides.to_maxtext else (maxtext, hf)
    real = {} if part and not sides.to_maxtext else sides.real.get(role, {})  # biases are not padded in MaxText
    return Pair(role=role, part=part, block=block, source=one, target=other, counts=counts, real=real, optional=optional)


def _scanned(pattern: Pattern, layers: tuple[str, ...], at: int) -> Pattern:
    """With the axes of the layers where they are stacked."""
    return Pattern(" ".join([*pattern.tokens[:at], *layers, *pattern.tokens[at:]]))


def _experts(sides: Sides, places: tuple[str, str], scan: tuple[str, ...], counts: Mapping[str, int]) -> Iterator[Pair]:
    """Weights, biases and scales of the experts of a stack."""
    hf, maxtext = places
    for role, (number, optional) in itertools.product(("wi", "wo"), ((0, False), (_BIAS, True), (GRID, True))):
        one, other = _hf_part(sides.hf[role], role, hf, number), _maxtext_part(sides.maxtext[role], role, maxtext, number)
        if one:
            part = PARTS[number].name
            yield _pair(sides, (one, other), scan=scan, counts=counts, optional=optional, role=role, part=part)


def _hf_part(layout: Layout, role: str, experts: str, number: int) -> Placed | None:
    """A weight, a bias or scales in a layout of Hugging Face."""
    if not takes(layout.key, PARTS[number].name):
        return None
    pattern = _plain(layout)
    if number == _BIAS:
        pattern = companion(pattern, role, "out", in_first=is_in_first(pattern, role))
    return Placed(layout.template(experts).bind("part", number), pattern)


def _maxtext_part(layout: Layout, role: str, experts: str, number: int) -> Placed:
    """The same in MaxText, whose biases stay apart whatever its weights are."""
    if number != _BIAS:
        return Placed(layout.template(experts).bind("part", number and _TREES_GRID), _plain(layout))
    key, pattern = ("wi_{g:0,1}_bias", "e n") if role == "wi" else ("wo_bias", "e k")
    return Placed(Template(f"{experts}.{key}"), Pattern(pattern))


def _plain(layout: Layout) -> Pattern:
    return Pattern(" ".join(layout.pattern.replace("...", "").split()))


def names_of(pair: Pair) -> list[str]:
    """The tensors of a kind, as its source names them."""
    key = pair.source.key
    points = itertools.product(*(range(pair.counts[slot]) for slot in key.slots))
    return [key.render(dict(zip(key.slots, point, strict=True))) for point in points]
