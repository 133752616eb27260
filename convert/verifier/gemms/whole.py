"""The whole MoE layer: route, permute, gate and up, activation, down, unpermute; a few experts and a few rows at a time.

In: a layer, its router, random tokens. Out: which rows go to which experts, and their sums. It never compares.

The router is the checkpoint's own where it stands under a name that we know, else one of random numbers; it only says who gets
which tokens, and is compared with the other tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import Block
from convert.verifier.gemms.operands import Weights
from convert.verifier.gemms.probes import Setting
from convert.verifier.gemms.routing import Routing, route
from layouts.reader import Reader
from layouts.tensors import numpy_dtype

TOKENS = 16
"""Tokens of a probe."""
MODULES = (".experts", ".switch_mlp", ".switch_glu")
"""The modules of experts beside whose names the router's begin; MLX has its own below the layer's."""
WEIGHTS = tuple(f"{name}.weight" for name in ("gate", "router", "router.gate", "gate.wg", "router.layer", "router.classifier"))
KERNEL = "gate.kernel"
"""MaxText's router, (K, E); in a stack of layers (K, L, E), or (L, K, E) where the layers come first."""
BIASES = ("router.bias",)
_CORRECTION = "e_score_correction_bias"
CORRECTIONS = (
    *(f"{where}{_CORRECTION}" for where in ("gate.", "", "router.", "moe_statics.", "experts.")),
    *("gate.expert_bias", "expert_bias", "router.expert_bias", "gate.bias", "router_bias", "moe.router.expert_bias"),
)
HASHED = "gate.tid2eid"
"""DeepSeek-V4's table of experts for each id: a layer that has it does not choose by the router's scores.

All of these are names beside the experts, without the path to them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Tokens (T, K) and where they go: rows sorted by expert, each a `token` with a `weight`, and their `sizes` (E,).

    A weight multiplies what the expert is given if `on_inputs`, else what it returns.
    """

    x: NDArray[Any]
    token: NDArray[Any]
    weight: NDArray[Any]
    sizes: NDArray[Any]
    router: str
    on_inputs: bool = False


def tokens_for(block: Block, times: int = 1) -> NDArray[Any]:
    """Random tokens (T, K), `times` the usual number."""
    return _tokens(block.experts, block.groups["wi", ""].total("k"), TOKENS * times)


@functools.lru_cache(maxsize=2)
def _tokens(experts: int, k: int, count: int) -> NDArray[Any]:
    """Those of many layers at a time are the same ones, in memory once."""
    return np.random.default_rng([experts, k]).standard_normal((count, k), np.float32)


@functools.partial(jax.jit, static_argnames=("routing",))
def _choose(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None, correction: jax.Array | None, routing: Routing
) -> tuple[jax.Array, jax.Array]:
    """The experts of tokens (T, K) and their weights, by a router's weight (E, K) and bias (E,)."""
    logits = x @ weight.T
    return route(logits if bias is None else logits + bias, routing, correction)


def routed(block: Block, routing: Routing, x: NDArray[Any]) -> Routed:
    """Tokens (T, K), sent to experts by the layer's router."""
    experts, k = block.experts, x.shape[1]
    weight, bias, correction = (None, None, None) if routing.other else _router(block, experts, k)
    own = weight is not None
    drawn = np.random.default_rng(experts).standard_normal((experts, k), np.float32) / np.sqrt(k)
    found = _choose(x, weight if own else drawn, bias, correction, routing=routing)
    chosen, weights = map(np.asarray, found)
    flat = chosen.reshape(-1)
    order = np.argsort(flat, kind="stable")
    return Routed(
        x=x,
        token=order // chosen.shape[1],
        weight=weights.reshape(-1)[order],
        sizes=np.bincount(flat, minlength=experts),
        router="the checkpoint's routers" if own else "random routers",
        on_inputs=routing.on_inputs,
    )


def _router(block: Block, experts: int, k: int) -> tuple[NDArray[Any] | None, ...]:
    """Weight (E, K), bias and correction (E,) of the layer's router, as far as they are there."""
    reader, group = block.reader, block.groups["wi", ""]
    name = group.names[0]
    module = next((word for word in MODULES if word in name), None)
    place = name.partition(module)[0] if module else name.removesuffix(".weight").rpartition(".")[0]
    if f"{place}.{HASHED}" in reader.tensors:
        return None, None, None
    weight = _named(reader, place, WEIGHTS, (experts, k))
    kernel = reader.tensors.get(f"{place}.{KERNEL}")
    scan, layer = [group.sizes[axis] for axis in block.scan], [slice(at, at + 1) for at in block.scan.values()]
    first = 0 if group.placed.pattern.groups[0][0] in block.scan else 1
    if weight is None and kernel and kernel.shape == (*(k,) * first, *scan, *(k,) * (1 - first), experts):
        slices = (*(slice(None),) * first, *layer, *(slice(None),) * (2 - first))
        weight = _values(reader, kernel.name, slices).reshape(k, experts).T
    return weight, *(_named(reader, place, names, (experts,)) for names in (BIASES, CORRECTIONS))


def _named(reader: Reader, place: str, names: tuple[str, ...], shape: tuple[int, ...]) -> NDArray[Any] | None:
    """The first of these tensors, if it has this shape, or this shape after a 1."""
    places = place, place.rpartition(".")[0]  # Kolibri's correction is not beside its experts, but one step above
    paths = (f"{at}.{name}" for at in places for name in names)
    found = next((spec for path in paths if (spec := reader.tensors.get(path))), None)
    if found is None or found.shape not in (shape, (1, *shape)):
        return None
    return _values(reader, found.name, (slice(None),) * len(found.shape)).reshape(shape)


def _values(reader: Reader, name: str, slices: tuple[slice, ...]) -> NDArray[Any]:
    bits = np.ascontiguousarray(reader.read(name, slices))
    return bits.view(numpy_dtype(reader.tensors[name].dtype)).astype(np.float32)


class Piece(NamedTuple):
    """Some of the rows (R, K) that are routed to some experts, how many each has, whose they are, and their weights."""

    x: NDArray[Any]
    sizes: NDArray[Any]
    token: NDArray[Any]
    after: Any

    def add(self, out: NDArray[Any], y: NDArray[Any]) -> None:
        """Add what the experts gave for them, weighed, to the outputs (T, K)."""
        with np.errstate(invalid="ignore"):  # an infinity that nobody asks for: NaN is compared as such
            np.add.at(out, self.token, y * self.after)


def pieces(to: Routed, experts: range, most: int) -> Iterator[Piece]:
    """All rows of these experts, at most so many at a time, and at least one piece."""
    begin = int(to.sizes[: experts.start].sum())
    owner = np.repeat(np.arange(len(experts)), to.sizes[experts.start : experts.stop])
    for start in range(0, max(1, len(owner)), most):
        here = owner[start : start + most]
        rows = slice(begin + start, begin + start + len(here))
        weight = to.weight[rows, None]
        x = to.x[to.token[rows]] * (weight if to.on_inputs else 1)
        yield Piece(x, np.bincount(here, minlength=len(experts)), to.token[rows], 1 if to.on_inputs else weight)


def add_experts(out: NDArray[Any], rest: Iterable[Piece], weights: Weights, setting: Setting, rows: tuple[int, int]) -> None:
    """Run pieces, each in a call of so many rows, so many of an expert at most; add what comes out to the outputs (T, K)."""
    for piece in rest:
        piece.add(out, weights.run(piece.x, piece.sizes, setting.backend, setting.activation, *rows))
