"""The expert layer on many devices: experts on one axis of a mesh, columns of `wi` and rows of `wo` on the other.

In: rows, weights, a mesh of devices. Out: outputs. It never reads a checkpoint.

A fused `wi` can be cut across its columns only where each device's slice holds gate and up of the same columns: that is what
the `per-shard` layout is for. Any other is cut into gate and up first, and those across the devices, as MaxText does it under
jit. Every device runs its own experts on its own rows; the results are added up (`psum`).
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from convert.errors import UsageError
from convert.verifier.gemms.backends import Backend
from convert.verifier.gemms.layer import Arrays, Form, cut, ffn
from convert.verifier.gemms.operands import Weights
from convert.verifier.gemms.routing import Activation

EXPERT, MODEL = "expert", "model"


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh of this many devices along `expert` and `model`; on a CPU they are simulated.

    Raises:
        UsageError: an axis of another name, or too few devices.
    """
    if unknown := sizes.keys() - {EXPERT, MODEL}:
        raise UsageError(f"a mesh has the axes {EXPERT} and {MODEL}; found {', '.join(sorted(unknown))}")
    shape = sizes.get(EXPERT, 1), sizes.get(MODEL, 1)
    count = math.prod(shape)
    try:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)  # type: ignore[no-untyped-call]
    except RuntimeError:
        pass  # JAX has begun already, with the devices that it has
    devices = jax.local_devices()  # of several processes, each runs its own layers on its own devices
    if (have := len(devices)) < count:
        raise UsageError(f"{count} devices, but JAX has begun with {have}; set jax_num_cpu_devices before its first use")
    return Mesh(np.array(devices[:count]).reshape(shape), (EXPERT, MODEL))


def why_not(mesh: Mesh, experts: int, n: int) -> str | None:
    """Why a layer cannot be cut along a mesh, if so."""
    ways, across = mesh.shape[EXPERT], mesh.shape[MODEL]
    if experts % ways:
        return f"{experts} experts do not divide by {ways}"
    return f"{n} columns do not divide by {across}" if n % across else None


def run(x: Any, weights: Weights, sizes: Any, mesh: Mesh, backend: Backend, activation: Activation) -> NDArray[Any]:
    """The expert layer's output (M, K) for rows (M, K) in groups, on a mesh."""
    arrays, form = _divisible(weights, mesh, weights.form(backend, activation))
    specs = _specs(arrays, form)
    placed = jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), arrays, specs)
    rows, groups = jnp.asarray(x, arrays.wo.dtype), jnp.asarray(sizes, jnp.int32)
    across = form.columns[0][2] // mesh.shape[MODEL] if form.columns[0][0] == "s" else 0
    local = replace(form, columns=(("s", across, across, False), *form.columns[1:])) if across else _narrow(form, mesh)

    return np.asarray(_call(mesh, specs, local)(rows, placed, groups))


@functools.cache
def _call(mesh: Mesh, specs: Arrays, form: Form) -> Callable[[jax.Array, Arrays, jax.Array], jax.Array]:
    """The layer on all devices, compiled once for each form."""

    def device(rows: jax.Array, arrays: Arrays, groups: jax.Array) -> jax.Array:
        out = _own(rows, arrays, groups, form, mesh.shape[EXPERT])
        total: jax.Array = jax.lax.psum(out, (EXPERT, MODEL))  # type: ignore[no-untyped-call]
        return total

    everywhere = jax.shard_map(device, mesh=mesh, in_specs=(_spec(), specs, _spec()), out_specs=_spec(), check_vma=False)
    return jax.jit(everywhere)


def _own(rows: jax.Array, arrays: Arrays, groups: jax.Array, form: Form, ways: int) -> jax.Array:
    """What one device adds to the result: its experts' rows are turned to the front, run, and turned back."""
    each = len(groups) // ways
    first = jax.lax.axis_index(EXPERT) * each
    own = jax.lax.dynamic_slice_in_dim(groups, first, each)
    offset = (jnp.cumsum(groups) - groups)[first]
    if arrays.wo_bias is not None:  # once, not on every device that holds a slice of `wo`
        arrays = arrays._replace(wo_bias=jnp.where(jax.lax.axis_index(MODEL) == 0, arrays.wo_bias, 0))
    out = ffn(jnp.roll(rows, -offset, axis=0), arrays, own, form)
    mine = jnp.arange(len(rows))[:, None] < own.sum()
    return jnp.roll(jnp.where(mine, out, 0), offset, axis=0)


def _divisible(weights: Weights, mesh: Mesh, form: Form) -> tuple[Arrays, Form]:
    """The weights in a form whose columns can be cut along the mesh: as they are, or gate and up apart."""
    name, count, *_ = form.columns[0]
    arrays = weights.arrays
    n = math.prod(size for axis, size, *_ in form.columns if axis != "g")
    if not (name == "s" and count % mesh.shape[MODEL] == 0) and any(axis == "g" for axis, *_ in form.columns):
        matrix = jnp.swapaxes(arrays.fused, 1, 2) if form.rows_first[0] else arrays.fused
        flat = matrix.reshape(-1, matrix.shape[-1])
        parts = [part.reshape(*matrix.shape[:2], -1) for part in cut(flat, form.columns)]
        arrays = arrays._replace(wi=tuple(parts))
        if arrays.wi_bias is not None and arrays.wi_bias.ndim == 2:
            arrays = arrays._replace(wi_bias=jnp.stack(cut(arrays.wi_bias, form.columns), axis=1))
        form = replace(form, columns=(("n", n, n, False),), rows_first=(False, form.rows_first[1]))
    wo = arrays.wo[:, :, :n] if form.rows_first[1] else arrays.wo[:, :n]  # without the rows that only pad it
    return arrays._replace(wo=wo), form


def _narrow(form: Form, mesh: Mesh) -> Form:
    """The form of one device's slice of gate and up."""
    _, n, *_ = form.columns[0]
    n //= mesh.shape[MODEL]
    return replace(form, columns=(("n", n, n, False),))


def _specs(arrays: Arrays, form: Form) -> Arrays:
    """How each array lies on the mesh."""
    wi = _spec(*((EXPERT, MODEL, None) if form.rows_first[0] else (EXPERT, None, MODEL)))
    wo = (EXPERT, None, MODEL) if form.rows_first[1] else (EXPERT, MODEL, None)
    bias = None if arrays.wi_bias is None else _spec(EXPERT, *[None] * (arrays.wi_bias.ndim - 2), MODEL)
    both = (wi, wi) if isinstance(arrays.wi, tuple) else wi
    return Arrays(both, _spec(*wo), bias, None if arrays.wo_bias is None else _spec(EXPERT, None))


def _spec(*axes: str | None) -> Any:
    return P(*axes)  # type: ignore[no-untyped-call]
