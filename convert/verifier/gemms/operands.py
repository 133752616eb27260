"""The weights of some experts, read from a checkpoint as a grouped GEMM takes them: as they are stored, where that can be.

In: a layer and some experts. Out: operands on the device. It never compares them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import Block, expert, located, slab
from convert.verifier.bits.stored import Axis, logical
from convert.verifier.gemms.backends import Backend
from convert.verifier.gemms.layer import Arrays, Columns, Form, Read, jitted_read, read
from convert.verifier.gemms.routing import SILU, Activation
from layouts.tensors import bits, numpy_dtype

_ALIGNED = 64
"""Bytes: what XLA wants the address of an array to be a multiple of."""
FLOATS = ("F16", "BF16", "F32", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One role's weights, on the device and as they were read: a matrix for each expert, whose axes `dims` says.

    `paired` are two of these, gate and up in tensors of their own, (2, E, ...) as they were read.
    """

    array: jax.Array | tuple[jax.Array, ...]
    host: NDArray[Any]
    columns: Columns
    rows_first: bool
    dims: tuple[tuple[Axis, ...], ...]
    paired: bool = False

    def projections(self, array: Any, role: str, e: int) -> Sequence[NDArray[Any]]:
        """Expert `e` of an array like this one, in logical axes: gate and up (K, N), or down (N, K)."""
        if self.paired:
            return [logical(np.asarray(array[g])[e], self.dims, role) for g in (0, 1)]
        found = logical(np.asarray(array)[e], self.dims, role)
        return list(found) if role == "wi" else [found]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """`wi`, `wo` and their biases, of some experts of one layer."""

    wi: Operand
    wo: Operand
    biases: tuple[jax.Array | None, jax.Array | None] = (None, None)

    @property
    def arrays(self) -> Arrays:
        """What the layer computes with."""
        assert not isinstance(self.wo.array, tuple)
        return Arrays(self.wi.array, self.wo.array, *self.biases)

    @property
    def experts(self) -> int:
        """How many they are."""
        return len(self.wo.host)

    def form(self, backend: Backend, activation: Activation | None = None, most: int = 0) -> Form:
        """How they are run, with so many rows for an expert `most`."""
        return Form(
            columns=self.wi.columns,
            rows_first=(self.wi.rows_first, self.wo.rows_first),
            activation=activation or SILU,
            gmm=backend.gmm,
            most=most,
        )

    def read(
        self, x: Any, hot: tuple[Any, Any], groups: Any, backend: Backend, activation: Activation | None = None, most: int = 0
    ) -> Read:
        """What rows (M, K) in groups, none of more than `most`, read; it is begun here, and may go on afterwards."""
        call = jitted_read if backend.traced else read
        sizes: Any = np.asarray(groups, np.int32)
        return call(x, hot, self.arrays, sizes, form=self.form(backend, activation, most if max(groups) <= most else 0))

    def run(
        self,
        x: NDArray[Any],
        groups: Any,
        backend: Backend,
        activation: Activation | None = None,
        rows: int = 0,
        most: int = 0,
    ) -> NDArray[Any]:
        """The expert layer's output (M, K) for rows (M, K) in groups, padded to so many that a compiled call is used again."""
        length = max(rows, len(x))
        none = np.full(length, -1, np.int32)
        wide = np.pad(x, ((0, length - len(x)), (0, 0)))
        return np.asarray(self.read(wide, (none, none), groups, backend, activation, most).down)[: len(x)]


def can_run(block: Block) -> bool:
    """Whether both weights are of a type that a GEMM takes."""
    weights = [block.groups.get((role, "")) for role in ("wi", "wo")]
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
    paired = "g" in group.placed.key.slots
    if _stacked(block, role, ""):
        data, dims = slab(block, (role, ""), {}, experts, _aligned)
        dims = dims[1:]
    elif _is_matrix(block, role):
        data, dims = _side_by_side(block, role, experts)
    else:
        data = np.stack([expert(block, (role, ""), e) for e in experts])
        data, paired = (np.moveaxis(data, 1, 0), True) if role == "wi" else (data, False)
        axes = zip("kn" if role == "wi" else "nk", data.shape[-2:], strict=True)
        dims = [[Axis(name=axis, size=size, stored=size, reverse=False)] for axis, size in axes]
    values = _values(data, group.dtype)
    rows_first = dims[1][0].name == ("k" if role == "wi" else "n")
    return Operand(
        array=tuple(map(jax.device_put, values)) if paired else jax.device_put(values),
        host=values,
        columns=_columns(dims[0 if rows_first else 1]),
        rows_first=rows_first,
        dims=tuple(map(tuple, dims)),
        paired=paired,
    )


def _side_by_side(block: Block, role: str, experts: range) -> tuple[NDArray[Any], list[list[Axis]]]:
    """Matrices of tensors of their own, read to where they are wanted: (E, rows, columns), or (2, E, rows, columns)."""
    kind = role, ""
    halves = range(2) if "g" in block.groups[kind].placed.key.slots else range(1)
    first = located(block, kind, {"e": experts.start, "g": 0}, range(1))
    shape = [length for at, length in enumerate(first.lengths) if at not in first.dropped]
    out = _aligned((len(halves), len(experts), *shape), bits(block.groups[kind].dtype))
    for g, e in itertools.product(halves, experts):
        place = out[g, e - experts.start]
        data, _ = slab(block, kind, {"e": e, "g": g}, range(1), lambda shape, _, place=place: place.reshape(shape))  # type: ignore[misc]
        if not np.may_share_memory(data, place):  # it was decoded or computed elsewhere
            place[...] = data
    return (out if len(halves) == 2 else out[0]), first.dims


def _aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory that JAX takes as it is on a CPU; other is copied."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _is_matrix(block: Block, role: str) -> bool:
    """Whether each expert has a tensor of its own, with `k` as one of two dimensions."""
    if "e" not in block.groups[role, ""].placed.key.slots:
        return False
    dims = located(block, (role, ""), {"e": 0, "g": 0}, range(1)).dims
    return len(dims) == 2 and any([axis.name for axis in axes] == ["k"] for axes in dims)


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
            return jnp.asarray(_values(data, group.dtype))
    each = np.stack([expert(block, (role, "bias"), e) for e in experts])
    return jnp.asarray(_values(each.reshape(len(experts), 2, -1) if role == "wi" else each, group.dtype))


def _values(stored: NDArray[Any], code: str) -> NDArray[Any]:
    """Bits as the numbers that they are; in float32 where they have one byte."""
    values = np.ascontiguousarray(stored).view(numpy_dtype(code))
    return values.astype(np.float32) if values.dtype.itemsize == 1 else values
