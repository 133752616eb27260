"""Fuse and split parameters that are in memory already: for fine-tuning pipelines that hold a pytree of arrays.

In: a pytree of arrays. Out: the same tree with gate and up fused, or separate. It never changes the arrays it is given.

Bits are moved, not numbers: a JAX concatenation of bfloat16 rewrites NaN payloads, one of the same bits as uint16 does not.
Sharded arrays stay sharded: the last axis is left as it is sharded, and the work is done where the data is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
    return jax.jit(_concatenate_bits, out_shardings=_sharding(gate))(gate, up)


def _halves(fused: Any) -> tuple[Any, Any]:
    n = fused.shape[-1] // 2
    if isinstance(fused, np.ndarray):
        return fused[..., :n], fused[..., n:]
    halves: tuple[Any, Any] = jax.jit(_halve_bits, out_shardings=_sharding(fused))(fused)
    return halves


def _sharding(array: Any) -> Any:
    """The sharding to give the result: the input's own, so that nothing is gathered to one device."""
    sharding = getattr(array, "sharding", None)
    return sharding if isinstance(sharding, jax.sharding.NamedSharding) else None


def _concatenate_bits(gate: jax.Array, up: jax.Array) -> jax.Array:
    parts = [jax.lax.bitcast_convert_type(part, _uint(part)) for part in (gate, up)]
    return jax.lax.bitcast_convert_type(jnp.concatenate(parts, axis=-1), gate.dtype)


def _halve_bits(fused: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits, n = jax.lax.bitcast_convert_type(fused, _uint(fused)), fused.shape[-1] // 2
    gate, up = (jax.lax.bitcast_convert_type(part, fused.dtype) for part in (bits[..., :n], bits[..., n:]))
    return gate, up


def _uint(array: jax.Array) -> Any:
    return jnp.dtype(f"uint{8 * array.dtype.itemsize}")
