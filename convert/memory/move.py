"""Do one change of layout: on the devices where the arrays are, with its derivative, bit for bit.

In: a relay, leaves. Out: what stands in the tree instead. It never changes an array that it is given.

Bits are moved, not numbers: a JAX concatenation of bfloat16 rewrites NaN payloads, one of the same bits as uint16 does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from convert.errors import InputError, PlanError, UsageError
from convert.memory import places
from convert.memory.leaves import Leaf
from convert.memory.relay import Relay

_MANY = 8
"""Results that are compiled together at most."""


def moved(relay: Relay, leaves: Sequence[Leaf], names: Sequence[str]) -> list[Any]:
    """What these leaves become, each in a box like that of the first one.

    Raises:
        PlanError: they are not alike, or of libraries that do not go together.
        InputError: what should be padding holds something else; of traced arrays nobody can say.
    """
    first = leaves[0]
    for number, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        like = number % relay.kinds
        if (one := _words(leaves[like])) != (other := _words(leaf)) or leaf.dtype != first.dtype:
            one, like = (one, like) if one != other else (_words(first), 0)
            raise PlanError(f"experts of one layer must be alike, but {names[like]} is {one} and {name} is {other}")
    leaves = [leaf.taken_over(name) for name, leaf in zip(names, leaves, strict=True)]
    axis_names = None if first.axis_names is None else places.carried(relay, first.axis_names)
    return [first.replaced(array, axis_names) for array in _arrays(relay, leaves, names)]


def _arrays(relay: Relay, leaves: Sequence[Leaf], names: Sequence[str]) -> Sequence[Any]:
    kinds, arrays = {leaf.kind for leaf in leaves}, [leaf.array for leaf in leaves]
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    _check_devices(arrays, names)
    if "torch" in kinds and len(kinds) > 1:
        raise PlanError(f"{names[0]} and its partners are of several libraries ({', '.join(sorted(kinds))}); make them one")
    if "abstract" in kinds:
        made = partial(jax.ShapeDtypeStruct, relay.target.shape, arrays[0].dtype)
        return [made(sharding=places.sharding(relay, arrays[0].sharding)) for _ in range(relay.target.count)]
    if traced and relay.diagonal and relay.holes:
        raise PlanError(
            f"{names[0]} is traced, so that nobody can see whether it is block diagonal; split it outside of jax.jit"
        )
    if relay.holes and not traced and not any(getattr(array, "is_meta", False) for array in arrays):
        _check_padding(relay, arrays, names)
    if "torch" in kinds:
        return _by_torch(relay, arrays)
    if kinds == {"numpy"}:
        return relay(arrays, np)
    kept, typed = _sharding(relay, arrays[0], traced=traced)
    if relay.target.count > _MANY and not traced and not typed:
        one = _compiled_one(relay, kept)
        return [one(arrays, at) for at in range(relay.target.count)]
    found: tuple[Any, ...] = _compiled(relay, kept, typed)(arrays)
    return found


def _sharding(relay: Relay, array: Any, *, traced: bool) -> tuple[Any, bool]:
    """The sharding to give the results, that of the first input: nothing is gathered to one device. And whether it is a type.

    Where axes of the mesh are explicit, a traced array has its sharding as a part of its type; else the compiler finds it.
    """
    kind = jax.typeof(array).sharding
    typed = _is_typed(kind)
    given = kind if traced and typed else None if traced else getattr(array, "sharding", None)
    return places.sharding(relay, given), typed


def _is_typed(sharding: Any) -> bool:
    return any(axis is AxisType.Explicit for axis in sharding.mesh.axis_types)


@lru_cache(maxsize=1024)
def _compiled(relay: Relay, kept: Any, typed: bool) -> Any:
    """One program for all layers that are alike."""
    move = partial(_as_bits, relay)
    if typed:
        return jax.jit(jax.sharding.auto_axes(move, out_sharding=kept))
    return jax.jit(move, out_shardings=kept)


@lru_cache(maxsize=1024)
def _compiled_one(relay: Relay, kept: Any) -> Any:
    """One program for each of many results: one for all of them takes XLA half a minute for 128 experts."""
    return jax.jit(partial(_one_as_bits, relay), out_shardings=kept)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _as_bits(relay: Relay, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Move arrays as unsigned integers. A bitcast has no derivative: JAX would take it for zero, and say nothing."""
    dtype = arrays[0].dtype
    return tuple(_cast(part, dtype) for part in relay([_cast(array, _word(dtype)) for array in arrays], jnp))


def _one_as_bits(relay: Relay, arrays: Sequence[jax.Array], at: int) -> jax.Array:
    """The same of the result at one place of the grid."""
    dtype = arrays[0].dtype
    whole = relay.whole([_cast(array, _word(dtype)) for array in arrays], jnp)
    return _cast(jax.lax.dynamic_index_in_dim(whole, at, keepdims=False), dtype)


