"""See that tensors which the other format has only once hold the same here.

In: pairs of names, the open input. Out: nothing, or an error. It runs before anything is written.

DeepSeek's MTP block is published with copies of the embedding and of the head; MaxText's block uses those of the model. To take
their equality for granted would drop a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from convert.errors import PlanError
from layouts.language.pattern import strips
from layouts.reader import Reader

_STRIP = 4 << 20
"""Elements that are compared at a time."""


def compare_twins(twins: Iterable[tuple[str, str]], reader: Reader) -> None:
    """Compare the bytes of each pair.

    Raises:
        PlanError: they differ, so that one would be lost.
    """
    for one, other in twins:
        first, second = reader.tensors[one], reader.tensors[other]
        same = (first.dtype, first.shape) == (second.dtype, second.shape)
        if not (same and all(_equal(reader, one, other, part) for part in strips(first.shape, _STRIP))):
            raise PlanError(
                f"{reader.path}: {one} (in {reader.where(one)}) is not what {other} is, and MaxText has one tensor for both; "
                f"--drop-mtp leaves out the block that has it"
            )


def _equal(reader: Reader, one: str, other: str, part: tuple[slice, ...]) -> bool:
    return np.array_equal(reader.read(one, part), reader.read(other, part))
