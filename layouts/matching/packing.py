"""Which weights hold several values in one element: their in and out keep the order in which they were packed.

In: the groups of a checkpoint. Out: the same, marked. It never goes by the presence of a companion.

A name tells it for some (`weight_packed`, `qweight`, `blocks`). For a weight that is called as any other, gate and up take in
what down gives out: if its elements are integers and it has half or an eighth of the columns for that, each holds two or eight
values. I8 with a zero point has all of them, and is not packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layouts.errors import PlanError
from layouts.language.parts import AXES, PARTS
from layouts.matching.lookup import expert_counts
from layouts.reader import Reader
from layouts.tensors import itemsize

if TYPE_CHECKING:
    from layouts.matching.group import Group

PACKED = frozenset(part.name for part in PARTS if part.packed)
WEIGHTS = ("", "packed", "qweight", "blocks")
"""The parts that are weights; every role of a block has one."""
HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "moe_hidden_size", "routed_expert_hidden_size")
"""The words for the size that experts take in and give out, at any depth; the last two are of experts of a narrower space.

Source: transformers `MuseSparkExperts`, SGLang `kimi_k3.py`.
"""
INTEGERS = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})
_OTHER = {"wi": "wo", "wo": "wi"}


def packs(group: Group) -> bool:
    """Whether a tensor holds several values in an element by its name; a zero point of one byte is one value."""
    return group.part in PACKED and not (group.part == "zero_point" and group.dtype == "I8")


def marked(reader: Reader, groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups, those of packed projections marked.

    Raises:
        PlanError: a weight has neither as many columns as the model says nor a part of them.
    """
    weights: dict[tuple[str, Any], Group] = {}
    for group in groups:
        if group.part in WEIGHTS:
            weights[group.role, frozenset(group.index.items())] = group
    packed = {
        (role, block): _is_packed(reader, group, weights.get((_OTHER[role], block))) for (role, block), group in weights.items()
    }
    return tuple(replace(g, packed=packed.get((g.role, frozenset(g.index.items())), False)) for g in groups)


def _is_packed(reader: Reader, group: Group, other: Group | None) -> bool:
    if group.part:
        return group.part in PACKED
    if group.dtype not in INTEGERS:
        return False
    axis = AXES[group.role][0]
    own, most = group.total(axis), 8 * itemsize(group.dtype)
    whole = {other.total(axis)} if other else set(hidden_sizes(reader.config)) if group.role == "wi" else set()
    if own in whole or not whole:
        return not whole and group.dtype == "U8"  # of a part of a checkpoint nothing else may tell it
    if any(size % own == 0 and size // own <= most for size in whole):
        return True
    raise PlanError(
        f"{reader.path}: {group.names[0]} (in {reader.where(group.names[0])}) is {group.dtype} and has {own} columns for "
        f"{min(whole)} values ({axis}): neither one nor a whole number of values in each"
    )


def hidden_sizes(config: Mapping[str, Any], words: Sequence[str] = HIDDEN) -> Iterator[int]:
    """What `config.json` says of the size of the model, at any depth: not of a part without experts beside one that has some.

    The width of a vision tower tells nothing of experts in a text model, whose own may be left out as the usual one.
    """
    told = bool(expert_counts(config))
    for key, value in config.items():
        if key in words and type(value) is int:
            yield value
        elif isinstance(value, Mapping) and (not told or expert_counts(value)):
            yield from hidden_sizes(value, words)
