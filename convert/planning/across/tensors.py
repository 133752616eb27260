"""Plan a conversion between Hugging Face and MaxText: tensors by the table of trees, experts by their layouts.

In: names and shapes, a tree. Out: targets. It never reads data.

It is the same operation as any other: two layouts of one tensor, and block copies between them. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from convert.planning.across.pairs import GRID, Pair, Sides, names_of, pairs_of, there
from convert.planning.across.stacks import mtp_places, parts_of
from convert.planning.targets import OTHER, Target, Way
from layouts.errors import InputError, PlanError
from layouts.language.cuts import CUT, cut
from layouts.language.layout import Placed
from layouts.language.parts import PARTS
from layouts.language.sections import ROWS, TENSOR
from layouts.quantisation import block_of
from layouts.reader import Reader
from layouts.tables.maxtext import LORA_APART, LORA_DOWN, LORA_FUSED, ONES, RULES, Tree
from layouts.tables.natives import MAXTEXT_PART
from layouts.tensors import TensorSpec

_LORA = ". It is LoRA, which Hugging Face has in its own directory with alpha, and a tree holds no alpha: convert it without"


def cross_targets(
    reader: Reader, tree: Tree, sides: Sides, config: Mapping[str, Any], left_out: Collection[str] = ()
) -> list[Target]:
    """All tensors of the output; those `left_out` of the input are not asked for.

    Raises:
        InputError: a tensor is missing, or tensors that are stacked differ.
        PlanError: a tensor of the input has no place on the other side, or MaxText has no model of this kind.
    """
    have = {name for name in reader.tensors if name not in left_out}
    pairs = [(pair, names_of(pair)) for pair in there(pairs_of(tree, sides, config), have)]
    missing = [(names, sum(name in have for name in names)) for _, names in pairs]
    missing = [(names, count) for names, count in missing if count < len(names)]
    left = have.difference(*(names for _, names in pairs))
    if missing or left:
        _check_kind(reader, tree, config)
    if left:  # before what is missing: of another model, both are
        first = next(name for name in reader.tensors if name in left)
        lora = any(key.parse(name) for name in left for key in (LORA_APART, LORA_FUSED, LORA_DOWN))
        hint = _LORA if lora else _hint(sides, tree, config, left)
        raise PlanError(
            f"{reader.path}: {len(left)} tensors have no place on the other side, first {first} (in "
            f"{reader.where(first)}); nothing is dropped, so there is no plan{hint}"
        )
    for names, count in missing:
        lost = next(name for name in names if name not in have)
        raise InputError(f"{reader.path}: {lost} is missing; {count} of {len(names)} such tensors are there")
    if tree.scales:
        _check_scales(reader, have, [pair for pair, _ in pairs], config)
    moved = (item for item in pairs if not (item[0].twin and sides.to_maxtext))
    targets = [target for pair, names in moved for target in _targets(reader, pair, names)]
    return targets if sides.to_maxtext else _without_ones(reader, [pair for pair, _ in pairs], targets)


def _without_ones(reader: Reader, pairs: Sequence[Pair], targets: list[Target]) -> list[Target]:
    """What Hugging Face has, without what only MaxText has: that has to be as long as what it is named after.

    Raises:
        InputError: it is not.
    """
    if not (keys := {pair.target.key for pair in pairs if pair.computed and RULES[pair.computed].ones}):
        return targets
    specs = {target.spec.name: target.spec for target in targets}
    for target in (target for target in targets if target.target.key in keys):
        name, have = target.first_source, target.spec.shape
        if have != (wanted := specs[target.spec.name.removesuffix(ONES)].shape[-1:]):
            raise InputError(
                f"{reader.path}: {name} (in {reader.where(name)}) is {have} for a layer, and {wanted} fits what is beside it"
            )
    return [target for target in targets if target.target.key not in keys]


def twins_of(reader: Reader, tree: Tree, sides: Sides, config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Tensors of Hugging Face that MaxText does not have, each with the one that has to hold the same.

    Raises:
        PlanError: there is no other one.
    """
    pairs = there(pairs_of(tree, sides, config), reader.tensors) if sides.to_maxtext else []
    places = {pair.target.key.text: names_of(pair)[0] for pair in pairs if not pair.twin}
    for pair in (pair for pair in pairs if pair.twin and pair.target.key.text not in places):
        raise PlanError(f"{reader.path}: {names_of(pair)[0]} has no place in MaxText, which has no {pair.target.key.text} here")
    return tuple((names_of(pair)[0], places[pair.target.key.text]) for pair in pairs if pair.twin)


_SCALES = tuple(f".{part.word}" for part in PARTS if part.name not in ("", "bias"))
"""How the names of tensors end that stand beside quantised weights."""
_UNCOMPUTED = ".scales"
"""Those of MLX, GPTQ and AWQ, of which no weights are computed here."""


def _hint(sides: Sides, tree: Tree, config: Mapping[str, Any], left: Collection[str]) -> str:
    places = mtp_places(tree, config) if sides.to_maxtext else ()
    if places and all(name.startswith(places) for name in left):
        return "; --drop-mtp leaves out blocks that predict further tokens, as these are"
    if sides.to_maxtext and any(name.endswith(_SCALES) and not name.endswith(_UNCOMPUTED) for name in left):
        return "; this tree has no scales of their kind: of what is quantised, --dequantize=bf16 makes weights"
    return ""


