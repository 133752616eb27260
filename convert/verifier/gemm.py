"""Run the weights of two checkpoints through grouped GEMMs, each as its layout is run, and compare the outputs.

A fused `wi` goes through ONE grouped GEMM whose result is cut in halves, as MaxText, tpu-inference and vLLM do; separate
`wi_0` and `wi_1` go through two. Then activation and `wo`. On a CPU `jax.lax.ragged_dot` lowers to a masked dense product, E
times the work; so a few experts are taken at a time, and all of them are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.verifier.logical import Block, operand, pair
from convert.verifier.verdict import Level
from layouts.checkpoint import numpy_dtype

EXPERTS_PER_CALL = 8
GROUP_SIZES = ((1, 0, 5, 2, 0, 3, 1, 0), (0, 4, 0, 0, 1, 0, 0, 2))
"""Rows per expert, in two rounds: every expert has tokens in one of them, some have none in the other, some have one."""


def _halves(h: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = h.shape[-1] // 2
    return h[:, :n], h[:, n:]


def _gmm(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Grouped GEMM: rows (M, K) in groups, one (K, N) matrix of `w` (E, K, N) for each; accumulated in float32."""
    return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)


GMM_UP: Mapping[str, Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]] = {
    "e g k n": lambda x, wi, sizes: (_gmm(x, wi[:, 0], sizes), _gmm(x, wi[:, 1], sizes)),
    "e k (g n)": lambda x, wi, sizes: _halves(_gmm(x, wi, sizes)),
    "e (g n) k": lambda x, wi, sizes: _halves(_gmm(x, jnp.swapaxes(wi, 1, 2), sizes)),
}
"""How each stored form of `wi` is run: rows (M, K) to gate and up, (M, N) each."""
GMM_DOWN: Mapping[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "e n k": _gmm,
    "e k n": lambda h, wo, sizes: _gmm(h, jnp.swapaxes(wo, 1, 2), sizes),
}


@functools.partial(jax.jit, static_argnames=("up_axes", "down_axes"))
def ffn(x: jax.Array, wi: jax.Array, wo: jax.Array, sizes: jax.Array, *, up_axes: str, down_axes: str) -> jax.Array:
    """The expert feed-forward layer, silu(x @ gate) * (x @ up) @ down: (M, K) to (M, K), M routed rows in groups."""
    gate, up = GMM_UP[up_axes](x, wi, sizes)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return GMM_DOWN[down_axes](hidden, wo, sizes)


def compare_outputs(a: Mapping[str, Block], b: Mapping[str, Block]) -> Level:
    """Run every expert of every MoE layer of both checkpoints on the same random rows and compare the outputs."""
    differences: list[str] = []
    worst, forms = 0.0, set()
    skipped = {label for label, block in a.items() if not _can_run(block)}
    for one, other in pair(a, b):
        if one.label in skipped:
            continue
        for experts in _chunks(one.experts):
            form, delta, problems = _compare_chunk(one, other, experts)
            forms.add(form)
            worst = max(worst, delta)
            differences.extend(problems)
    how = " and ".join(sorted(forms)) or "nothing"
    covered = f"grouped GEMM (ragged_dot): {how}; largest difference {worst:.1e} of a row's norm"
    if skipped:
        covered += f"; {len(skipped)} layers of a type that no GEMM here takes were compared by their bits only"
    return Level(name="gemm", covered=covered, differences=tuple(differences))


def _can_run(block: Block) -> bool:
    return block.groups["wi"].dtype in ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")


def _chunks(experts: int) -> Iterator[range]:
    for start in range(0, experts, EXPERTS_PER_CALL):
        yield range(start, min(start + EXPERTS_PER_CALL, experts))


def _compare_chunk(a: Block, b: Block, experts: range) -> tuple[str, float, list[str]]:
    problems, worst = [], 0.0
    k = a.groups["wi"].sizes["k"]
    weights = [_load(block, experts) for block in (a, b)]
    for sizes in GROUP_SIZES:
        groups = np.array(sizes[: len(experts)], np.int32)
        if not groups.sum():
            continue
        x = np.random.default_rng([experts.start, k]).standard_normal((groups.sum(), k)).astype(np.float32)
        one, other = (np.asarray(_run(x, loaded, groups)) for loaded in weights)
        delta, rows = _distance(one, other, k)
        worst = max(worst, delta)
        owners = np.repeat(np.arange(len(groups)), groups)
        for e in sorted({int(owners[row]) for row in rows}):
            problems.append(f"{a.label}, expert {experts.start + e}: outputs of the two layouts differ")
    return " against ".join(f"'{loaded[1]}'" for loaded in weights), worst, problems


Loaded = tuple[jax.Array, str, jax.Array, str]


def _load(block: Block, experts: range) -> Loaded:
    loaded = []
    for role in ("wi", "wo"):
        bits, axes = operand(block, role, experts)
        values = np.ascontiguousarray(bits).view(numpy_dtype(block.groups[role].dtype))
        narrow = values.dtype.itemsize == 1
        loaded += [jnp.asarray(values.astype(np.float32) if narrow else values), axes]
    return tuple(loaded)  # type: ignore[return-value]


def _run(x: Any, loaded: Loaded, groups: Any) -> jax.Array:
    wi, up_axes, wo, down_axes = loaded
    out: jax.Array = ffn(jnp.asarray(x, wi.dtype), wi, wo, jnp.asarray(groups), up_axes=up_axes, down_axes=down_axes)
    return out


def _distance(a: Any, b: Any, k: int) -> tuple[float, set[int]]:
    """The largest difference relative to the row's norm, and the rows where it is more than rounding explains.

    Both accumulate in float32, in an order that XLA may choose by shape; errors grow as the root of the number of terms. The
    bound leaves a factor of 16. It can hide nothing: the exact level compares the bits of the weights themselves.
    """
    finite = np.isfinite(a) & np.isfinite(b)
    same = np.where(finite, True, (np.isnan(a) & np.isnan(b)) | (a == b))
    norm = np.linalg.norm(np.where(finite, a, 0), axis=-1) + np.finfo(np.float32).tiny
    relative = np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)).max(axis=-1) / norm
    rows = (relative > 16 * np.finfo(np.float32).eps * np.sqrt(k)) | ~same.all(axis=-1)
    return float(relative.max(initial=0)), {int(row) for row in np.flatnonzero(rows)}
