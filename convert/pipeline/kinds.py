"""What each leaf is to be: its shape, its element type, and which device holds which part.

In: the targets of a plan, and what a caller says of shardings and types. Out: `Kind` for each leaf. It never reads data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

from convert.errors import UsageError
from convert.memory import tree
from convert.planning.targets import Target
from layouts.tensors import numpy_dtype

_FLOATS = ("F64", "F32", "F16", "BF16")
"""Element types that one type for all is for: others are counts, masks, or parts of a quantised value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One leaf. Without a sharding it lies where JAX puts arrays that nobody places."""

    name: str
    target: Target
    dtype: np.dtype[Any]
    sharding: Sharding | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape of the target."""
        return self.target.spec.shape

    @property
    def nbytes(self) -> int:
        """Bytes that are read for this process's devices, each once."""
        width = numpy_dtype(self.target.spec.dtype).itemsize
        return width * sum(_size(index) for index, _ in self.blocks())

    @property
    def widest(self) -> int:
        """Bytes that an element takes on the host: as it is stored, and as it is wanted if that differs."""
        stored = numpy_dtype(self.target.spec.dtype)
        return stored.itemsize + (0 if stored == self.dtype else self.dtype.itemsize)

    def blocks(self) -> list[tuple[tuple[slice, ...], list[Any]]]:
        """The parts of the leaf, and the devices of this process that hold each."""
        if self.sharding is None:
            return [(tuple(slice(0, size) for size in self.shape), [None])]
        found: dict[tuple[tuple[int, int], ...], list[Any]] = {}
        for device, index in self.sharding.addressable_devices_indices_map(self.shape).items():
            spans = (range(*part.indices(size)) for part, size in zip(index or (), self.shape, strict=True))
            found.setdefault(tuple((span.start, span.stop) for span in spans), []).append(device)
        return [(tuple(slice(*span) for span in spans), devices) for spans, devices in found.items()]

    def converted(self, block: NDArray[Any]) -> NDArray[Any]:
        """Bits in the element type that is wanted; rounded to the nearest, ties to even, where that is another one."""
        found = block.view(numpy_dtype(self.target.spec.dtype))
        return found if found.dtype == self.dtype else found.astype(self.dtype)

    def joined(self, blocks: Mapping[Any, jax.Array]) -> jax.Array:
        """The array that these parts are."""
        if self.sharding is None:
            return blocks[None]
        arrays = [blocks[device] for device in self.sharding.addressable_devices_indices_map(self.shape)]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


def kinds_of(targets: Mapping[str, Target], sharding: Any, dtype: Any) -> dict[str, Kind]:
    """A kind for each leaf by name.

    Raises:
        UsageError: a sharding that does not fit or is missing, or an element type that is none or that JAX cannot hold here.
    """
    shardings, types = _shardings(sharding), _types(dtype)
    found = {}
    for name, target in targets.items():
        kind = Kind(name=name, target=target, dtype=types(name, target), sharding=shardings(name, target.spec.shape))
        if jax.dtypes.canonicalize_dtype(kind.dtype) != kind.dtype:
            raise UsageError(
                f"{name} is {kind.dtype}, which JAX would narrow: set jax_enable_x64, or give a dtype for it "
                f"(dtype=lambda name, dtype: ...)"
            )
        try:
            kind.blocks()
        except ValueError as error:
            raise UsageError(f"sharding: {name} {target.spec.shape} cannot be cut so: {error}") from None
        found[name] = kind
    return found


def _shardings(said: Any) -> Callable[[str, tuple[int, ...]], Sharding | None]:
    """How to find the sharding of a leaf."""
    if said is None or isinstance(said, Sharding):
        return lambda name, shape: said  # noqa: ARG005
    if callable(said):
        return lambda name, shape: _checked(name, said(name, shape))
    if not isinstance(said, Mapping):
        raise UsageError(f"sharding: a {type(said).__name__} is neither a Sharding, nor a tree or a function of these")
    nodes = {name.partition(".")[2]: each.node for name, each in tree.flatten(said).items()}

    def find(name: str, _: tuple[int, ...]) -> Sharding | None:
        if name not in nodes:
            raise UsageError(f"sharding: the tree has nothing for {name}; it has {', '.join(list(nodes)[:3]) or 'nothing'}")
        return _checked(name, nodes[name])

    return find


def _checked(name: str, found: Any) -> Sharding | None:
    found = found if isinstance(found, Sharding) else getattr(found, "sharding", found)
    if found is not None and not isinstance(found, Sharding):
        raise UsageError(f"sharding: that of {name} is a {type(found).__name__}; make a jax.sharding.NamedSharding of it")
    return found


def _types(said: Any) -> Callable[[str, Target], np.dtype[Any]]:
    """How to find the element type of a leaf."""

    def find(name: str, target: Target) -> np.dtype[Any]:
        stored = numpy_dtype(target.spec.dtype)
        if said is None or (not _is_function(said) and target.spec.dtype not in _FLOATS):
            return stored
        return _dtype(said(name, stored) if _is_function(said) else said)

    return find


def _is_function(said: Any) -> bool:
    """Types are called as well, to make scalars."""
    return callable(said) and not isinstance(said, type) and not hasattr(said, "dtype")


def _dtype(said: Any) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = jax.numpy.dtype(said)
        return found
    except TypeError:
        raise UsageError(f"dtype: {said!r} is no element type; give one such as 'bfloat16' or jax.numpy.float32") from None


def _size(index: tuple[slice, ...]) -> int:
    return int(np.prod([part.stop - part.start for part in index], dtype=np.int64))
