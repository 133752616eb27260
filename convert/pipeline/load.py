"""A checkpoint straight onto devices, each of which reads its own bytes.

In: an open checkpoint, a plan, shardings. Out: arrays. It holds no tensor as a whole that no device holds as a whole.

Where a device is the host's own memory, blocks are read into the memory that JAX then takes over, so that nothing is copied.
Else as many bytes are on their way as `memory` allows, and a larger block goes to its device in parts.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from convert.engine.budget import Budget, make_budget
from convert.engine.copying import Worker
from convert.engine.regions import fill
from convert.errors import UsageError
from convert.options import Running
from convert.pipeline.kinds import Kind
from convert.planning.planner import Plan
from convert.progress import Progress, stoppable
from layouts.reader import Reader, held_by, is_chunked
from layouts.tensors import bits

_ALIGNED = 64
"""Bytes: JAX takes over memory that begins at a multiple."""
Index = tuple[slice, ...]
Device = Any
"""A `jax.Device`; None is where JAX puts what nobody places."""


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Loader:
    """Reads leaves within a budget. A block above `limit` bytes goes in parts to a device with memory of its own."""

    reader: Reader
    budget: Budget
    limit: int
    _own: threading.local = field(default_factory=threading.local)

    @classmethod
    def make(cls, plan: Plan, reader: Reader, running: Running) -> Loader:
        """One that stays within `memory`: three quarters are for workers and what they decode, the rest for blocks.

        Raises:
            UsageError: it is too little.
        """
        most = running.memory * 3 // 4
        try:
            if is_chunked(reader):
                from convert.orbax.budget import reading_budget

                budget = reading_budget(most, running.jobs, plan, reader)
            else:
                budget = make_budget(most, running.jobs, len(reader.tensors) + len(plan.targets), each=held_by(reader))
        except UsageError as error:
            raise UsageError(f"{error}; give a third more, as a quarter is for blocks on their way to devices") from None
        return cls(reader=reader, budget=budget, limit=(running.memory - budget.peak) // budget.jobs)

    def leaves(self, kinds: Mapping[str, Kind], progress: Progress) -> dict[str, jax.Array]:
        """All of these, read by as many workers as there are.

        Raises:
            InputError: data of the input cannot be read.
        """
        stop = threading.Event()
        told = stoppable(progress, stop)
        found: dict[str, dict[Device, jax.Array]] = {name: {} for name in kinds}
        with ThreadPoolExecutor(self.budget.jobs) as pool:
            try:
                work: dict[Future[list[jax.Array]], tuple[str, list[Device]]] = {}
                for name, kind in kinds.items():
                    for index, devices in kind.blocks():
                        work[pool.submit(self._block, kind, index, devices, told)] = name, devices
                for done in as_completed(work):
                    name, devices = work.pop(done)
                    found[name] |= zip(devices, done.result(), strict=True)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return {name: kind.joined(found[name]) for name, kind in kinds.items()}

    def leaf(self, kind: Kind) -> jax.Array:
        """One leaf, read by the thread that asks."""
        blocks: dict[Device, jax.Array] = {}
        for index, devices in kind.blocks():
            blocks |= zip(devices, self._block(kind, index, devices, lambda _: None), strict=True)
        return kind.joined(blocks)

    def _block(self, kind: Kind, index: Index, devices: Sequence[Device], told: Callable[[int], None]) -> list[jax.Array]:
        """What these devices hold of a leaf, which is the same for all."""
        shape = [part.stop - part.start for part in index]
        if math.prod(shape) * kind.widest <= self.limit or all(map(_is_host, devices)):
            block = self._read(kind, index, told)
            return jax.block_until_ready([_put(block, device) for device in devices])  # type: ignore[no-untyped-call, no-any-return]
        made = [_empty(tuple(shape), kind.dtype, device) for device in devices]
        for part in _parts(index, max(1, self.limit // kind.widest)):
            block = self._read(kind, part, told)
            start = [here.start - whole.start for here, whole in zip(part, index, strict=True)]
            made = [_with(array, jax.device_put(block, device), start) for array, device in zip(made, devices, strict=True)]
            jax.block_until_ready(made)  # type: ignore[no-untyped-call]
        return made

    def _read(self, kind: Kind, index: Index, told: Callable[[int], None]) -> NDArray[Any]:
        """A block on the host, in the element type that is wanted."""
        if not hasattr(self._own, "worker"):
            self._own.worker = Worker.make(self.reader, self.budget.strip)
        out = _aligned([part.stop - part.start for part in index], bits(kind.target.spec.dtype))
        fill(kind.target, index, out, self._own.worker, told)
        return kind.converted(out)


def _aligned(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _is_host(device: Device) -> bool:
    return bool((device.platform if device else jax.default_backend()) == "cpu")


def _put(block: NDArray[Any], device: Device) -> jax.Array:
    found: jax.Array = jax.device_put(block, device) if device else jax.device_put(block)
    return found


def _empty(shape: tuple[int, ...], dtype: np.dtype[Any], device: Device) -> jax.Array:
    return jnp.zeros(shape, dtype, device=device)


def _parts(index: Index, limit: int) -> Iterator[Index]:
    """A block cut into parts of at most `limit` elements, along outer dimensions first."""
    lengths = [part.stop - part.start for part in index]
    if math.prod(lengths) <= limit:
        yield index
        return
    at = next(i for i, length in enumerate(lengths) if length > 1)
    whole, step = index[at], max(1, limit // math.prod(lengths[at + 1 :]))
    for start in range(whole.start, whole.stop, step):
        yield from _parts((*index[:at], slice(start, min(start + step, whole.stop)), *index[at + 1 :]), limit)


def _with(whole: jax.Array, part: jax.Array, start: Sequence[int]) -> jax.Array:
    found: jax.Array = _updated()(whole, part, start)
    return found


@cache
def _updated() -> Any:
    """Puts a part into its place: in the same memory, and bit by bit, because JAX rewrites NaN payloads of small floats."""

    @partial(jax.jit, donate_argnums=0)
    def updated(whole: jax.Array, part: jax.Array, start: Sequence[int]) -> jax.Array:
        dtype = whole.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            word = jnp.dtype(f"uint{8 * dtype.itemsize}")
            whole, part = (jax.lax.bitcast_convert_type(array, word) for array in (whole, part))
        whole = jax.lax.dynamic_update_slice(whole, part, start)
        return whole if whole.dtype == dtype else jax.lax.bitcast_convert_type(whole, dtype)

    return updated
