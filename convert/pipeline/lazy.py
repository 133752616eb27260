"""A leaf that is read when somebody asks for it.

In: what the leaf is to be, and a loader. Out: its array, each time anew. It keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from convert.pipeline.kinds import Kind
from convert.pipeline.load import Loader


@dataclass(frozen=True, slots=True, eq=False)
class Lazy:
    """A leaf of `load(..., lazy=True)`: what `jax.ShapeDtypeStruct` says of an array, and the array when it is asked for."""

    _kind: Kind
    _loader: Loader

    @property
    def shape(self) -> tuple[int, ...]:
        """As the array's."""
        return self._kind.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """As the array's."""
        return self._kind.dtype

    @property
    def ndim(self) -> int:
        """As the array's."""
        return len(self.shape)

    @property
    def sharding(self) -> Sharding | None:
        """As it was asked for."""
        return self._kind.sharding

    def load(self) -> jax.Array:
        """Read it. Nothing is kept: who asks twice reads twice.

        Raises:
            InputError: its data cannot be read.
        """
        return self._loader.leaf(self._kind)

    def __jax_array__(self) -> jax.Array:
        return self.load()

    def __repr__(self) -> str:
        return f"Lazy({self._kind.name}, {self.dtype}{list(self.shape)})"
