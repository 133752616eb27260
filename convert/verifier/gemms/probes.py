"""Three probes of the experts of two checkpoints, each run in its own form through grouped GEMMs.

In: the weights of some experts in both checkpoints. Out: differences and errors. It never reads a checkpoint.

- identity: one-hot tokens read rows of every expert's weights back through the GEMM. A sum with one term is exact in any order,
  so either checkpoint must give what is stored in the first; and no expert is left out, as random routing would.
  (XLA takes values below 1.2e-38 for zero.)
- random: random tokens in skewed groups, some of one token, some of none; outputs may differ by rounding alone.
- gradients: of both weights and of the input, in the first and the last layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import PROJECTIONS, Block
from convert.verifier.gemms.backends import Backend
from convert.verifier.gemms.layer import Arrays, Form, Read, ffn
from convert.verifier.gemms.operands import Weights
from convert.verifier.gemms.routing import SILU, Activation
from convert.verifier.gemms.rows import Rows, length_of

GROUP_SIZES = ((1, 0, 5, 2, 0, 3, 1, 0), (0, 4, 0, 0, 1, 0, 0, 2))
"""Rows per expert, in two rounds: every expert has tokens in one of them, some have none in the other, some have one."""
_MARGIN = 16
"""Errors of a sum of n rounded terms grow as sqrt(n) eps; a bound has this factor on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What the probes run: a backend, the model's activation, how many times the usual tokens, and `Scope.always`."""

    backend: Backend
    activation: Activation = SILU
    tokens: int = 1
    always: bool = False


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


class Answers(NamedTuple):
    """What came out: rows of `wi` (E, 2, rows, N) and `wo` (E, 1, rows, K) that were read back, and outputs (M, K)."""

    wi: NDArray[Any]
    wo: NDArray[Any]
    random: NDArray[Any]
    routed: NDArray[Any]


def answered(found: Read, rows: Rows) -> Answers:
    """What came out of a call with these rows; it waits for that."""
    gate, up, down = map(np.asarray, found)
    hot, experts = rows.hot[0] >= 0, len(rows.sizes)
    wi = np.stack([each[hot].reshape(experts, -1, each.shape[1]) for each in (gate, up)], 1)
    return Answers(wi, down[hot].reshape(experts, 1, -1, down.shape[1]), down[rows.random], down[rows.routed])


