"""The weights of some experts, read from a checkpoint as a grouped GEMM takes them: as they are stored, where that can be.

In: a layer and some experts. Out: operands on the device. It never compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import Block, expert, slab
from convert.verifier.bits.stored import Axis, logical
from convert.verifier.gemms.backends import Backend
from convert.verifier.gemms.layer import Arrays, Columns, Form, ffn, jitted
from convert.verifier.gemms.routing import SILU, Activation
from layouts.tensors import numpy_dtype

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """`wi`, `wo` and their biases, of some experts of one layer."""

    wi: Operand
    wo: Operand
    biases: tuple[jax.Array | None, jax.Array | None] = (None, None)

    @property
    def arrays(self) -> Arrays:
        """What the layer computes with."""
        return Arrays(self.wi.array, self.wo.array, *self.biases)

    def form(self, backend: Backend, activation: Activation | None = None) -> Form:
        """How they are run."""
        return Form(
            columns=self.wi.columns,
            rows_first=(self.wi.rows_first, self.wo.rows_first),
            activation=activation or SILU,
            gmm=backend.gmm,
        )

    def run(self, x: Any, groups: Any, backend: Backend, activation: Activation | None = None) -> NDArray[Any]:
        """The expert layer's output (M, K) for rows (M, K) in groups."""
        call = jitted if backend.traced else ffn
        rows = jnp.asarray(x, self.wi.array.dtype)
        return np.asarray(call(rows, self.arrays, jnp.asarray(groups, jnp.int32), form=self.form(backend, activation)))


def can_run(block: Block) -> bool:
    """Whether both weights are of a type that a GEMM takes."""
    weights = [block.weight(role) for role in ("wi", "wo")]
    return all(group is not None and group.dtype in FLOATS for group in weights)


def form_of(block: Block) -> str:
    """How `wi` is run, in words."""
    group = block.groups["wi", ""]
    return "e g k n" if {"e", "g"} & set(group.placed.key.slots) else group.placed.pattern.text


def load(block: Block, experts: range) -> Weights:
    """All that the layer computes with: weights as they are stored, or single matrices side by side, and biases."""
    wi, wo = (_operand(block, role, experts) for role in ("wi", "wo"))
    return Weights(wi=wi, wo=wo, biases=(_bias(block, "wi", experts, wi), _bias(block, "wo", experts, wo)))


def _operand(block: Block, role: str, experts: range) -> Operand:
    group = block.groups[role, ""]
    if not _stacked(block, role, ""):
        each = np.stack([expert(block, (role, ""), e) for e in experts])
        each = np.moveaxis(each, 1, 0) if role == "wi" else each
        columns: Columns = (("n", each.shape[-1], each.shape[-1], False),)
        return Operand(array=_array(each, group.dtype), columns=columns, rows_first=False, dims=None)
    data, dims = slab(block, (role, ""), {}, experts)
    rows_first = dims[2][0].name == ("k" if role == "wi" else "n")
    return Operand(
        array=_array(data, group.dtype),
        columns=_columns(dims[1] if rows_first else dims[2]),
        rows_first=rows_first,
        dims=tuple(map(tuple, dims)),
    )


def _stacked(block: Block, role: str, part: str) -> bool:
    """Whether a tensor holds all experts, along a dimension of their own that comes first."""
    placed = block.groups[role, part].placed
    pattern = placed.pattern
    count = 3 if not part else 2
    rest = [axes for axes in pattern.groups if axes[0] not in block.scan]
    return "g" not in placed.key.slots and len(rest) == count and rest[0] == ("e",)


def _columns(dimension: list[Axis]) -> Columns:
    return tuple((axis.name, axis.size, axis.stored, axis.reverse) for axis in dimension)


def _bias(block: Block, role: str, experts: range, weight: Operand) -> jax.Array | None:
    """As it is stored where its columns are those of the weight, as a kernel adds it; else in logical axes."""
    group = block.groups.get((role, "bias"))
    if group is None:
        return None
    if role == "wi" and _stacked(block, role, "bias"):
        data, dims = slab(block, (role, "bias"), {}, experts)
        if _columns(dims[1]) == weight.columns:
            return _array(data, group.dtype)
    each = np.stack([expert(block, (role, "bias"), e) for e in experts])
    return _array(each.reshape(len(experts), 2, -1) if role == "wi" else each, group.dtype)


def _array(bits: Any, code: str) -> jax.Array:
    values = np.ascontiguousarray(bits).view(numpy_dtype(code))
    return jnp.asarray(values.astype(np.float32) if values.dtype.itemsize == 1 else values)
