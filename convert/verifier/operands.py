"""The weights of some experts as a grouped GEMM takes them, and the expert layer itself in each form.

A fused `wi` goes through ONE grouped GEMM, whose result is cut as its layout says: in halves (MaxText, vLLM), in halves of each
tensor-parallel shard (tpu-inference), column by column where gate and up take turns. Separate `wi_0` and `wi_1` go through two.
Then activation and `wo`, to whose rows a padded result is trimmed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from convert.verifier.logical import Block, expert, slab
from convert.verifier.stored import Axis, logical
from layouts.checkpoint import numpy_dtype

Columns = tuple[tuple[str, int, int, bool], ...]
"""How the columns of a GEMM's result are composed: name, real size, stored size and direction of each axis, outermost first."""
FLOATS = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One role's weights: stored as they are if `dims` says how, else one matrix for each expert (and projection)."""

    array: jax.Array
    columns: Columns
    rows_first: bool
    dims: tuple[tuple[Axis, ...], ...] | None

    def logical(self, array: Any, role: str, e: int) -> NDArray[Any]:
        """Expert `e` of an array like this one, in logical axes: `wi` (2, K, N), `wo` (N, K)."""
        if self.dims is None:
            return np.asarray(array[:, e] if role == "wi" else array[e])
        return logical(np.asarray(array[e]), self.dims[1:], role)


Weights = tuple[Operand, Operand]
"""`wi` and `wo` of some experts."""


def can_run(block: Block) -> bool:
    """Whether both weights are of a type that a GEMM takes."""
    weights = [block.weight(role) for role in ("wi", "wo")]
    return all(group is not None and group.dtype in FLOATS for group in weights)


def form(block: Block) -> str:
    """How `wi` is run, in words."""
    group = block.groups["wi", ""]
    return "e g k n" if {"e", "g"} & set(group.placed.key.slots) else group.placed.pattern.text


def load(block: Block, experts: range, *, wide: bool = False) -> Weights:
    """Both weights as a GEMM takes them: as they are stored, or single matrices side by side; `wide` makes them float32."""
    return _operand(block, "wi", experts, wide), _operand(block, "wo", experts, wide)


def _operand(block: Block, role: str, experts: range, wide: bool) -> Operand:
    group = block.groups[role, ""]
    pattern = group.placed.pattern
    stacked = "e" in pattern.axes and "g" not in group.placed.key.slots and len(pattern.tokens) - len(block.scan) == 3
    if not stacked or pattern.groups[0] != ("e",):
        each = np.stack([expert(block, (role, ""), e) for e in experts])
        each = np.moveaxis(each, 1, 0) if role == "wi" else each
        columns: Columns = (("n", each.shape[-1], each.shape[-1], False),)
        return Operand(array=_array(each, group.dtype, wide), columns=columns, rows_first=False, dims=None)
    data, dims = slab(block, (role, ""), {}, experts)
    rows_first = dims[2][0].name == ("k" if role == "wi" else "n")
    given = dims[1] if rows_first else dims[2]
    return Operand(
        array=_array(data, group.dtype, wide),
        columns=tuple((a.name, a.size, a.stored, a.reverse) for a in given),
        rows_first=rows_first,
        dims=tuple(map(tuple, dims)),
    )


def _array(bits: Any, code: str, wide: bool) -> jax.Array:
    values = np.ascontiguousarray(bits).view(numpy_dtype(code))
    return jnp.asarray(values.astype(np.float32) if wide or values.dtype.itemsize == 1 else values)


def run(x: Any, weights: Weights, groups: Any) -> jax.Array:
    """The expert feed-forward layer, silu(x @ gate) * (x @ up) @ down: (M, K) to (M, K), M routed rows in groups."""
    wi, wo = weights
    rows = jnp.asarray(x, wi.array.dtype)
    out: jax.Array = ffn(
        rows, wi.array, wo.array, jnp.asarray(groups), columns=wi.columns, first=(wi.rows_first, wo.rows_first)
    )
    return out


@functools.partial(jax.jit, static_argnames=("columns", "first"))
def ffn(
    x: jax.Array, wi: jax.Array, wo: jax.Array, sizes: jax.Array, *, columns: Columns, first: tuple[bool, bool]
) -> jax.Array:
    """See `run`. `wi` is one tensor (E, K, C), or (E, C, K) if its rows come `first`, whose C columns hold gate and up as
    `columns` says; or, if these say nothing of `g`, two of them (2, E, K, C).
    """  # noqa: D205
    gate, up = gmm_up(x, wi, sizes, columns=columns, rows_first=first[0])
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    return gmm_down(hidden, wo, sizes, rows_first=first[1])[:, : x.shape[1]]


def gmm_up(x: jax.Array, wi: jax.Array, sizes: jax.Array, *, columns: Columns, rows_first: bool) -> tuple[jax.Array, jax.Array]:
    """Gate and up (M, N) of rows (M, K): one grouped GEMM over a fused `wi`, two over separate ones."""
    wide = _pad(x, wi.shape[-1] if rows_first else wi.shape[-2])
    if any(name == "g" for name, *_ in columns):
        gate, up = _cut(_gmm(wide, wi, sizes, rows_first), columns)
    else:
        gate, up = (_cut(_gmm(wide, one, sizes, rows_first), columns)[0] for one in wi)
    return gate, up


def gmm_down(hidden: jax.Array, wo: jax.Array, sizes: jax.Array, *, rows_first: bool) -> jax.Array:
    """The down projection (M, K) of rows (M, N)."""
    return _gmm(_pad(hidden, wo.shape[-1] if rows_first else wo.shape[-2]), wo, sizes, rows_first)


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
