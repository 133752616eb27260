"""Three probes of the expert layers of two checkpoints, each run in its own form through grouped GEMMs.

- identity: one-hot tokens read rows of every expert's weights back through the GEMM. A sum with one term is exact in any order,
  so what comes out must be what is stored; and no expert is left out, as random routing would. (XLA takes values below 1.2e-38
  for zero.)
- random: random tokens in skewed groups, some of one token, some of none; outputs may differ by rounding alone.
- gradients: of both weights and of the input, in the first and the last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from convert.verifier.logical import PROJECTIONS, Block, expert
from convert.verifier.operands import Weights, ffn, gmm_down, gmm_up, run
from layouts.checkpoint import numpy_dtype

GROUP_SIZES = ((1, 0, 5, 2, 0, 3, 1, 0), (0, 4, 0, 0, 1, 0, 0, 2))
"""Rows per expert, in two rounds: every expert has tokens in one of them, some have none in the other, some have one."""
ONE_HOT = 16
"""Rows of a weight that the identity probe reads back, evenly spread; all of them where there are no more."""
_MARGIN = 16
"""Errors of a sum of n rounded terms grow as sqrt(n) eps; a bound has this factor on top."""


def identity(block: Block, weights: Weights, experts: range) -> Iterator[str]:
    """Rows of the weights that do not come back through the GEMM as they are stored."""
    wi, wo = weights
    for role in ("wi", "wo"):
        group = block.groups[role, ""]
        length = group.total("k" if role == "wi" else "n")
        rows = np.unique(np.linspace(0, length - 1, min(ONE_HOT, length)).astype(int))
        x = np.tile(np.eye(length, dtype=np.float32)[rows], (len(experts), 1))
        sizes = jnp.full(len(experts), len(rows), jnp.int32)
        tokens = jnp.asarray(x, (wi if role == "wi" else wo).array.dtype)
        if role == "wi":
            found = jnp.stack(gmm_up(tokens, wi.array, sizes, columns=wi.columns, rows_first=wi.rows_first))
        else:
            found = gmm_down(tokens, wo.array, sizes, rows_first=wo.rows_first)[None, :, : group.total("k")]
        each = np.asarray(found).reshape(found.shape[0], len(experts), len(rows), -1)
        wanted = _values(block, role, experts, rows).reshape(len(experts), found.shape[0], len(rows), -1)
        unequal = (each.swapaxes(0, 1) != wanted).any(axis=(2, 3))
        if unequal.any() and not np.isfinite(_values(block, role, experts)).all():
            continue  # zero times infinity is no zero, and the masked product of a CPU lets it reach other experts
        for at, g in np.argwhere(unequal):
            where = f"{block.label}, expert {experts[at]}, {PROJECTIONS[role][g]}"
            yield f"{where}: one-hot tokens do not read the stored weights back"


def _values(block: Block, role: str, experts: range, rows: Any = slice(None)) -> NDArray[Any]:
    """Rows of the logical weights as XLA sees them: float32, and zero where they are too small for it."""
    group = block.groups[role, ""]
    bits = np.stack([expert(block, (role, ""), e)[..., rows, :] for e in experts])
    values = np.ascontiguousarray(bits).view(numpy_dtype(group.dtype)).astype(np.float32)
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values)


def random(a: Weights, b: Weights, block: Block, experts: range, tokens: int = 1) -> tuple[list[float], list[str]]:
    """The largest difference of each expert's outputs relative to their norm, and what is more than rounding explains."""
    k = block.groups["wi", ""].total("k")
    worst, problems = [0.0] * len(experts), []
    for sizes in GROUP_SIZES:
        groups = np.array(sizes[: len(experts)], np.int32) * tokens
        if not groups.sum():
            continue
        x = np.random.default_rng([experts.start, k]).standard_normal((groups.sum(), k)).astype(np.float32)
        relative, unequal = distance(*(np.asarray(run(x, weights, groups)) for weights in (a, b)), terms=k)
        for at, rows in enumerate(np.split(np.arange(len(x)), np.cumsum(groups)[:-1])):
            worst[at] = max(worst[at], float(relative[rows].max(initial=0)))
            if unequal[rows].any():
                problems.append(f"{block.label}, expert {experts.start + at}: outputs of the two layouts differ")
    return worst, list(dict.fromkeys(problems))


def gradients(a: Weights, b: Weights, block: Block, experts: range) -> Iterator[str]:
    """Gradients that differ by more than rounding: of gate, up and down in logical axes, and of the input."""
    k, n = (block.groups["wi", ""].total(axis) for axis in "kn")
    rng = np.random.default_rng([experts.start, k, n])
    groups = np.full(len(experts), 3, np.int32)
    x, along = rng.standard_normal((2, groups.sum(), k)).astype(np.float32)
    ones, others = (_gradients(weights, x, along, groups) for weights in (a, b))
    relative, unequal = distance(ones["x"], others["x"], terms=k + n)
    if unequal.any():
        which = f"{block.label}, experts {experts.start} to {experts.stop - 1}"
        yield f"{which}: gradients of the input differ by {relative.max():.1e}"
    for at, e in enumerate(experts):
        for role, (mine, yours) in {"wi": (a[0], b[0]), "wo": (a[1], b[1])}.items():
            pair = [side.logical(found[role], role, at) for side, found in ((mine, ones), (yours, others))]
            flat = [np.asarray(each).reshape(len(PROJECTIONS[role]), -1) for each in pair]
            relative, unequal = distance(*flat, terms=k + n)
            for projection, bad in zip(PROJECTIONS[role], unequal, strict=True):
                if bad:
                    yield f"{block.label}, expert {e}, {projection}: gradients differ by {relative.max():.1e}"


def _gradients(weights: Weights, x: Any, along: Any, groups: Any) -> Mapping[str, NDArray[Any]]:
    wi, wo = weights

    def loss(rows: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        out = ffn(rows, up, down, jnp.asarray(groups), columns=wi.columns, first=(wi.rows_first, wo.rows_first))
        return jnp.sum(out * along)

    found = jax.grad(loss, argnums=(0, 1, 2))(jnp.asarray(x), wi.array.astype(jnp.float32), wo.array.astype(jnp.float32))
    return dict(zip(("x", "wi", "wo"), map(np.asarray, found), strict=True))


def distance(a: NDArray[Any], b: NDArray[Any], *, terms: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """For each row the largest difference relative to its norm, and whether it is more than rounding explains.

    Both sides accumulate in float32, in an order that XLA may choose by shape. The bound can hide nothing: the exact level
    compares the bits of the weights themselves. NaN is equal to NaN here, and infinities to themselves.
    """
    finite = np.isfinite(a) & np.isfinite(b)
    same = np.where(finite, True, (np.isnan(a) & np.isnan(b)) | (a == b))
    norm = np.linalg.norm(np.where(finite, a, 0), axis=-1) + np.finfo(np.float32).tiny
    relative = np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)).max(axis=-1, initial=0) / norm
    return relative, (relative > _MARGIN * np.finfo(np.float32).eps * np.sqrt(terms)) | ~same.all(axis=-1)
