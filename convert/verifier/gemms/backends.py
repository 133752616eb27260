"""The grouped GEMMs that people run, behind one signature.

In: rows, weights, sizes of groups. Out: products. It never reads a checkpoint.

- `ragged_dot`: `jax.lax.ragged_dot`, what MaxText and most JAX programs call. On a CPU JAX makes a masked dense product of
  it, which multiplies each row with all experts and copies all weights; there most calls go `by_group`, as a device does.
- `megablox`: the Pallas kernel for TPUs that ships with JAX; elsewhere in Pallas's interpreter.
- `tokamax`: OpenXLA's tuned kernels, if installed.
- `moegemm`: no kernel, but how CUTLASS MoEGEMM finds its operands: one base pointer, a stride from expert to expert, B in the
  order of memory. It shows that the bytes lie where that kernel looks for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from convert.errors import UsageError, did_you_mean

Gmm = Callable[..., jax.Array]
"""`gmm(x, w, sizes, rows_first, most)`: rows (M, K) sorted by group, a matrix (K, C) of `w` for each group; (M, C), float32.

`w` is (E, K, C), or (E, C, K) if its rows come first. Rows behind the last group come out as anything. No group has more than
`most` rows, unless that is 0: then nobody knows.
"""
_TILE = 8
"""Rows of a tile of megablox: the least that TPUs take, and the fewest wasted here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A grouped GEMM by its name in the tables, and whether JAX traces it (jit, gradients, meshes)."""

    name: str
    gmm: Gmm
    traced: bool = True


def ragged_dot(x: jax.Array, w: jax.Array, sizes: jax.Array, rows_first: bool, most: int = 0) -> jax.Array:
    """`jax.lax.ragged_dot`, accumulated in float32; on a CPU `by_group`, where `most` is known."""
    if keeps_apart(ragged_dot, most):
        return by_group(x, w, sizes, rows_first, most)
    matrix = jnp.swapaxes(w, 1, 2) if rows_first else w
    return jax.lax.ragged_dot(x, matrix, sizes, preferred_element_type=jnp.float32)


def keeps_apart(gmm: Gmm, most: int) -> bool:
    """Whether that runs `by_group`, where nothing of an expert, were it infinite, reaches the rows of another."""
    return gmm is ragged_dot and most > 0 and jax.default_backend() == "cpu"


def by_group(x: jax.Array, w: jax.Array, sizes: jax.Array, rows_first: bool, most: int) -> jax.Array:
    """The same, each group's rows beside one another and one product for each group, over the weights as they are stored."""
    starts = jnp.cumsum(sizes) - sizes
    rows = x.at[starts[:, None] + jnp.arange(most)].get(mode="clip")
    contracted = ((2,), (2 if rows_first else 1,)), ((0,), (0,))
    out = jax.lax.dot_general(rows, w, contracted, preferred_element_type=jnp.float32)
    own = owners(sizes, len(x))
    return out.at[own, jnp.arange(len(x)) - starts[own]].get(mode="clip")


def owners(sizes: jax.Array, rows: int) -> jax.Array:
    """The expert (M,) that each row belongs to; rows behind the last group get the last."""
    return jnp.repeat(jnp.arange(len(sizes)), sizes, total_repeat_length=rows)


def megablox(x: jax.Array, w: jax.Array, sizes: jax.Array, rows_first: bool, most: int = 0) -> jax.Array:  # noqa: ARG001
    """Pallas's `gmm`; rows are padded to whole tiles, and the tiles are as wide as the matrices where nobody is in a hurry."""
    from jax.experimental.pallas.ops.tpu.megablox.ops import gmm

    rows, width = x.shape
    interpret = jax.default_backend() != "tpu"
    columns = w.shape[1] if rows_first else w.shape[2]
    tiling = (_TILE, width, columns) if interpret else (_TILE, 128, 128)
    padded = jnp.pad(x, ((0, -rows % _TILE), (0, 0)))
    out = gmm(padded, w, sizes, jnp.float32, tiling, None, None, rows_first, interpret)
    return jnp.asarray(out[:rows])


def tokamax(x: jax.Array, w: jax.Array, sizes: jax.Array, rows_first: bool, most: int = 0) -> jax.Array:  # noqa: ARG001
    """`tokamax.ragged_dot`, which chooses among its kernels and XLA's by the device."""
    import tokamax as library
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["convert"])  # else it would parse our command line as its own
    matrix = jnp.swapaxes(w, 1, 2) if rows_first else w
    return jnp.asarray(library.ragged_dot(x, matrix, sizes, preferred_element_type=jnp.float32))


def moegemm(x: Any, w: Any, sizes: Any, rows_first: bool, most: int = 0) -> jax.Array:  # noqa: ARG001
    """Each expert's operands by address alone: rows of A from the sum of the sizes before, B from base + e * stride.

    Source: Intel's CUTLASS fork, pull request 520: all B contiguous, N x K column-major per expert, one base pointer.
    """
    memory = np.ascontiguousarray(w).reshape(-1)
    columns, depth = w.shape[1:] if rows_first else w.shape[:0:-1]
    steps = (1, depth) if rows_first else (columns, 1)
    a, out = np.asarray(x, np.float32), np.zeros((len(x), columns), np.float32)
    start = 0
    for e, rows in enumerate(np.asarray(sizes)):
        base = memory[e * depth * columns :]
        b: NDArray[Any] = as_strided(base, (depth, columns), [memory.itemsize * step for step in steps], writeable=False)
        values = b.astype(np.float32)
        values[np.abs(values) < np.finfo(np.float32).tiny] = 0  # as XLA takes them
        out[start : start + rows] = a[start : start + rows] @ values
        start += rows
    return jnp.asarray(out)


BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(name="ragged_dot", gmm=ragged_dot),
        Backend(name="megablox", gmm=megablox),
        Backend(name="tokamax", gmm=tokamax),
        Backend(name="moegemm", gmm=moegemm, traced=False),
    )
}
DEFAULT = "ragged_dot"
ALL = "all"


def choose(name: str) -> tuple[tuple[Backend, ...], tuple[str, ...]]:
    """The backends of this name, and why others of `all` are left out.

    Raises:
        UsageError: there is none of this name, or it cannot run here.
    """
    if name == ALL:
        missing = {each: why for each in BACKENDS if (why := _missing(each))}
        return tuple(b for b in BACKENDS.values() if b.name not in missing), tuple(missing.values())
    if name not in BACKENDS:
        raise UsageError(f"no backend is called {name!r}{did_you_mean(name, BACKENDS)}; known: {', '.join(BACKENDS)}, {ALL}")
    if why := _missing(name):
        raise UsageError(why)
    return (BACKENDS[name],), ()


@functools.cache
def _missing(name: str) -> str | None:
    """Why a backend cannot run here: it is not installed, or fails at two experts of two columns."""
    if name == "tokamax" and find_spec("tokamax") is None:
        return "backend tokamax is not installed: pip install tokamax"
    backend = BACKENDS[name]
    gmm = jax.jit(backend.gmm, static_argnums=3) if backend.traced else backend.gmm
    x, w, sizes = np.ones((3, 4), np.float32), np.ones((2, 4, 2), np.float32), np.array([1, 2], np.int32)
    try:
        good = bool((np.asarray(gmm(x, w, sizes, False)) == 4).all())
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"backend {name} cannot run here: {text}"
    return None if good else f"backend {name} computes something else than x @ w here"
