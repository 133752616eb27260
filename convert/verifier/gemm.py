"""Run the weights of two checkpoints through grouped GEMMs, each as its layout is run, and compare the outputs.

A fused `wi` goes through ONE grouped GEMM, whose result is cut as its layout says: in halves (MaxText, vLLM), in halves of each
tensor-parallel shard (tpu-inference), column by column where gate and up take turns. Separate `wi_0` and `wi_1` go through two.
Then activation and `wo`, to whose rows a padded result is trimmed. On a CPU `jax.lax.ragged_dot` lowers to a masked dense
product, E times the work; so a few experts are taken at a time, and all of them are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.verifier.logical import Block, expert, pair, slab
from convert.verifier.stored import Axis
from convert.verifier.verdict import Level
from layouts.checkpoint import numpy_dtype

EXPERTS_PER_CALL = 8
GROUP_SIZES = ((1, 0, 5, 2, 0, 3, 1, 0), (0, 4, 0, 0, 1, 0, 0, 2))
"""Rows per expert, in two rounds: every expert has tokens in one of them, some have none in the other, some have one."""
Columns = tuple[tuple[str, int, int, bool], ...]
"""How the columns of a GEMM's result are composed: name, real size, stored size and direction of each axis, outermost first."""


@functools.partial(jax.jit, static_argnames=("columns", "rows_first", "wo_rows_first"))
def ffn(
    x: jax.Array, wi: jax.Array, wo: jax.Array, sizes: jax.Array, *, columns: Columns, rows_first: bool, wo_rows_first: bool
) -> jax.Array:
    """The expert feed-forward layer, silu(x @ gate) * (x @ up) @ down: (M, K) to (M, K), M routed rows in groups.

    `wi` is one tensor (E, K, C), or (E, C, K) if `rows_first`, whose C columns hold gate and up as `columns` says; or, if these
    say nothing of `g`, two of them (2, E, K, C).
    """
    k = x.shape[1]
    wide = _pad(x, wi.shape[-1] if rows_first else wi.shape[-2])
    if any(name == "g" for name, *_ in columns):
        gate, up = _cut(_gmm(wide, wi, sizes, rows_first), columns)
    else:
        gate, up = (_cut(_gmm(wide, one, sizes, rows_first), columns)[0] for one in wi)
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    down = _gmm(_pad(hidden, wo.shape[-1] if wo_rows_first else wo.shape[-2]), wo, sizes, wo_rows_first)
    return down[:, :k]


def _gmm(x: jax.Array, w: jax.Array, sizes: jax.Array, rows_first: bool) -> jax.Array:
    """Grouped GEMM: rows (M, K) in groups, one (K, N) matrix of `w` for each group; accumulated in float32."""
    matrix = jnp.swapaxes(w, 1, 2) if rows_first else w
    return jax.lax.ragged_dot(x, matrix, sizes, preferred_element_type=jnp.float32)


def _pad(x: jax.Array, width: int) -> jax.Array:
    """With zeros behind, as wide as a padded weight wants it."""
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))


def _cut(h: jax.Array, columns: Columns) -> Sequence[jax.Array]:
    """Gate and up (M, N), from the columns of one GEMM; padding falls away."""
    names = [name for name, *_ in columns]
    h = h.reshape(h.shape[0], *(stored for _, _, stored, _ in columns))
    for at, (_, size, _, reverse) in enumerate(columns, start=1):
        h = jax.lax.slice_in_dim(h, 0, size, axis=at)
        h = jnp.flip(h, at) if reverse else h
    order = [name for name in ("g", "s", "c", "n") if name in names]
    h = jnp.transpose(h, (0, *(1 + names.index(name) for name in order)))
    parts = jnp.moveaxis(h, 1, 0) if "g" in names else h[None]
    return [part.reshape(part.shape[0], -1) for part in parts]


def compare_outputs(a: Mapping[str, Block], b: Mapping[str, Block]) -> Level:
    """Run every expert of every MoE layer of both checkpoints on the same random rows and compare the outputs."""
    differences: list[str] = []
    worst, forms, skipped = 0.0, set(), 0
    for one, other in pair(a, b):
        if not _can_run(one) or not _can_run(other):
            skipped += 1
            continue
        forms.add(f"'{_form(one)}' against '{_form(other)}'")
        for experts in _chunks(one.experts):
            delta, problems = _compare_chunk(one, other, experts)
            worst = max(worst, delta)
            differences.extend(problems)
    how = " and ".join(sorted(forms)) or "nothing"
    covered = f"grouped GEMM (ragged_dot): {how}; largest difference {worst:.1e} of a row's norm"
    if skipped:
        covered += f"; {skipped} layers of a type that no GEMM here takes were compared by their bits only"
    return Level(name="gemm", covered=covered, differences=tuple(differences))


def _form(block: Block) -> str:
    group = block.groups["wi", ""]
    return "e g k n" if {"e", "g"} & set(group.placed.key.slots) else group.placed.pattern.text


def _can_run(block: Block) -> bool:
    weights = [block.weight(role) for role in ("wi", "wo")]
    return all(group is not None and group.dtype in ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2") for group in weights)


def _chunks(experts: int) -> Iterator[range]:
    for start in range(0, experts, EXPERTS_PER_CALL):
        yield range(start, min(start + EXPERTS_PER_CALL, experts))


def _compare_chunk(a: Block, b: Block, experts: range) -> tuple[float, list[str]]:
    problems, worst = [], 0.0
    k = a.groups["wi", ""].sizes["k"]
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
    return worst, problems


Loaded = tuple[jax.Array, Columns, bool, jax.Array, bool]


def _load(block: Block, experts: range) -> Loaded:
    """Both weights as a GEMM takes them: as they are stored, or single matrices side by side."""
    wi, columns, rows_first = _operand(block, "wi", experts)
    wo, _, wo_rows_first = _operand(block, "wo", experts)
    return wi, columns, rows_first, wo, wo_rows_first


def _operand(block: Block, role: str, experts: range) -> tuple[jax.Array, Columns, bool]:
    group = block.groups[role, ""]
    pattern = group.placed.pattern
    stacked = "e" in pattern.axes and "g" not in group.placed.key.slots and len(pattern.tokens) - len(block.scan) == 3
    if not stacked or pattern.groups[0] != ("e",):
        each = np.stack([expert(block, (role, ""), e) for e in experts])
        if role == "wi":
            each = np.moveaxis(each, 1, 0)
        size = each.shape[-1]
        return _array(each, group.dtype), (("n", size, size, False),), False
    data, dims = slab(block, (role, ""), {}, experts)
    contracted = "k" if role == "wi" else "n"
    rows_first = dims[2][0].name == contracted
    given: list[Axis] = dims[1] if rows_first else dims[2]
    return _array(data, group.dtype), tuple((a.name, a.size, a.stored, a.reverse) for a in given), rows_first


def _array(bits: Any, code: str) -> jax.Array:
    values = np.ascontiguousarray(bits).view(numpy_dtype(code))
    return jnp.asarray(values.astype(np.float32) if values.dtype.itemsize == 1 else values)


def _run(x: Any, loaded: Loaded, groups: Any) -> jax.Array:
    wi, columns, rows_first, wo, wo_rows_first = loaded
    rows = jnp.asarray(x, wi.dtype)
    out: jax.Array = ffn(rows, wi, wo, jnp.asarray(groups), columns=columns, rows_first=rows_first, wo_rows_first=wo_rows_first)
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
