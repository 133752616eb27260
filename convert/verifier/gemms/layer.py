"""The expert layer as a kernel runs it, in the form in which its weights are stored.

In: rows and the weights of experts. Out: their outputs. It never reads a checkpoint.

A fused `wi` goes through ONE grouped GEMM, whose result is cut as its layout says: in halves (MaxText, vLLM), column by column
where gate and up take turns, and in halves of each tensor-parallel shard (tpu-inference), shard after shard. Separate `wi_0`
and `wi_1` go through two. Then activation and `wo`, to whose rows a padded result is trimmed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from convert.verifier.gemms.backends import Gmm, owners, ragged_dot
from convert.verifier.gemms.routing import SILU, Activation

Columns = tuple[tuple[str, int, int, bool], ...]
"""How the columns of a GEMM's result are composed: name, real size, stored size and direction of each axis, outermost first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What is the same for all experts of a layer: how `wi` and `wo` are stored, and what they are run with."""

    columns: Columns
    rows_first: tuple[bool, bool] = (False, False)
    activation: Activation = SILU
    gmm: Gmm = ragged_dot
    most: int = 0
    """Rows of an expert at most; 0 where nobody knows."""


class Arrays(NamedTuple):
    """The weights of some experts, in a form.

    `wi` is (E, K, C) or, rows first, (E, C, K), whose C columns hold gate and up as the form says; or two of these, if its
    columns say nothing of `g` (in one array, XLA would turn them four times as slowly). `wo` is (E, N, K) or (E, K, N). A bias
    of `wi` is (E, C), or (E, 2, N) in logical axes; that of `wo` is (E, K).
    """

    wi: jax.Array | tuple[jax.Array, ...]
    wo: jax.Array
    wi_bias: jax.Array | None = None
    wo_bias: jax.Array | None = None

    @property
    def fused(self) -> jax.Array:
        """`wi`, where it is one array."""
        assert not isinstance(self.wi, tuple)
        return self.wi


def ffn(x: jax.Array, arrays: Arrays, sizes: jax.Array, form: Form) -> jax.Array:
    """`activation(x @ gate, x @ up) @ down` of rows (M, K) in groups, one for each expert; (M, K), float32."""
    rows = x.astype(arrays.wo.dtype)
    parts = [_one(rows, part, sizes, how) for part, how in shards(arrays, form)]
    return functools.reduce(jnp.add, parts)[:, : x.shape[1]]


def _one(x: jax.Array, arrays: Arrays, sizes: jax.Array, form: Form) -> jax.Array:
    gate, up = gmm_up(x, arrays.wi, sizes, form, arrays.wi_bias)
    hidden = form.activation(gate, up).astype(x.dtype)
    return gmm_down(hidden, arrays.wo, sizes, form, arrays.wo_bias)


class Read(NamedTuple):
    """What rows read: gate and up (M, N), and what the layer returns (M, K); float32."""

    gate: jax.Array
    up: jax.Array
    down: jax.Array


def read(x: jax.Array, hot: tuple[jax.Array, jax.Array], arrays: Arrays, sizes: jax.Array, form: Form) -> Read:
    """The expert layer for rows (M, K) in groups, some of which only read weights.

    Where `hot[0]` (M,) is no -1, the row is one-hot there, and so is its hidden row at `hot[1]`: its gate, up and output are
    rows of the weights. Biases are not added to these.
    """
    plain = hot[0] < 0
    x = jnp.where(plain[:, None], x, jax.nn.one_hot(hot[0], x.shape[1])).astype(arrays.wo.dtype)
    gates: list[jax.Array] = []
    ups: list[jax.Array] = []
    out, start = jnp.float32(0), 0
    for part, how in shards(arrays, form):
        gate, up = gmm_up(x, part.wi, sizes, how, part.wi_bias, plain)
        reading = jax.nn.one_hot(hot[1] - start, gate.shape[1])
        hidden = jnp.where(plain[:, None], form.activation(gate, up), reading).astype(x.dtype)
        out = out + gmm_down(hidden, part.wo, sizes, how, part.wo_bias, plain)
        gates, ups, start = [*gates, gate], [*ups, up], start + gate.shape[1]
    return Read(jnp.concatenate(gates, 1), jnp.concatenate(ups, 1), out[:, : x.shape[1]])


