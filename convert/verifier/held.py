"""The MoE layers of two checkpoints that are compared, both ready to be read in the order of the comparison.

In: layers of both sides, and a scope. Out: those within it, and windows on the arrays of a tree. It never reads a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from convert.verifier.bits.across import Formats, all_layers_of, layers_of
from convert.verifier.bits.logical import Block, Scope, pair
from convert.verifier.bits.order import hold_experts
from convert.verifier.scope import check_scope
from layouts.matching.describe import Description
from layouts.reader import Reader

Layers = tuple[dict[str, Block], dict[str, Block]]
"""The MoE layers of either side."""


def held_alike(
    sides: Iterable[tuple[Reader, Description]], every: Sequence[Mapping[str, Block]], scope: Scope, memory: int
) -> Layers:
    """Of `every` MoE layer of both sides those that are compared, and both checkpoints ready to be read in their order."""
    check_scope(scope, (block for side in every for block in side.values()))
    one, other = ({key: block for key, block in side.items() if scope.holds(block)} for side in every)
    hold_experts(list(pair(one, other)), [(reader, described.verbatim) for reader, described in sides], memory)
    return one, other


def held_across(both: Formats, scope: Scope, memory: int) -> Layers:
    """The same for two formats."""
    if scope.is_narrow:
        check_scope(scope, all_layers_of(both).values())
    left, right = layers_of(both, scope)
    hold_experts(list(pair(left, right)), [(both.tree, ())], memory)
    return left, right
