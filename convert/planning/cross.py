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
        PlanError: a tensor of the input has no place on the other side.
    """
    used: set[str] = set()
    found: list[Target] = []
    for pair in pairs_of(tree, sides, config):
        names = names_of(pair)
        have = [name for name in names if name in reader.tensors]
        if not have and pair.optional:
            continue
        if lost := next((name for name in names if name not in reader.tensors), None):
            raise InputError(f"{reader.path}: {lost} is missing; {len(have)} of {len(names)} such tensors are there")
        found += _targets(reader, pair, names)
        used.update(names)
    if left := [name for name in reader.tensors if name not in used and name not in left_out]:
        raise PlanError(
            f"{reader.path}: {len(left)} tensors have no place on the other side, first {left[0]} (in "
            f"{reader.where(left[0])}); nothing is dropped, so there is no plan"
        )
    return found


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