jitted_read = functools.partial(jax.jit, static_argnames=("form",))(read)
"""`read`, compiled for each form and shape."""


def shards(arrays: Arrays, form: Form) -> Iterator[tuple[Arrays, Form]]:
    """Each tensor-parallel shard's slice, as a device of its own would hold it; their results add up to the layer's."""
    name, count, *_ = form.columns[0]
    if name != "s":
        yield arrays, form
        return
    wi = jnp.split(arrays.fused, count, axis=1 if form.rows_first[0] else 2)
    wo = jnp.split(arrays.wo, count, axis=2 if form.rows_first[1] else 1)
    biases = jnp.split(arrays.wi_bias, count, axis=-1) if arrays.wi_bias is not None else [None] * count
    for at in range(count):
        down = arrays.wo_bias if at == 0 else None  # once, as where the shards' results are added up
        yield Arrays(wi[at], wo[at], biases[at], down), replace(form, columns=form.columns[1:])


def gmm_up(
    x: jax.Array,
    wi: jax.Array | tuple[jax.Array, ...],
    sizes: jax.Array,
    form: Form,
    bias: jax.Array | None = None,
    plain: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gate and up (M, N) of rows (M, K): one GEMM over a fused `wi`, two over separate ones; biases for `plain` rows."""
    first = form.rows_first[0]
    each = wi if isinstance(wi, tuple) else (wi,)
    wide = _pad(x, each[0].shape[2 if first else 1])
    own = _own(bias, sizes, len(x), plain)
    if not isinstance(wi, tuple):
        both = form.gmm(wide, wi, sizes, first, form.most)
        gate, up = cut(both + own if own is not None and own.ndim == both.ndim else both, form.columns)
    else:
        gate, up = (cut(form.gmm(wide, one, sizes, first, form.most), form.columns)[0] for one in each)
    if own is not None and own.ndim > gate.ndim:
        gate, up = gate + own[:, 0], up + own[:, 1]
    return gate, up


def gmm_down(
    hidden: jax.Array,
    wo: jax.Array,
    sizes: jax.Array,
    form: Form,
    bias: jax.Array | None = None,
    plain: jax.Array | None = None,
) -> jax.Array:
    """The down projection (M, K) of rows (M, N); biases for `plain` rows."""
    first = form.rows_first[1]
    out = form.gmm(_pad(hidden, wo.shape[-1] if first else wo.shape[-2]), wo, sizes, first, form.most)
    own = _own(bias, sizes, len(hidden), plain)
    return out if own is None else out + own


def _own(bias: jax.Array | None, sizes: jax.Array, rows: int, plain: jax.Array | None) -> jax.Array | None:
    """The bias of each row's expert, none for rows that are not `plain`."""
    if bias is None:
        return None
    own = bias[owners(sizes, rows)]
    return own if plain is None else jnp.where(plain.reshape(-1, *[1] * (own.ndim - 1)), own, 0)


def _pad(x: jax.Array, width: int) -> jax.Array:
    """With zeros behind, as wide as a padded weight wants it."""
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1])))


def cut(h: jax.Array, columns: Columns) -> Sequence[jax.Array]:
    """Gate and up (M, N), from the columns of one GEMM; padding falls away."""
    names = [name for name, *_ in columns]
    h = h.reshape(h.shape[0], *(stored for _, _, stored, _ in columns))
    if any(name == "c" and stored > size for name, size, stored, _ in columns):  # padded before it was cut into chunks
        h = jnp.moveaxis(h, 1 + names.index("c"), names.index("n"))
        h = h.reshape(*h.shape[: names.index("n")], -1, *h.shape[names.index("n") + 2 :])
        columns = tuple(column for column in columns if column[0] != "c")
        names = [name for name, *_ in columns]
    for at, (_, size, _, reverse) in enumerate(columns, start=1):
        h = jax.lax.slice_in_dim(h, 0, size, axis=at)
        h = jnp.flip(h, at) if reverse else h
    order = [name for name in ("g", "s", "c", "n") if name in names]
    h = jnp.transpose(h, (0, *(1 + names.index(name) for name in order)))
    parts = jnp.moveaxis(h, 1, 0) if "g" in names else h[None]
    return [part.reshape(part.shape[0], -1) for part in parts]
