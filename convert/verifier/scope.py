"""What of two checkpoints is compared: which layers, which experts; and that they are there.

In: MoE layers, the numbers that the user gave. Out: a narrowed scope in words, or an error. It never reads data.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping

from convert.errors import UsageError
from convert.verifier.bits.logical import Block, Scope


def check_scope(scope: Scope, blocks: Iterable[Block]) -> None:
    """See that each layer and each expert that is asked for is in these MoE layers.

    Raises:
        UsageError: one is not, or none is named; says which ones there are.
    """
    held = list(blocks)
    _check("layers", "MoE layer", scope.layers, {block.number for block in held})
    chosen = [block.experts for block in held if scope.holds(block)]
    _check("experts", "expert", scope.experts, set(range(max(chosen, default=0))))


def _check(option: str, word: str, wanted: frozenset[int] | None, there: set[int]) -> None:
    if wanted is None:
        return
    have = f"are {option} {ranges(there)}" if len(there) > 1 else f"is {word} {ranges(there)}" if there else f"are no {option}"
    if not wanted:
        raise UsageError(f"{option}: none is given; there {have}")
    if lost := wanted - there:
        raise UsageError(f"{option}: there is no {word} {ranges(lost)}; there {have}")


def narrowed(scope: Scope, blocks: Mapping[str, Block]) -> str:
    """`layers 3-5 of 48, experts 0 of 128`; empty if all are compared."""
    words = []
    if scope.layers is not None:
        words.append(f"layers {ranges(scope.layers)} of {len({block.number for block in blocks.values()})}")
    if scope.experts is not None:
        most = max((block.experts for block in blocks.values()), default=0)
        words.append(f"experts {ranges(scope.experts)} of {most}")
    return ", ".join(words)


def ranges(numbers: Collection[int]) -> str:
    """0, 1, 2 and 5 as `0-2, 5`."""
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda at: at[1] - at[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
