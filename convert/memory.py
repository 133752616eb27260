"""Fuse and split parameters that are in memory already: for fine-tuning pipelines that hold a pytree of arrays.

In: a pytree of arrays. Out: the same tree with gate and up fused, or separate. It never changes the arrays it is given.

Bits are moved, not numbers: a JAX concatenation of bfloat16 rewrites NaN payloads, one of the same bits as uint16 does not.
Sharded arrays stay sharded: the last axis is left as it is sharded, and the work is done where the data is.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert.errors import PlanError

GATE, UP, FUSED = "wi_0", "wi_1", "wi"
PARTS = ("", "_scale")
"""The ends of the names of what is fused: weights, and MaxText's block scales (E, ..., K / block, N / block)."""


def fuse(params: Any) -> Any:
    """Replace sibling arrays `wi_0`, `wi_1` (E, ..., K, N) by `wi` (E, ..., K, 2N), gate first, wherever they stand.

    Block scales `wi_0_scale`, `wi_1_scale` beside them become `wi_scale`; biases stay apart, as MaxText declares them.
    Mappings, lists and tuples are rebuilt (mappings as `dict`), every other leaf is passed on as the same object.

    Raises:
        PlanError: no such siblings, or a pair that differs in shape or element type.
    """
    fused, count = _walk(params, _fuse_pair, ())
    if not count:
        raise PlanError(f"no arrays {GATE} and {UP} of rank 3 or more stand side by side in these parameters")
    return fused


def unfuse(params: Any) -> Any:
    """The inverse of `fuse`.

    Raises:
        PlanError: no array `wi` of rank 3 or more, or one whose last dimension is odd.
    """
    split, count = _walk(params, _split_one, ())
    if not count:
        raise PlanError(f"no array {FUSED} of rank 3 or more stands in these parameters")
    return split


def _walk(node: Any, change: Any, path: tuple[str, ...]) -> tuple[Any, int]:
    if isinstance(node, Mapping):
        here, count = change(dict(node), path)
        inner = {key: _walk(child, change, (*path, str(key))) for key, child in here.items()}
        return {key: child for key, (child, _) in inner.items()}, count + sum(n for _, n in inner.values())
    if isinstance(node, list | tuple):
        items = [_walk(child, change, (*path, str(i))) for i, child in enumerate(node)]
        children = [child for child, _ in items]
        rebuild: Any = type(node)  # a named tuple, such as an optax state, takes its fields one by one
        return rebuild(*children) if hasattr(node, "_fields") else rebuild(children), sum(n for _, n in items)
    return node, 0


def _fuse_pair(node: dict[str, Any], path: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    if not (_is_expert(node.get(GATE)) or _is_expert(node.get(UP))):
        return node, 0
    for end in PARTS:
        node = _fused(node, end, ".".join(path)) if f"{GATE}{end}" in node or f"{UP}{end}" in node else node
    return node, 1


def _fused(node: dict[str, Any], end: str, where: str) -> dict[str, Any]:
    one, other, both = (f"{name}{end}" for name in (GATE, UP, FUSED))
    gate, up = node.get(one), node.get(other)
    if both in node or not (_is_expert(gate) and _is_expert(up)):
        raise PlanError(f"{where}: expected arrays {one} and {other} of rank 3 or more and no {both}, found {sorted(node)}")
    if (gate.shape, gate.dtype) != (up.shape, up.dtype):  # type: ignore[union-attr]
        raise PlanError(f"{where}: {one} is {gate.dtype} {gate.shape}, {other} is {up.dtype} {up.shape}")  # type: ignore[union-attr]
    fused = _concatenate(gate, up)
    return {both if key == one else key: fused if key == one else v for key, v in node.items() if key != other}


def _split_one(node: dict[str, Any], path: tuple[str, ...]) -> tuple[dict[str, Any], int]:
    if not _is_expert(node.get(FUSED)):
        return node, 0
    for end in PARTS:
        node = _halved(node, end, ".".join(path)) if f"{FUSED}{end}" in node else node
    return node, 1


def _halved(node: dict[str, Any], end: str, where: str) -> dict[str, Any]:
    one, other, both = (f"{name}{end}" for name in (GATE, UP, FUSED))
    fused = node[both]
    if not _is_expert(fused) or fused.shape[-1] % 2 or one in node or other in node:
        shape = getattr(fused, "shape", None)
        raise PlanError(f"{where}: {both} has shape {shape} beside {sorted(node)}; it cannot be split")
    gate, up = _halves(fused)
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= {one: gate, other: up} if key == both else {key: value}
    return out


def _is_expert(leaf: Any) -> bool:
    return isinstance(leaf, (np.ndarray, jax.Array)) and leaf.ndim >= 3


def _concatenate(gate: Any, up: Any) -> Any:
    if isinstance(gate, np.ndarray) and isinstance(up, np.ndarray):
        return np.concatenate((gate, up), axis=-1)
    return _moved(_joined, (gate, up))[0]


def _halves(fused: Any) -> tuple[Any, Any]:
    if isinstance(fused, np.ndarray):
        n = fused.shape[-1] // 2
        return fused[..., :n], fused[..., n:]
    gate, up = _moved(_halved_columns, (fused,))
    return gate, up


def _moved(how: Any, arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Move arrays in one compiled step; the results are sharded as the first array is, so that nothing is gathered."""
    sharding = None if isinstance(arrays[0], jax.core.Tracer) else getattr(arrays[0], "sharding", None)
    kept = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    moved: tuple[Any, ...] = jax.jit(_as_bits, static_argnums=0, out_shardings=kept)(how, arrays)
    return moved


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _as_bits(how: Any, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Move arrays as unsigned integers. A bitcast has no derivative: JAX would take it for zero, and say nothing."""
    dtype = arrays[0].dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        return tuple(how(arrays))
    word = jnp.dtype(f"uint{ml_dtypes.finfo(dtype).bits}")
    parts = how(tuple(jax.lax.bitcast_convert_type(array, word) for array in arrays))
    return tuple(jax.lax.bitcast_convert_type(part, dtype) for part in parts)


@_as_bits.defjvp
def _tangents(how: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Tangents are moved as numbers, which is linear: JAX transposes it for reverse mode, and derives it again."""
    out = _as_bits(how, *primals)
    if tangents[0][0].dtype == jax.dtypes.float0:
        return out, tuple(np.zeros(part.shape, jax.dtypes.float0) for part in out)
    return out, tuple(how(*tangents))


def _joined(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    return (jnp.concatenate(arrays, axis=-1),)


def _halved_columns(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (fused,), n = arrays, arrays[0].shape[-1] // 2
    return fused[..., :n], fused[..., n:]