def stored(weights: Weights, rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Those rows of the logical weights as XLA sees them: float32, and zero where they are too small for it.

    `wi` is (E, 2, rows, N), `wo` (E, 1, rows, K).
    """
    found = {}
    for role, wanted in rows.items():
        operand = weights.wi if role == "wi" else weights.wo
        each = [[part[wanted] for part in operand.projections(operand.host, role, e)] for e in range(weights.experts)]
        values = np.asarray(each, np.float32)
        values[np.abs(values) < np.finfo(np.float32).tiny] = 0
        found[role] = values
    return found


def identity(
    wanted: Mapping[str, NDArray[Any]],
    answers: Answers,
    weights: Weights,
    block: Block,
    experts: range,
    unread: set[int] | None = None,
    *,
    apart: bool = False,
) -> Iterator[str]:
    """Rows of the weights that do not come back through the GEMM as they are `stored` in the first checkpoint.

    Experts of which that cannot be told, as infinities among the weights spoil the sums, are added to `unread`: those that
    hold some, where the backend keeps experts `apart`; else all of the call.
    """
    for role, each in (("wi", answers.wi), ("wo", answers.wo)):
        values = wanted[role]
        unequal = (each[:, :, : values.shape[2]] != values).any(axis=(2, 3))
        spoilt = {int(at) for at in np.flatnonzero(unequal.any(axis=1)) if apart and not _finite(weights, int(at))}
        if unequal.any() and not apart and not all(_finite(weights, at) for at in range(weights.experts)):
            # Zero times infinity is no zero, and a masked product lets it reach other experts.
            spoilt = set(range(len(experts)))
        (set() if unread is None else unread).update(experts[at] for at in spoilt)
        for at, g in np.argwhere(unequal):
            if at not in spoilt:
                where = f"{block.label}, expert {experts[at]}, {PROJECTIONS[role][g]}"
                yield f"{where}: one-hot tokens do not read the stored weights back"


def _finite(weights: Weights, at: int) -> bool:
    """Whether all weights of an expert are numbers."""
    both = (("wi", weights.wi), ("wo", weights.wo))
    parts = (part for role, operand in both for part in operand.projections(operand.host, role, at))
    return all(bool(np.isfinite(np.asarray(part, np.float32)).all()) for part in parts)


def outputs(both: tuple[Answers, Answers], block: Block, experts: range) -> tuple[Distance, list[str]]:
    """The largest differences of each expert's outputs, and what is more than rounding explains."""
    found = distance(both[0].random, both[1].random, terms=block.groups["wi", ""].total("k"))
    worst = Distance._make(each.reshape(len(experts), -1).max(axis=1, initial=0) for each in found)
    return worst, _differing(worst, block, experts)


def _differing(worst: Distance, block: Block, experts: range) -> list[str]:
    return [f"{block.label}, expert {experts[at]}: outputs of the two differ" for at in np.flatnonzero(worst.unequal)]


def tokens(experts: range, k: int, times: int, sizes: Sequence[int] = GROUP_SIZES[0]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Random rows (M, K) and how many of them each expert gets."""
    groups = np.resize(np.array(sizes, np.int32), len(experts)) * times
    return np.random.default_rng([experts.start, k]).standard_normal((groups.sum(), k)).astype(np.float32), groups


def skewed(a: Weights, b: Weights, block: Block, experts: range, setting: Setting) -> tuple[Distance, list[str]]:
    """The same for random tokens in skewed groups, of which some are empty and some have one; always by the backend itself."""
    k = block.groups["wi", ""].total("k")
    worst = Distance._make(np.zeros(len(experts), kind) for kind in (float, float, float, bool, bool))
    length = length_of(block, len(experts), setting.tokens)
    for sizes in GROUP_SIZES:
        x, groups = tokens(experts, k, setting.tokens, np.roll(sizes, -experts.start).tolist())
        found = distance(*(w.run(x, groups, setting.backend, setting.activation, length) for w in (a, b)), terms=k)
        for at, rows in enumerate(np.split(np.arange(len(x)), np.cumsum(groups)[:-1])):
            for worse, values in zip(worst, found, strict=True):
                worse[at] = max(worse[at], values[rows].max(initial=0))
    return worst, _differing(worst, block, experts)


def gradients(
    a: Weights,
    b: Weights,
    block: Block,
    experts: range,
    setting: Setting,
    rows: list[int] | None = None,
    worst: list[float] | None = None,
) -> Iterator[str]:
    """Gradients that differ by more than rounding: of gate, up and down in logical axes, and of the input.

    The number of input rows whose gradients are finite is added to `rows`, each largest difference to `worst`.
    """
    measured = [] if worst is None else worst
    k, n = (block.groups["wi", ""].total(axis) for axis in "kn")
    rng = np.random.default_rng([experts.start, k, n])
    groups = np.full(len(experts), 3, np.int32)
    x, along = rng.standard_normal((2, groups.sum(), k)).astype(np.float32)
    ones, others = (_gradients(weights, x, along, groups, setting) for weights in (a, b))
    found = distance(*(np.asarray(each["x"]) for each in (ones, others)), terms=k + n)
    ([] if rows is None else rows).append(int(found.finite.sum()))
    measured.append(float(found.relative.max(initial=0)))
    if found.unequal.any():
        which = f"{block.label}, experts {experts.start} to {experts.stop - 1}"
        yield f"{which}: gradients of the input differ by {found.relative.max():.1e}"
    for at, e in enumerate(experts):
        for role, (mine, yours) in {"wi": (a.wi, b.wi), "wo": (a.wo, b.wo)}.items():
            pair = [side.projections(grads[role], role, at) for side, grads in ((mine, ones), (yours, others))]
            for projection, *each in zip(PROJECTIONS[role], *pair, strict=True):
                found = distance(*(part.reshape(1, -1) for part in each), terms=k + n)
                measured.append(float(found.relative[0]))
                if found.unequal.any():
                    yield f"{block.label}, expert {e}, {projection}: gradients differ by {found.relative[0]:.1e}"


def _gradients(weights: Weights, x: Any, along: Any, groups: Any, setting: Setting) -> Mapping[str, Any]:
    form = weights.form(setting.backend, setting.activation, int(max(groups)))
    found = _gradient(jnp.asarray(x), weights.arrays, jnp.asarray(groups), jnp.asarray(along), form=form)
    return dict(zip(("x", "wi", "wo"), found, strict=True))


@functools.partial(jax.jit, static_argnames=("form",))
def _gradient(x: jax.Array, arrays: Arrays, groups: jax.Array, along: jax.Array, form: Form) -> tuple[Any, ...]:
    """Of x, `wi` and `wo`, in float32."""

    def loss(x: jax.Array, wi: Any, wo: jax.Array) -> jax.Array:
        return jnp.sum(ffn(x, arrays._replace(wi=wi, wo=wo), groups, form) * along)

    wide = jax.tree.map(lambda array: array.astype(jnp.float32), (arrays.wi, arrays.wo))
    found: tuple[Any, ...] = jax.grad(loss, argnums=(0, 1, 2))(x, *wide)
    return found


def bound(terms: int) -> float:
    """How far sums of so many float32 terms may be apart, relative to the norm of a row of them."""
    return float(_MARGIN * np.finfo(np.float32).eps * np.sqrt(terms))


def distance(a: NDArray[Any], b: NDArray[Any], *, terms: int) -> Distance:
    """Compare outputs (M, K) row by row.

    Both sides accumulate in float32, in an order that XLA may choose by shape. The bound can hide nothing: the exact level
    compares the bits of the weights themselves. Where sums of a row overflow on both sides, which of its numbers do so depends
    on that order, and only those are compared that are numbers on both.
    """
    finite = np.isfinite(a) & np.isfinite(b)
    same, values, others = finite, a, b
    if not finite.all():
        overflows = ~np.isfinite(a).all(axis=-1) & ~np.isfinite(b).all(axis=-1)
        same = finite | overflows[..., None]
        values, others = np.where(finite, a, 0), np.where(finite, b, 0)
    delta = np.abs(values - others).max(axis=-1, initial=0)
    relative = delta / (np.linalg.norm(values.astype(np.float64), axis=-1) + np.finfo(np.float32).tiny)
    ulp = delta / np.spacing(np.abs(values).max(axis=-1, initial=np.finfo(np.float32).tiny).astype(np.float32))
    unequal = (relative > bound(terms)) | ~same.all(axis=-1)
    return Distance(relative, delta, ulp, unequal, finite.any(axis=-1))
