"""A group of tensors that together hold one part of one role of a MoE block.

In: nothing; `layouts.matching.describe` makes groups. Out: `Group`, which plans and proofs are made from. It never reads data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layouts.language.layout import Layout, Placed
from layouts.language.parts import CHUNKS
from layouts.language.slots import Index

Block = frozenset[tuple[str, int | str]]
"""Where a MoE block is: what the slots of its names say, but for the axes of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All tensors of one part of one role in one MoE block: together they hold each element of `W[e, k, g, n]` once.

    `part` is empty for the weight and names a companion (see `layouts.language.parts`); `dims` are the dimensions that it has.
    `sizes` are logical: without padding, and `n` is what a chunk has where the pattern cuts it into shards (`s`) and chunks
    (`c`).
    `layout` is the one that it is in, `native` the one before it was `relaid`, or the same. The weight beside it, or this one,
    is `packed` if it holds several values in an element (`layouts.matching.packing`).
    """

    role: str
    part: str
    dims: str
    placed: Placed
    index: Index
    sizes: Mapping[str, int]
    dtype: str
    names: Sequence[str]
    layout: Layout
    native: Layout
    relaid: bool
    packed: bool = False

    def total(self, axis: str) -> int:
        """The size of a logical axis, over all its shards and chunks."""
        cut = CHUNKS[:2] if axis == "n" else ()
        size = self.sizes[axis]
        for chunk in cut:
            size *= self.sizes.get(chunk, 1)
        return size