def _check_kind(reader: Reader, tree: Tree, config: Mapping[str, Any]) -> None:
    """Say why tensors do not fit the tree, where `config.json` tells that it is of another kind of model."""
    words = [(each.config, *only) for each in parts_of(tree, config) for only in each.tree.only]
    for said, word, values, kind in words:
        if (stated := said.get(word)) is not None and stated not in values:
            raise PlanError(
                f"{reader.path}: {word} is {str(stated)[:80]} in config.json, and MaxText has no such model: its own has {kind}"
            )


def _check_scales(reader: Reader, have: Collection[str], pairs: Sequence[Pair], config: Mapping[str, Any]) -> None:
    """See that what is quantised has a scale for each block of it, and that a block stays in one piece.

    Raises:
        InputError: scales are missing.
        PlanError: blocks are not whole, or experts are cut or padded, and nobody says how a model would take their scales.
    """
    is_hf, block = reader.format == "hf", block_of(config)
    for name in (name for name in reader.tensors if name in have):
        spec = reader.tensors[name]
        grid = reader.tensors.get(scale := f"{name}_{'scale_inv' if is_hf else MAXTEXT_PART}")
        if spec.dtype == "F8_E4M3" and grid is None:
            raise InputError(f"{reader.path}: {name} is {spec.dtype}, and its scales ({scale}) are missing")
        if grid and block and not (block[0] == block[1] and _is_grid(spec.shape, grid.shape, block[0], matrix=is_hf)):
            raise PlanError(
                f"{reader.path}: {scale} is {grid.shape} and {name} {spec.shape}: no grid of whole square blocks of {block}, "
                f"as weight_block_size says, and MaxText has only such"
            )
    for pair in (pair for pair in pairs if pair.part == PARTS[GRID].name):
        sides = (side.pattern for side in (pair.source, pair.target))
        if text := next((side.text for side in sides if side.padding or set(CUT) & set(side.axes)), None):
            way = "take --layout=concat, or --dequantize=bf16" if is_hf else "convert --split the tree before"
            raise PlanError(
                f"{reader.path}: experts have scales by block ({names_of(pair)[0]}), and '{text}' cuts or pads them; {way}"
            )


def _is_grid(weight: Sequence[int], grid: Sequence[int], block: int, *, matrix: bool) -> bool:
    """Whether there is a number for each block of a weight, along the last two dimensions where those are the `matrix`."""
    if len(weight) != len(grid):
        return False
    whole = [count * block == size for count, size in zip(grid, weight, strict=True)]
    return all(whole[-2:]) if matrix else all(ok or n == m for ok, n, m in zip(whole, grid, weight, strict=True))


def _targets(reader: Reader, pair: Pair, names: Sequence[str]) -> Iterator[Target]:
    first = reader.tensors[names[0]]
    try:
        ways = _ways(pair, first)
    except (KeyError, ValueError) as error:
        raise PlanError(f"{reader.path}: {first.name} (in {reader.where(first.name)}): {error}") from None
    for name in names:
        spec, like = reader.tensors[name], _shape_like(pair, name, ways[0], first.shape)
        if (spec.shape, spec.dtype) != (like, first.dtype):
            wanted = "" if like == first.shape else f", and config.json wants {like}"
            raise InputError(
                f"{reader.path}: {name} is {spec.dtype} {spec.shape}, but {first.name} {first.dtype} {first.shape}{wanted}"
            )
    slots = pair.target.key.slots
    for point in itertools.product(*(range(pair.counts[slot]) for slot in slots)):
        index = dict(zip(slots, point, strict=True))
        way = ways[index.get(TENSOR, 0)]
        spec = TensorSpec(name=pair.target.key.render(index), dtype=first.dtype, shape=way.target.pattern.shape(way.sizes))
        yield Target(spec=spec, index=index, way=way)


def _shape_like(pair: Pair, name: str, way: Way, first: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor should have if the first of its kind has this one."""
    tensor = int((pair.source.key.parse(name) or {}).get(TENSOR, 0)) if pair.turns else 0
    pattern, sizes = way.stored[tensor]
    return pattern.shape(sizes) if tensor else first


def _ways(pair: Pair, first: TensorSpec) -> list[Way]:
    """How targets come about: in one way, but those that are sections of one tensor in one each.

    Raises:
        KeyError, ValueError: the shape does not fit the table.
    """
    stored = {**pair.counts, **pair.source.pattern.sizes(first.shape, {**pair.counts, **pair.real})}
    sizes, targets = [stored if pair.role == OTHER else cut(stored, pair.target.pattern)], [pair.target]
    if turns := pair.turns:
        joins = TENSOR in pair.source.key.slots
        if stored[ROWS] != (wanted := turns.size(0) if joins else turns.total):
            raise ValueError(f"it has {stored[ROWS]} rows ({ROWS}), and {wanted} by config.json ({turns.text})")
        each = [turns.total] if joins else map(turns.size, range(len(turns.parts)))
        sizes = [{**stored, ROWS: size} for size in each]
        targets = [pair.target] if joins or not pair.parts else [Placed(pair.target.key, part) for part in pair.parts]
    return [
        Way(
            role=pair.role, part=pair.part, dims="out" if pair.part == "bias" else "out in",
            sizes=own, source_sizes=stored, source=pair.source, target=target, turns=pair.turns, parts=pair.parts,
        ) for own, target in zip(sizes, itertools.cycle(targets))
    ]  # fmt: skip
