"""Three probes of the experts of two checkpoints, each run in its own form through grouped GEMMs.

In: the weights of some experts in both checkpoints. Out: differences and errors. It never reads a checkpoint.

- identity: one-hot tokens read rows of every expert's weights back through the GEMM. A sum with one term is exact in any order,
  so either checkpoint must give what is stored in the first; and no expert is left out, as random routing would.
  (XLA takes values below 1.2e-38 for zero.)
- random: random tokens in skewed groups, some of one token, some of none; outputs may differ by rounding alone.
- gradients: of both weights and of the input, in the first and the last layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import PROJECTIONS, Block, expert
from convert.verifier.gemms.backends import Backend
from convert.verifier.gemms.layer import Arrays, Form, ffn, gmm_down, gmm_up
from convert.verifier.gemms.operands import Weights
from convert.verifier.gemms.routing import SILU, Activation
from layouts.tensors import numpy_dtype

GROUP_SIZES = ((1, 0, 5, 2, 0, 3, 1, 0), (0, 4, 0, 0, 1, 0, 0, 2))
"""Rows per expert, in two rounds: every expert has tokens in one of them, some have none in the other, some have one."""
ONE_HOT = 16
"""Rows of a weight that the identity probe reads back, evenly spread; all of them where there are no more."""
_MARGIN = 16
"""Errors of a sum of n rounded terms grow as sqrt(n) eps; a bound has this factor on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the probes run: a backend, the model's activation, and how many times the usual tokens."""

    backend: Backend
    activation: Activation = SILU
    tokens: int = 1


class Distance(NamedTuple):
    """How far two outputs (M, K) are apart, row by row: relative to the row's norm, as they are, and in units in the last place
    (float32) of the row's largest; whether it is more than rounding explains; and whether there is a finite number in the row,
    since of others nothing can be told but that they are alike.
    """  # noqa: D205

    relative: NDArray[Any]
    delta: NDArray[Any]
    ulp: NDArray[Any]
    unequal: NDArray[np.bool_]
    finite: NDArray[np.bool_]


