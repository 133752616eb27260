"""Layers that have experts of several kinds, each a block with sizes of its own (ERNIE 4.5 VL: for text, and for images).

In: an open checkpoint, its family, its groups. Out: the family for this checkpoint, or an error. It never goes by shapes.

What is published numbers all experts of a layer through, one kind behind the other. Which number is where the second kind
begins is nowhere in names, and two kinds may have one size: `config.json` says it (`moe_num_experts`), or there is no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layouts.errors import InputError, PlanError
from layouts.matching.candidates import record_of
from layouts.matching.group import Group
from layouts.matching.lookup import experts_of_kinds
from layouts.reader import Reader
from layouts.tables.families import Family


def filled(reader: Reader, family: Family) -> Family:
    """The family with the number of experts of the first kind; as it is if no name or a record makes that a question.

    Raises:
        PlanError: experts are numbered through, and `config.json` does not say how many of each kind there are.
    """
    if not family.is_open:
        return family
    counts = experts_of_kinds(reader.config, family.kinds)
    if counts:
        return family.filled(counts[0])
    numbered = [table["wi"].template(family.experts) for table in family.filled(2).native if table not in family.native]
    if "layout" in record_of(reader) or not any(key.parse(name) for key in numbered for name in reader.tensors):
        return family
    raise PlanError(
        f"{reader.path}: layers of {family.name} have experts of {family.kinds} kinds, and config.json does not say how many "
        f"of each: state moe_num_experts, [text, images] or one number for both, or name another model with --family"
    )


def check_kinds(reader: Reader, family: Family, groups: Sequence[Group]) -> None:
    """Every layer has the experts of each kind, as many as `config.json` says.

    Raises:
        InputError: some are missing, or too many.
    """
    if family.kinds == 1:
        return
    counts = experts_of_kinds(reader.config, family.kinds)
    layers: dict[tuple[Any, Any], dict[int, Group]] = {}
    for group in groups:  # in a layout that a user has named, no name may say the kind
        if "e" in group.sizes:
            layers.setdefault((group.index.get("path"), group.index.get("l")), {})[int(group.index.get("kind", 0))] = group
    for found in layers.values():
        some = next(iter(found.values()))
        if lost := set(range(family.kinds)) - found.keys():
            raise InputError(
                f"{reader.path}: {some.names[0]} (in {reader.where(some.names[0])}) is an expert of kind {min(found)} of "
                f"{family.kinds}, and its layer has none of kind {min(lost)}. Get the files that are missing, or correct "
                f"moe_num_experts in config.json"
            )
        for kind, group in found.items():
            if counts and group.total("e") != counts[kind]:
                raise InputError(
                    f"{reader.path}: {group.names[0]} (in {reader.where(group.names[0])}) is one of {group.total('e')} experts "
                    f"of kind {kind}, but config.json says {counts[kind]} (moe_num_experts)"
                )
