"""The MoE layers of a Hugging Face checkpoint and of a MaxText tree, side by side, for the probes.

In: two open checkpoints. Out: pairs of MoE layers. It never compares them.

A layer of the one is a place in a stack of the other, by the rows of both tables; what is read there is read as everywhere in
this package.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from convert.errors import PlanError
from convert.planning.cross_pairs import Pair, Sides, names_of, pairs_of, trees_of
from convert.planning.cross_plan import config_of, fused_in, stacked_along, stored_in, tree_in
from convert.verifier.bits.counts import Counts, expert_words, layer_words, skipped_words
from convert.verifier.bits.logical import Block, Scope, blocks
from layouts.language.layout import ROLES
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description, describe
from layouts.matching.group import Group
from layouts.matching.lookup import find_family
from layouts.matching.origin import origin_of
from layouts.reader import Reader
from layouts.tables.maxtext import LAYERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """Two checkpoints, and the kinds of tensors that both have, from MaxText's side to that of Hugging Face."""

    hf: Reader
    tree: Reader
    config: Mapping[str, Any]
    sides: Sides
    pairs: tuple[Pair, ...]
    described: Description


def formats_of(
    hf: Reader, tree: Reader, scan_axis: int | None = None, source_layout: str | None = None, family: str | None = None
) -> Formats:
    """What the tables say of both, the record of the tree, and of what these leave open `scan_axis` and `source_layout`.

    Raises:
        PlanError: no MaxText tree is known for the family, or the experts of the Hugging Face side are fused.
    """
    if hf.record:
        raise PlanError(f"{hf.path}: its experts are fused; compare a split checkpoint with the MaxText tree")
    config, origin = config_of(hf), origin_of(tree, family)
    named = family or origin.family
    found = find_family(config.get("model_type"), list(hf.tensors), where=hf.path, format="hf", override=named)
    rows, scan = tree_in(tree, trees_of(found, hf.path))
    where = stacked_along(tree, scan_axis)
    stored, real = fused_in(tree, where, None if record_of(tree).get("layout") else source_layout)
    described = _described(hf, found.name, source_layout, origin.layout)
    native, _ = stored_in(hf, described)
    sides = Sides(family=found, tree=where, hf=native, maxtext=stored, scan=scan, to_maxtext=False, real=real)
    pairs = tuple(pair for pair in pairs_of(rows, sides, config) if not (pair.optional and _lacks(tree, pair)))
    return Formats(hf=hf, tree=tree, config=config, sides=sides, pairs=pairs, described=described)


def _described(hf: Reader, family: str, *said: str | None) -> Description:
    """The Hugging Face side in the first of these layouts that it can be in, else in what its family's table has."""
    for layout in filter(None, said):
        with suppress(PlanError):
            return describe(hf, family=family, source_layout=layout)
    return describe(hf, family=family)


def _lacks(tree: Reader, pair: Pair) -> bool:
    return not any(name in tree.tensors for name in names_of(pair))


def counts_of(both: Formats) -> Counts:
    """How much of both is compared by its bits, which is all that the tables know a place for."""
    hf, tree = both.hf, both.tree
    stacks = [stack[0] for stack in _stacks(both.pairs)]
    layers = [name for first in stacks for name in _first_names(first) if name in hf.tensors]
    known = {name for pair in both.pairs for name in names_of(pair)}
    lonely = sum(name not in known for name in tree.tensors)
    experts = [first.counts["e"] for first in stacks if "e" in first.counts]
    return Counts(
        layers=layer_words(None, len(layers), both.config),
        experts=expert_words(experts, both.config),
        nbytes=sum(spec.nbytes for spec in hf.tensors.values()),
        skipped=skipped_words(0, lonely),
        stacked=any(set(LAYERS) & set(first.source.pattern.axes) for first in stacks),
    )


def _first_names(first: Pair) -> Iterator[str]:
    """One tensor of each layer of a stack, in Hugging Face."""
    for at in _points(first):
        yield first.target.key.render({**at, "e": 0, "g": 0})


def _points(first: Pair) -> Iterator[dict[str, int]]:
    """The layers of a stack."""
    axes = [axis for axis in LAYERS if axis in first.counts]
    for point in itertools.product(*(range(first.counts[axis]) for axis in axes)):
        yield dict(zip(axes, point, strict=True))


def all_layers_of(both: Formats) -> dict[str, Block]:
    """The MoE layers of the Hugging Face side, whatever is compared of them."""
    return blocks(both.hf, both.described)


def layers_of(both: Formats, scope: Scope) -> tuple[dict[str, Block], dict[str, Block]]:
    """The MoE layers of both under the same keys, as far as they are in the scope."""
    left = {key: block for key, block in all_layers_of(both).items() if scope.holds(block)}
    keys = {name: key for key, block in left.items() for group in block.groups.values() for name in group.names}
    right = {keys[name]: block for pairs in _stacks(both.pairs) for name, block in _blocks(both, pairs) if name in keys}
    return left, right


def _stacks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """The expert tensors that stand at one place in the tree."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.role in ROLES:
            found.setdefault(pair.source.key.text.rpartition(".")[0], []).append(pair)
    yield from found.values()


def _blocks(both: Formats, pairs: list[Pair]) -> Iterator[tuple[str, Block]]:
    """Each layer of a stack, with the name of one of its tensors in Hugging Face."""
    first = pairs[0]
    for at in _points(first):
        scan = {axis: i for axis, i in at.items() if axis in first.source.pattern.axes}
        index = {axis: i for axis, i in at.items() if axis not in scan}
        groups = {(pair.role, pair.part): _group(both, pair, index) for pair in pairs}
        name = first.target.key.render({**at, "e": 0, "g": 0})
        yield name, Block(reader=both.tree, groups=groups, scan=scan, label=name)


def _group(both: Formats, pair: Pair, index: Mapping[str, int]) -> Group:
    halves = range(2) if "g" in pair.source.key.slots else range(1)
    names = tuple(pair.source.key.render({**index, "g": g}) for g in halves)
    spec = both.tree.tensors[names[0]]
    return Group(
        role=pair.role,
        part=pair.part,
        dims="out" if pair.part else "out in",
        placed=pair.source,
        index=index,
        sizes={**pair.counts, **pair.source.pattern.sizes(spec.shape, {**pair.counts, **pair.real})},
        dtype=spec.dtype,
        names=names,
        layout=both.sides.maxtext[pair.role],
        native=both.sides.maxtext[pair.role],
        relaid=False,
    )
