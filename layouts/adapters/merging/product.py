"""The arithmetic of merging: W + scale * B @ A in float32, rounded once to W's type; the same bits however it is cut.

In: a block of weights, and rows of A and B. Out: the block, altered in place. It never reads a file.

Products are rounded one by one and added in the order of ranks, without BLAS and without fused multiply-add. So neither the
layout of the base, nor the number of workers, nor the machine changes a bit, and merging commutes with fusing. Where an update
is zero the weight keeps its bits (-0.0, NaN).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.language.pattern import strips

FLOATS = ("F32", "BF16", "F16")
"""Element types that float32 holds."""
RULE = "W + scale * (B @ A) in float32, ranks added in their order, rounded once to nearest even"
"""What the manifest says."""
_PART = 1 << 15
"""Elements computed at a time: they stay in the cache (rank 16, BF16: 41 M elements/s a core, where 1 M at a time gave 24)."""


def add_update(
    weights: NDArray[Any], a: NDArray[np.float32], b: NDArray[np.float32], scale: float, dims: tuple[int, int]
) -> bool:
    """Add scale * sum over j of a[j, i] * b[j, o] to a block, in place; tell whether all that was finite still is.

    `a` (r, i) and `b` (r, o) run along the dimensions `dims` of the block.
    """
    finite = True
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for box in strips(weights.shape, _PART):
            part = weights[box]
            one, other = (_along(each, box, dim) for each, dim in zip((a, b), dims, strict=True))
            update, product = np.zeros(part.shape, np.float32), np.empty(part.shape, np.float32)
            for left, right in zip(one, other, strict=True):
                np.multiply(left, right, out=product)
                np.add(update, product, out=update)
            update *= np.float32(scale)
            finite &= _add(part, update)
    return finite


def _along(rows: NDArray[np.float32], box: tuple[slice, ...], dim: int) -> NDArray[np.float32]:
    shape = [1] * len(box)
    shape[dim] = box[dim].stop - box[dim].start
    return rows[:, box[dim]].reshape(len(rows), *shape)


def _add(part: NDArray[Any], update: NDArray[np.float32]) -> bool:
    before = part.astype(np.float32)
    rounded = (before + update).astype(part.dtype)
    finite = bool(np.isfinite(rounded).all()) or not np.any(np.isfinite(before) & ~np.isfinite(rounded))
    np.copyto(part, rounded, where=update != 0)
    return finite
