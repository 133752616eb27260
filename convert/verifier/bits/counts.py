"""How much of two checkpoints was compared, against what `config.json` says there is.

In: MoE layers, `config.json`, sizes. Out: words for the verdict. It never reads data, and never believes a name for a number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.options.values import in_units
from convert.verifier.bits.logical import Block, Scope, pair
from layouts.matching.describe import Description
from layouts.matching.lookup import expert_counts
from layouts.matching.witness import decoder_layers, layers_with_experts
from layouts.reader import Reader
from layouts.tensors import itemsize

_SILENT = "? (config.json does not say)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """MoE layers and experts that are compared, in words; `nbytes` of all there is, and what is left out."""

    layers: str
    experts: str
    nbytes: int
    skipped: str
    stacked: bool | None = None
    """Of a MaxText tree that is compared with another format: whether its layers are in one tensor."""

    def words(self, compared: int) -> str:
        """All of it, with the bytes that were compared in the end."""
        return f"{self.layers}, {self.experts}, {in_units(compared)} of {in_units(self.nbytes)}, {self.skipped} skipped"


def counts_of(
    one: tuple[Reader, Description],
    other: tuple[Reader, Description],
    every: Sequence[Mapping[str, Block]],
    scope: Scope,
) -> Counts:
    """Of two checkpoints in one format: their readers, descriptions and all of their MoE layers."""
    (reader, first), (_, second) = one, other
    config = reader.config or other[0].config
    chosen = [block for block, _ in pair(*every) if scope.holds(block)]
    left = len(every[0].keys() | every[1].keys()) - len(chosen)
    lonely = len(set(first.verbatim) ^ set(second.verbatim))
    return Counts(
        layers=layer_words(_numbers(chosen), len(chosen), config),
        experts=expert_words([len(scope.of(range(block.experts))) for block in chosen], config),
        nbytes=sum(map(nbytes_of, every[0].values()))
        + sum(reader.tensors[name].nbytes for name in (*first.verbatim, *first.loras)),
        skipped=skipped_words(left, lonely),
    )


def _numbers(chosen: Sequence[Block]) -> Collection[int] | None:
    """Of the decoder's layers; a place in a stack is no such number."""
    return None if any(block.scan for block in chosen) else [block.number for block in chosen]


def layer_words(numbers: Collection[int] | None, count: int, config: Mapping[str, Any]) -> str:
    """`48 of 48 MoE layers`; those that config.json does not count (MTP, moments of an optimizer) are `more`."""
    wanted, there = layers_with_experts(config), decoder_layers(config)
    if wanted is None:
        return f"{count} of {count if count == there else _SILENT} MoE layers"
    inside = min(count, len(wanted)) if numbers is None else sum(number in wanted for number in set(numbers))
    more = f" and {count - inside} more" if count > inside else ""
    return f"{inside} of {len(wanted)} MoE layers{more}"


def expert_words(compared: Collection[int], config: Mapping[str, Any]) -> str:
    """`128 of 128 experts`, or `64-128` where layers have different numbers of them."""
    least, most = min(compared, default=0), max(compared, default=0)
    stated = expert_counts(config)
    total = most if most in stated else max(stated, default=_SILENT)
    return f"{most if least == most else f'{least}-{most}'} of {total} experts"


def skipped_words(layers: int, others: int) -> str:
    """`0`, or what was not compared."""
    parts = [f"{count} {word}" for count, word in ((layers, "MoE layers"), (others, "other tensors")) if count]
    return " and ".join(parts) or "0"


def nbytes_of(block: Block) -> int:
    """Of one MoE layer without padding."""
    total = 0
    for group in block.groups.values():
        elements = 1
        for axis in {*group.placed.pattern.axes, *group.placed.key.slots} - set(block.scan):
            elements *= 2 if axis == "g" else group.sizes.get(axis, 1)
        total += elements * itemsize(group.dtype)
    return total