def stored(block: Block, experts: range, rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Those rows of the logical weights as XLA sees them: float32, and zero where they are too small for it.

    `wi` is (E, 2, rows, N), `wo` (E, 1, rows, K).
    """
    found = {}
    for role, wanted in rows.items():
        bits = np.stack([expert(block, (role, ""), e)[..., wanted, :] for e in experts])
        values = np.ascontiguousarray(bits).view(numpy_dtype(block.groups[role, ""].dtype)).astype(np.float32)
        values[np.abs(values) < np.finfo(np.float32).tiny] = 0
        found[role] = values.reshape(len(experts), -1, *bits.shape[-2:])
    return found


def rows_of(block: Block, tokens: int = 1) -> dict[str, NDArray[Any]]:
    """Which rows of each weight the one-hot tokens read."""
    lengths = {"wi": block.groups["wi", ""].total("k"), "wo": block.groups["wo", ""].total("n")}
    return {role: np.unique(np.linspace(0, n - 1, min(ONE_HOT * tokens, n)).astype(int)) for role, n in lengths.items()}


def identity(
    wanted: Mapping[str, NDArray[Any]],
    weights: Weights,
    block: Block,
    experts: range,
    setting: Setting,
    unread: set[int] | None = None,
) -> Iterator[str]:
    """Rows of the weights that do not come back through the GEMM as they are `stored` in the first checkpoint.

    Experts of which that cannot be told, as infinities among the weights spoil the sums, are added to `unread`.
    """
    rows, form = rows_of(block, setting.tokens), weights.form(setting.backend)
    for role in ("wi", "wo"):
        each = _read_back(weights, role, rows[role], len(experts), block, form)
        values = wanted[role]
        unequal = (each != values).any(axis=(2, 3))
        if unequal.any() and not _finite(weights):
            (set() if unread is None else unread).update(experts)
            continue  # zero times infinity is no zero, and the masked product of a CPU lets it reach other experts
        for at, g in np.argwhere(unequal):
            where = f"{block.label}, expert {experts[at]}, {PROJECTIONS[role][g]}"
            yield f"{where}: one-hot tokens do not read the stored weights back"


def _finite(weights: Weights) -> bool:
    return all(bool(jnp.isfinite(operand.array).all()) for operand in (weights.wi, weights.wo))


def _read_back(weights: Weights, role: str, rows: NDArray[Any], experts: int, block: Block, form: Form) -> NDArray[Any]:
    """(E, projections, rows, N or K), through the GEMM."""
    length = block.groups[role, ""].total("k" if role == "wi" else "n")
    operand = weights.wi if role == "wi" else weights.wo
    tokens = jnp.asarray(np.tile(np.eye(length, dtype=np.float32)[rows], (experts, 1)), operand.array.dtype)
    sizes = jnp.full(experts, len(rows), jnp.int32)
    if role == "wi":
        found = np.stack([np.asarray(part) for part in gmm_up(tokens, operand.array, sizes, form)])
    else:
        found = np.asarray(gmm_down(tokens, operand.array, sizes, form))[None, :, : block.groups[role, ""].total("k")]
    return found.reshape(len(found), experts, len(rows), -1).swapaxes(0, 1)


def tokens(experts: range, k: int, times: int, sizes: Sequence[int] = GROUP_SIZES[0]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random rows (M, K) and how many of them each expert gets."""
    groups = np.resize(np.array(sizes, np.int32), len(experts)) * times
    return np.random.default_rng([experts.start, k]).standard_normal((groups.sum(), k)).astype(np.float32), groups


def random(a: Weights, b: Weights, block: Block, experts: range, setting: Setting) -> tuple[Distance, list[str]]:
    """The largest differences of each expert's outputs, and what is more than rounding explains."""
    k = block.groups["wi", ""].total("k")
    worst = Distance._make(np.zeros(len(experts), kind) for kind in (float, float, float, bool, bool))
    for sizes in GROUP_SIZES:
        x, groups = tokens(experts, k, setting.tokens, sizes)
        if not len(x):
            continue
        outputs = (weights.run(x, groups, setting.backend, setting.activation) for weights in (a, b))
        found = distance(*outputs, terms=k)
        for at, rows in enumerate(np.split(np.arange(len(x)), np.cumsum(groups)[:-1])):
            for most, values in zip(worst, found, strict=True):
                most[at] = max(most[at], values[rows].max(initial=0))
    problems = [f"{block.label}, expert {experts[at]}: outputs of the two differ" for at in np.flatnonzero(worst.unequal)]
    return worst, problems


def gradients(
    a: Weights, b: Weights, block: Block, experts: range, setting: Setting, rows: list[int] | None = None
) -> Iterator[str]:
    """Gradients that differ by more than rounding: of gate, up and down in logical axes, and of the input.

    The number of input rows whose gradients are finite is added to `rows`.
    """
    k, n = (block.groups["wi", ""].total(axis) for axis in "kn")
    rng = np.random.default_rng([experts.start, k, n])
    groups = np.full(len(experts), 3, np.int32)
    x, along = rng.standard_normal((2, groups.sum(), k)).astype(np.float32)
    ones, others = (_gradients(weights, x, along, groups, setting) for weights in (a, b))
    found = distance(ones["x"], others["x"], terms=k + n)
    ([] if rows is None else rows).append(int(found.finite.sum()))
    if found.unequal.any():
        which = f"{block.label}, experts {experts.start} to {experts.stop - 1}"
        yield f"{which}: gradients of the input differ by {found.relative.max():.1e}"
    for at, e in enumerate(experts):
        for role, (mine, yours) in {"wi": (a.wi, b.wi), "wo": (a.wo, b.wo)}.items():
            pair = [side.logical(grads[role], role, at) for side, grads in ((mine, ones), (yours, others))]
            found = distance(*(each.reshape(len(PROJECTIONS[role]), -1) for each in pair), terms=k + n)
            for projection, relative, bad in zip(PROJECTIONS[role], found.relative, found.unequal, strict=True):
                if bad:
                    yield f"{block.label}, expert {e}, {projection}: gradients differ by {relative:.1e}"


def _gradients(weights: Weights, x: Any, along: Any, groups: Any, setting: Setting) -> Mapping[str, NDArray[Any]]:
    arrays = weights.arrays
    wide = arrays._replace(wi=arrays.wi.astype(jnp.float32), wo=arrays.wo.astype(jnp.float32))
    form = weights.form(setting.backend, setting.activation)
    found = _gradient(jnp.asarray(x), wide.wi, wide.wo, wide, jnp.asarray(groups), jnp.asarray(along), form=form)
    return dict(zip(("x", "wi", "wo"), map(np.asarray, found), strict=True))


def _loss(
    x: jax.Array, wi: jax.Array, wo: jax.Array, arrays: Arrays, groups: jax.Array, along: jax.Array, form: Form
) -> jax.Array:
    return jnp.sum(ffn(x, arrays._replace(wi=wi, wo=wo), groups, form) * along)


_gradient = jax.jit(jax.grad(_loss, argnums=(0, 1, 2)), static_argnames=("form",))


def distance(a: NDArray[Any], b: NDArray[Any], *, terms: int) -> Distance:
    """Compare outputs (M, K) row by row.

    Both sides accumulate in float32, in an order that XLA may choose by shape. The bound can hide nothing: the exact level
    compares the bits of the weights themselves. NaN is equal to NaN here, and infinities to themselves.
    """
    finite = np.isfinite(a) & np.isfinite(b)
    same = np.where(finite, True, (np.isnan(a) & np.isnan(b)) | (a == b))
    values = np.where(finite, a, 0)
    delta = np.abs(values - np.where(finite, b, 0)).max(axis=-1, initial=0)
    relative = delta / (np.linalg.norm(values, axis=-1) + np.finfo(np.float32).tiny)
    ulp = delta / np.spacing(np.abs(values).max(axis=-1, initial=np.finfo(np.float32).tiny).astype(np.float32))
    unequal = (relative > _MARGIN * np.finfo(np.float32).eps * np.sqrt(terms)) | ~same.all(axis=-1)
    return Distance(relative, delta, ulp, unequal, finite.any(axis=-1))