def _word(dtype: Any) -> Any:
    """The unsigned integer as wide as a float; other types are moved as they are."""
    return jnp.dtype(f"uint{ml_dtypes.finfo(dtype).bits}") if jnp.issubdtype(dtype, jnp.floating) else dtype  # type: ignore[no-untyped-call]


def _cast(array: jax.Array, dtype: Any) -> jax.Array:
    """The same bits as another type. bfloat16 is put together of bytes that are there.

    Else a CPU takes the integers for what they become, and picks between them as floats of 32 bits: the smallest become zeros.
    """
    if array.dtype == dtype:
        return array
    if dtype == jnp.bfloat16:
        array = jax.lax.optimization_barrier(jax.lax.bitcast_convert_type(array, jnp.uint8))  # type: ignore[no-untyped-call]
    return jax.lax.bitcast_convert_type(array, dtype)


@_as_bits.defjvp
def _tangents(relay: Relay, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Tangents are moved as numbers, which is linear: JAX transposes it for reverse mode, and derives it again."""
    out = _as_bits(relay, *primals)
    if tangents[0][0].dtype == jax.dtypes.float0:
        return out, tuple(np.zeros(part.shape, jax.dtypes.float0) for part in out)
    return out, relay(tangents[0], jnp)


def _check_devices(arrays: Sequence[Any], names: Sequence[str]) -> None:
    """See that arrays are there, and where JAX can compute with all of them; it moves none that somebody placed."""
    placed: dict[frozenset[Any], str] = {}
    for name, array in zip(names, arrays, strict=True):
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            continue
        if array.is_deleted():
            raise UsageError(f"{name} was given up to another call, as donated arrays are; there is no data in it any more")
        if array.committed:
            placed.setdefault(frozenset(array.sharding.device_set), name)
    if len(placed) > 1:
        first, second, *_ = placed.values()
        raise PlanError(f"{first} and {second} lie on different devices; bring them to the same ones with jax.device_put")


def _check_padding(relay: Relay, arrays: Sequence[Any], names: Sequence[str]) -> None:
    for name, array in zip(names, arrays, strict=True):
        typed = isinstance(array, jax.Array) and _is_typed(jax.typeof(array).sharding)
        if bool(_some_behind(relay, array.sharding.mesh)(array) if typed else _some(relay, array)):
            raise InputError(f"{name} should hold {relay.holes}")


def _some(relay: Relay, array: Any) -> Any:
    """Whether there is anything where padding should be."""
    return sum((part != 0).any() for part in relay.behind(array)) > 0


@lru_cache(maxsize=1024)
def _some_behind(relay: Relay, mesh: Any) -> Any:
    """The same of an array whose sharding is a part of its type."""
    everywhere = NamedSharding(mesh, P())  # type: ignore[no-untyped-call]
    return jax.jit(jax.sharding.auto_axes(partial(_some, relay), out_sharding=everywhere))


def _words(leaf: Leaf) -> str:
    box = f" in a {type(leaf.box).__name__}" if leaf.box is not None else ""
    names = f" {leaf.axis_names}" if leaf.axis_names else ""
    return f"{leaf.dtype} {tuple(leaf.array.shape)}{names}{box}"


def _by_torch(relay: Relay, arrays: Sequence[Any]) -> Sequence[Any]:
    """PyTorch moves bits as they are, and derives that; of floats of one byte it knows neither a stack nor a derivative."""
    dtype, small = arrays[0].dtype, arrays[0].dtype.is_floating_point and arrays[0].element_size() == 1
    found = relay([array.view(sys.modules["torch"].uint8) for array in arrays] if small else arrays, _Torch())
    return [array.view(dtype) for array in found] if small else found


class _Torch:
    """The operations in PyTorch's words."""

    @staticmethod
    def transpose(array: Any, axes: Sequence[int], /) -> Any:
        return array.permute(*axes)

    @staticmethod
    def stack(arrays: Sequence[Any], axis: int, /) -> Any:
        return sys.modules["torch"].stack(list(arrays), axis)

    @staticmethod
    def concatenate(arrays: Sequence[Any], axis: int, /) -> Any:
        return sys.modules["torch"].concatenate(list(arrays), axis)

    @staticmethod
    def flip(array: Any, axis: int, /) -> Any:
        return array.flip(axis)

    @staticmethod
    def pad(array: Any, widths: Sequence[tuple[int, int]], /) -> Any:
        padded = array.new_zeros([size + sum(width) for size, width in zip(array.shape, widths, strict=True)])
        padded[tuple(slice(before, before + size) for size, (before, _) in zip(array.shape, widths, strict=True))] = array
        return padded
