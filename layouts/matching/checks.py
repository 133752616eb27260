"""What must hold before there is a plan: experts complete and alike, and blocks whose parts fit together.

In: groups of tensors. Out: nothing, or an error. It never changes a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from layouts.errors import InputError, PlanError
from layouts.language.layout import ROLES
from layouts.language.parts import AXES, CHUNKS, Part
from layouts.language.slots import Index
from layouts.language.template import Template
from layouts.matching.lookup import expert_counts, idle_experts
from layouts.matching.packing import INTEGERS, WEIGHTS, hidden_sizes
from layouts.reader import Reader
from layouts.tensors import TensorSpec

if TYPE_CHECKING:
    from layouts.matching.group import Group

_WIDTH = "moe_intermediate_size"
_WIDTHS = (_WIDTH, "intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size")
"""The words for the sizes of mlps, those of experts and others."""
_WHOLE = frozenset("kgnd")
"""Axes along which blocks are copied as wholes. Along the others (experts, stacked layers, shards) it goes step by step."""
_MOST = 1 << 24
"""Such steps that a tensor may have: the largest models have some 25,000 experts in all their layers."""


def check_equal(reader: Reader, specs: Sequence[TensorSpec], part: str = "") -> None:
    """All tensors of a group have one shape and one element type; only a companion may have no elements (GPTQ's `g_idx`).

    Raises:
        InputError: they have no elements.
        PlanError: they are not alike.
    """
    first = specs[0]
    if not first.nbytes and part in WEIGHTS:
        raise InputError(f"{reader.path}: {first.name} (in {reader.where(first.name)}) has no elements: {first.shape}")
    for spec in specs:
        if (spec.shape, spec.dtype) != (first.shape, first.dtype):
            raise PlanError(
                f"{reader.path}: experts of one layer must be alike, but {first.name} is {first.dtype} {first.shape} and "
                f"{spec.name} (in {reader.where(spec.name)}) is {spec.dtype} {spec.shape}; no stacked tensor can hold both"
            )


def check_type(reader: Reader, spec: TensorSpec, part: Part) -> None:
    """See that what packs values by its name has a type in which it is packed as we know it.

    Raises:
        PlanError: it has another.
    """
    if part.types and spec.dtype not in part.types:
        raise PlanError(
            f"{reader.path}: {spec.name} (in {reader.where(spec.name)}) is {spec.dtype}, but {part.word} of GPTQ and AWQ is "
            f"{part.types[0]}: others store under this name what is packed otherwise (AWQ's GEMVFast, FP-Quant). Take the "
            f"checkpoint it was made from"
        )


def ungridded(weight: Group, sizes: Mapping[str, int]) -> str:
    """Why scales of these sizes are no grid of equal blocks, or of rows, over a weight of one value in each element."""
    if weight.part or weight.dtype in INTEGERS:
        return ""
    inner, outer = AXES[weight.role]
    own = {axis: math.prod(sizes.get(cut, 1) for cut in (CHUNKS if axis == "n" else axis)) for axis in (inner, outer)}
    for axis, count in own.items():
        whole, rows = weight.total(axis), axis == outer and inner not in sizes
        if not 0 < count <= whole or (count < whole if rows else -(-whole // -(-whole // count)) != count):
            return f"{count} scales for {whole} values ({axis}): blocks of one size are another number"
    if own[outer] == 1 < weight.total(outer) and own[inner] == weight.total(inner) > 1:
        return f"a scale for each of {own[inner]} inputs ({inner}), and one for all outputs"
    return ""


def check_grid(reader: Reader, role: str, key: Template, index: Index, names: Sequence[str], experts: int) -> dict[str, int]:
    """Experts 0..E-1 (E is `experts`), each with every projection; the sizes of the axes that the names hold.

    Raises:
        InputError: a tensor is missing.
    """
    grid = [slot for slot in key.slots if slot in ROLES[role]]
    counts = {"e": experts, "g": 2}
    total = math.prod(counts[axis] for axis in grid)
    if total != len(names):  # each name is another point of the grid, so that counting is enough
        have = set(names)
        points = _points([counts[axis] for axis in grid])
        wanted = (key.render({**index, **dict(zip(grid, point, strict=True))}) for point in points)
        raise InputError(
            f"{reader.path}: {next(name for name in wanted if name not in have)} is missing, and so are {total - len(have)} of "
            f"the {total} tensors of {counts['e']} experts; the others are in {_shards(reader, names)}"
        )
    return {axis: counts[axis] for axis in grid}


def _points(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All points of a grid in order, one at a time: `itertools.product` would first write down every axis."""
    if not counts:
        yield ()
        return
    yield from ((first, *rest) for first in range(counts[0]) for rest in _points(counts[1:]))


def _shards(reader: Reader, names: Iterable[str]) -> str:
    """A few of the places where these tensors lie."""
    places = sorted({reader.where(name) for name in names})
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def check_blocks(reader: Reader, groups: Sequence[Group], *, whole: bool = True) -> None:
    """Every MoE block has all roles if it is whole, they agree on E, K and N, and companions are not larger than their weights.

    Raises:
        InputError: a weight is missing, or a size is none that a model has.
        PlanError: sizes do not fit together.
    """
    found: dict[frozenset[tuple[str, int | str]], dict[str, list[Group]]] = {}
    for group in groups:
        _check_steps(reader, group)
        roles = found.setdefault(frozenset(group.index.items()), {})
        roles.setdefault(group.role, []).append(group)
    for roles in found.values():
        weights = {role: [g for g in roles.get(role, ()) if g.part in WEIGHTS] for role in ROLES}
        some = next(iter(roles.values()))[0]
        if lacking := [role for role, held in weights.items() if not held and (whole or role in roles)]:
            raise InputError(f"{reader.path}: {some.names[0]} has no {' and no '.join(lacking)} beside it")
        for role, held in roles.items():
            _check_companions(reader, role, weights[role][0], held)
        if not all(weights.values()):
            continue
        wi, wo = weights["wi"][0], weights["wo"][0]
        packed = wi.packed or wo.packed
        if not _match(reader, wi, wo) or (not packed and any(wi.total(axis) != wo.total(axis) for axis in "kn")):
            sizes = [{axis: group.total(axis) for axis in "ekn"} for group in (wi, wo)]
            raise PlanError(f"{reader.path}: {wi.names[0]} and {wo.names[0]} do not fit together: {sizes[0]} and {sizes[1]}")
    _check_alike(reader, list(found.values()))


def _match(reader: Reader, wi: Group, wo: Group) -> bool:
    """Whether they are of the same experts; `wi` may have those that are the identity besides (LongCat)."""
    idle, experts = idle_experts(reader.config), wo.total("e")
    return wi.total("e") - experts in (0, idle) and not (idle and experts - idle in expert_counts(reader.config))


def _check_steps(reader: Reader, group: Group) -> None:
    """What is taken one by one is no more than a model has: a few bytes of a header say 2**40 experts."""
    steps = {axis: size for axis, size in group.sizes.items() if axis not in _WHOLE}
    if math.prod(steps.values()) > _MOST:
        name = group.names[0]
        raise InputError(
            f"{reader.path}: {name} (in {reader.where(name)}) would be {math.prod(steps.values()):,} experts, those of stacked "
            f"layers and shards counted ({steps}); {_MOST:,} are the most that are read"
        )


def _check_alike(reader: Reader, blocks: Sequence[Mapping[str, Sequence[Group]]]) -> None:
    """Weights of one kind have the same companions in all layers: a scale or a bias that one layer lacks was lost."""
    seen: dict[tuple[Any, ...], tuple[Group, frozenset[str]]] = {}
    for role, held in (item for block in blocks for item in block.items()):
        weight = next(group for group in held if group.part in WEIGHTS)
        parts = frozenset(group.part for group in held)
        kind = (role, weight.index.get("path"), weight.part, weight.dtype, weight.placed.key.slots)
        first, wanted = seen.setdefault(kind, (weight, parts))
        if parts != wanted:
            lost = sorted(wanted ^ parts)[0]
            has, lacks = (first, weight) if lost in wanted else (weight, first)
            raise InputError(
                f"{reader.path}: {has.names[0]} has a {lost} beside it and {lacks.names[0]} (in "
                f"{reader.where(lacks.names[0])}) has none"
            )


def _check_companions(reader: Reader, role: str, weight: Group, held: Iterable[Group]) -> None:
    """Companions are for as many experts as the weight, and a bias for as many outputs; scales have their own grid."""
    for group in held:
        exact = ("e", AXES[role][1]) if group.part == "bias" else ("e",)
        for axis in (axis for axis in exact if axis in group.sizes):  # one number for all experts is for none of them
            if group.total(axis) != weight.total(axis):
                raise PlanError(
                    f"{reader.path}: {group.names[0]} is for {group.total(axis)} ({axis}), but {weight.names[0]} has "
                    f"{weight.total(axis)}; they do not belong together"
                )


def check_turned(reader: Reader, groups: Sequence[Group]) -> None:
    """See that what the table of a family says is not contradicted by both sizes of its experts (Paddle exports any model so).

    Raises:
        PlanError: what would be the embed dim has the size of an mlp, and what would be the mlp dim has that of the model.
    """
    wide, narrow = set(hidden_sizes(reader.config)), set(hidden_sizes(reader.config, _WIDTHS))
    for group in _plain(groups):
        k, n = group.total("k"), group.total("n")
        if n in wide and k in narrow - wide:
            raise _turned(reader, group, "hidden size", n)


def check_said(reader: Reader, groups: Sequence[Group]) -> tuple[str, ...]:
    """See that a layout that may be the other way round is not, as far as `config.json` tells; what it does not tell.

    It may be where the user or names alone have told it, or where the family is published both ways.

    Raises:
        PlanError: what would be the embed dim has another size than the model, and what would be the mlp dim has that.
    """
    wide, narrow = set(hidden_sizes(reader.config)), set(hidden_sizes(reader.config, (_WIDTH,)))
    unsure: dict[tuple[int, int], str] = {}
    for group in _plain(groups):
        k, n = group.total("k"), group.total("n")
        if (n in wide and k not in wide) or (not wide and k in narrow and n not in narrow):
            raise _turned(reader, group, *(("hidden size", n) if wide else (_WIDTH, k)))
        if k == n or not (k in wide or (not wide and n in narrow)):
            unsure.setdefault((k, n), group.names[0])
    return tuple(
        f"{name}: that it takes {k} inputs and gives {n} is what you say; config.json does not tell it from the other way round"
        for (k, n), name in unsure.items()
    )


def _plain(groups: Iterable[Group]) -> Iterator[Group]:
    """The weights of gate and up that hold one value in an element."""
    return (group for group in groups if group.role == "wi" and not group.part and not group.packed)


def _turned(reader: Reader, group: Group, word: str, size: int) -> PlanError:
    return PlanError(
        f"{reader.path}: in this layout {group.names[0]} takes {group.total('k')} inputs and gives {group.total('n')}, but "
        f"config.json says that the model's {word} is {size}: it is stored the other way round. Name its layout with "
        f"--source-layout, or its model with --family"
    )
