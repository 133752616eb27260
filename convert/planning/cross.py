"""Plan a conversion between Hugging Face and MaxText: tensors by the table of trees, experts by their layouts.

In: names and shapes, a tree. Out: targets. It never reads data.

It is the same operation as any other: two layouts of one tensor, and block copies between them. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from convert.planning.cross_pairs import Pair, Sides, names_of, pairs_of
from convert.planning.targets import OTHER, Target, cut
from layouts.errors import InputError, PlanError
from layouts.reader import Reader
from layouts.tables.maxtext import Tree
from layouts.tensors import TensorSpec


def cross_targets(
    reader: Reader, tree: Tree, sides: Sides, config: Mapping[str, Any], left_out: Collection[str] = ()
) -> list[Target]:
    """All tensors of the output; those `left_out` of the input are not asked for.

    Raises:
        InputError: a tensor is missing, or tensors that are stacked differ.
        PlanError: a tensor of the input has no place on the other side, or MaxText has no model of this kind.
    """
    pairs = [(pair, names_of(pair)) for pair in pairs_of(tree, sides, config)]
    missing = [(pair, names, sum(name in reader.tensors for name in names)) for pair, names in pairs]
    missing = [(pair, names, have) for pair, names, have in missing if have < len(names) and (have or not pair.optional)]
    known = {name for _, names in pairs for name in names}
    left = [name for name in reader.tensors if name not in known and name not in left_out]
    if missing or left:
        _check_kind(reader, tree, config)
    if left:  # before what is missing: of another model, both are
        raise PlanError(
            f"{reader.path}: {len(left)} tensors have no place on the other side, first {left[0]} (in "
            f"{reader.where(left[0])}); nothing is dropped, so there is no plan"
        )
    for _, names, have in missing:
        lost = next(name for name in names if name not in reader.tensors)
        raise InputError(f"{reader.path}: {lost} is missing; {have} of {len(names)} such tensors are there")
    there = ((pair, names) for pair, names in pairs if names and names[0] in reader.tensors)
    return [target for pair, names in there for target in _targets(reader, pair, names)]


def _check_kind(reader: Reader, tree: Tree, config: Mapping[str, Any]) -> None:
    """Say why tensors do not fit the tree, where `config.json` tells that it is of another kind of model."""
    for word, values, kind in tree.only:
        if (stated := config.get(word)) is not None and stated not in values:
            raise PlanError(
                f"{reader.path}: {word} is {str(stated)[:80]} in config.json, and MaxText has no such model: its own has {kind}"
            )


def _targets(reader: Reader, pair: Pair, names: Sequence[str]) -> Iterator[Target]:
    first = reader.tensors[names[0]]
    for name in names:
        spec = reader.tensors[name]
        if (spec.shape, spec.dtype) != (first.shape, first.dtype):
            raise InputError(
                f"{reader.path}: {name} is {spec.dtype} {spec.shape}, but {first.name} {first.dtype} {first.shape}"
            )
    try:
        stored = {**pair.counts, **pair.source.pattern.sizes(first.shape, {**pair.counts, **pair.real})}
        sizes = stored if pair.role == OTHER else cut(stored, pair.target.pattern)
        shape = pair.target.pattern.shape(sizes)
    except (KeyError, ValueError) as error:
        raise PlanError(f"{reader.path}: {first.name} (in {reader.where(first.name)}): {error}") from None
    slots = pair.target.key.slots
    for point in itertools.product(*(range(pair.counts[slot]) for slot in slots)):
        index = dict(zip(slots, point, strict=True))
        yield Target(
            spec=TensorSpec(name=pair.target.key.render(index), dtype=first.dtype, shape=shape),
            role=pair.role,
            part=pair.part,
            dims="out" if pair.part else "out in",
            index=index,
            sizes=sizes,
            source_sizes=stored,
            source=pair.source,
            target=pair.target,
        )
