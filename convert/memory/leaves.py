"""What counts as an array in a tree of parameters, and the boxes that arrays stand in.

In: a node of a tree. Out: `Leaf`, or None for what is no array. It imports no library that the caller has not imported.

Boxes are Flax's: `nnx.Variable` (`nnx.Param`), and `nn.Partitioned` and its kin, which know the logical name of each dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from convert.errors import PlanError

_NAMES = ("out_sharding", "sharding_names", "sharding", "names")
"""Where a box has the logical axis names of its array, one per dimension."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """An array, and the box that it stands in, if it does."""

    array: Any
    box: Any = None

    @property
    def kind(self) -> str:
        """What moves it: `abstract` (shapes alone), `torch`, `numpy` or `jax`, which takes over what else speaks DLPack."""
        if isinstance(self.array, jax.ShapeDtypeStruct):
            return "abstract"
        if isinstance(self.array, (np.ndarray, jax.Array)):
            return "numpy" if isinstance(self.array, np.ndarray) else "jax"
        return "torch" if _is_tensor(self.array) else "dlpack"

    @property
    def dtype(self) -> str:
        """The name of the element type, the same whichever library holds the array."""
        return str(self.array.dtype).rpartition(".")[2]

    def taken_over(self, name: str) -> Leaf:
        """The same in JAX's hands, without a copy, where it is of a library that we do not know and that speaks DLPack.

        Raises:
            PlanError: JAX cannot.
        """
        if self.kind != "dlpack":
            return self
        try:
            array = jax.dlpack.from_dlpack(self.array)
        except Exception as error:
            raise PlanError(f"{name}: JAX cannot take over a {type(self.array).__qualname__} by DLPack: {error}") from error
        if str(array.dtype) != self.dtype:
            raise PlanError(f"{name} is {self.dtype}, which JAX takes for {array.dtype}; make an array of NumPy or JAX of it")
        return Leaf(array=array, box=self.box)

    @property
    def axis_names(self) -> tuple[Any, ...] | None:
        """The logical name of each dimension, where the box knows them."""
        return next((tuple(value) for word, value in self._said.items() if _is_names(word, value)), None)

    def replaced(self, array: Any, axis_names: tuple[Any, ...] | None) -> Any:
        """A box like this one around another array; the array itself where there is no box."""
        if self.box is None:
            return array
        said = {word: _like(value, axis_names) for word, value in self._said.items() if axis_names and _is_names(word, value)}
        if _is_variable(self.box):
            return self.box.replace(array, **said)
        return self.box.replace(value=array, **said)

    @property
    def _said(self) -> dict[str, Any]:
        if self.box is None:
            return {}
        return dict(self.box.get_metadata() if _is_variable(self.box) else vars(self.box))


def leaf_of(node: Any) -> Leaf | None:
    """The array that a node is, or holds as its box."""
    if _is_variable(node):
        value = node.get_value() if hasattr(node, "get_value") else node.value
        return Leaf(array=value, box=node) if _is_array(value) else None
    if _is_boxed(node):
        return Leaf(array=node.value, box=node) if _is_array(node.value) else None
    return Leaf(array=node) if _is_array(node) else None


def is_module(node: Any) -> bool:
    """Whether a node is one of `flax.nnx`, whose attributes are its children."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, getattr(nnx, "Pytree", None) or nnx.Module)


def _is_array(node: Any) -> bool:
    if isinstance(node, (np.ndarray, jax.Array, jax.ShapeDtypeStruct)) or _is_tensor(node):
        return True
    return not isinstance(node, type) and all(
        hasattr(node, word) for word in ("__dlpack__", "__dlpack_device__", "shape", "dtype")
    )


def _is_tensor(node: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(node, torch.Tensor)


def _is_variable(node: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable)


def _is_boxed(node: Any) -> bool:
    meta = sys.modules.get("flax.core.meta")
    return meta is not None and isinstance(node, meta.AxisMetadata) and hasattr(node, "value")


def _is_names(word: str, value: Any) -> bool:
    return word in _NAMES and isinstance(value, (tuple, list, jax.sharding.PartitionSpec))


def _like(value: Any, names: Sequence[Any]) -> Any:
    return type(value)(*names) if isinstance(value, jax.sharding.PartitionSpec) else type(value)(names)
