"""A trainer's tree as a server holds it: one pure function, planned once from the shapes of both.

In: two trees of shapes, and how the second one is made of the first. Out: a function of trees that can be jitted. It copies no
value to the host, and never guesses which leaf becomes which.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np

from convert.errors import PlanError
from convert.memory import tree
from convert.memory.leaves import Leaf, leaf_of
from convert.memory.move import moved
from convert.memory.plan import Tree, spec_of
from convert.memory.relay import Relay, rendered, side_of
from convert.options import Choices
from convert.pipeline.request import Names, Request, request
from convert.planning.targets import Target
from layouts.language.sections import TENSOR
from layouts.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """The leaves that become others, by the names of the trees; by no relay if they stay where they are."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    relay: Relay | None
    factor: float | None = None
    """By what values are multiplied, in float32, rounded once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Sync:
    """Turns a tree of the first kind into one of the second: pure, and the same for every transformation of JAX."""

    _moves: tuple[_Move, ...]
    _like: Any
    _names: tuple[str, ...]

    def __call__(self, params: Any) -> Any:
        """The second tree, in the containers, boxes, element types and shardings of its spec.

        Raises:
            PlanError: the tree is not as its spec said.
        """
        found = _leaves_of(params)
        made: dict[str, Any] = {}
        for move in self._moves:
            if lost := next((name for name in move.sources if name not in found), None):
                raise PlanError(f"{lost} is not in the tree, which should be as it was when this was planned")
            leaves = [Leaf(array=found[name].array) for name in move.sources]
            arrays = moved(move.relay, leaves, move.sources) if move.relay else [leaves[0].array]
            made |= zip(move.targets, _times(arrays, move.factor), strict=True)
        nodes, structure = jax.tree.flatten(self._like, is_leaf=_is_leaf)
        filled = [_held_as(node, made[name]) for node, name in zip(nodes, self._names, strict=True)]
        return jax.tree.unflatten(structure, filled)

    def jitted(self, *, donate: bool = False) -> Callable[[Any], Any]:
        """The same as one compiled program; with `donate`, the first tree is given up as the second one is made."""
        shardings = jax.tree.map(lambda spec: spec.sharding, self._like)
        compiled = jax.jit(self, donate_argnums=0 if donate else (), out_shardings=shardings)

        def run(params: Any) -> Any:
            with warnings.catch_warnings():  # what has no leaf of its shape is freed by us, where JAX would warn and keep it
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")
                made = compiled(params)
            if donate:
                jax.block_until_ready(made)  # type: ignore[no-untyped-call]
                for array in jax.tree.leaves(params):
                    if isinstance(array, jax.Array) and not array.is_deleted():
                        array.delete()
            return made

        return run


def plan_sync(
    source: Any,
    target: Any,
    *,
    layout: str | None,
    names: Names,
    config: Mapping[str, Any],
    hf: bool,
    cast_types: bool,
    choices: Choices,
) -> Sync:
    """Plan it; see `convert.sync_plan` for what it raises."""
    held = _leaves_of(source)
    tensors = {name: spec_of(name, leaf) for name, leaf in held.items()}
    reader = Tree(tensors=tensors, format="hf" if hf else "orbax", record=None, config=config)
    asked = request(cast(Reader, reader), layout, names, choices)
    if asked.plan.exact:
        raise PlanError(f"sync_plan does not compute {asked.plan.computed}; convert or save a checkpoint, and load it")
    moves = tuple(_moves(asked))
    wanted = _leaves_of(target)
    _check(asked, wanted, held, moves, cast_types=cast_types)
    paths = jax.tree_util.tree_flatten_with_path(target, is_leaf=_is_leaf)[0]
    return Sync(
        _moves=moves,
        _like=jax.tree.map(_as_spec, target, is_leaf=_is_leaf),
        _names=tuple(tree.dotted(path) for path, _ in paths),
    )


def _leaves_of(root: Any) -> dict[str, Leaf]:
    found = {name.partition(".")[2]: each for name, each in tree.flatten(root).items()}
    if odd := next((name for name, each in found.items() if each.leaf is None and not each.is_empty), None):
        raise PlanError(f"{odd} is a {type(found[odd].node).__name__} and no array; leave it out of the tree")
    return {name: each.leaf for name, each in found.items() if each.leaf is not None}


def _moves(asked: Request) -> Iterator[_Move]:
    """The targets that are made of the same sources, together."""
    groups: dict[Any, list[Target]] = {}
    for each in asked.plan.targets:
        block = frozenset((slot, at) for slot, at in each.index.items() if slot not in _grid(each))
        groups.setdefault((each.source, each.target, each.spec.name if not each.moved else block), []).append(each)
    for targets in groups.values():
        first = targets[0]
        if not first.moved:
            yield _Move(sources=(first.spec.name,), targets=(asked.names[first.spec.name],), relay=None)
            continue
        grid = _grid(first)
        source, target = side_of(first.source, first.source_sizes, grid), side_of(first.target, first.sizes, grid)
        yield _Move(
            sources=rendered(first.source.key, first.index, dict(source.sizes)),
            targets=tuple(asked.names[name] for name in rendered(first.target.key, first.index, dict(target.sizes))),
            relay=Relay(
                source=source,
                target=target,
                diagonal=first.way.diagonal,
                turns=first.way.turns,
                tensor=int(first.index[TENSOR]) if TENSOR in first.index else None,
            ),
            factor=asked.plan.values.factors.get(first.first_source),
        )


def _times(arrays: Sequence[Any], factor: float | None) -> Sequence[Any]:
    """As a conversion computes them (`layouts.computing`)."""
    if factor is None:
        return arrays
    return [(array.astype(np.float32) * np.float32(factor)).astype(array.dtype) for array in arrays]


def _grid(target: Target) -> set[str]:
    """The axes that one layout has in its shape, the other one maybe in its names; and which tensor, if all become one."""
    return {*target.source.pattern.axes, *target.target.pattern.axes, *({TENSOR} & {*target.source.key.slots})}


def _check(
    asked: Request, wanted: Mapping[str, Leaf], held: Mapping[str, Leaf], moves: Sequence[_Move], *, cast_types: bool
) -> None:
    """See that what is made is what is wanted, leaf by leaf.

    Raises:
        PlanError: it is not.
    """
    shapes = {asked.names[each.spec.name]: each.spec.shape for each in asked.plan.targets}
    types = {name: held[move.sources[0]].dtype for move in moves for name in move.targets}
    if lost := next((name for name in wanted if name not in shapes), None):
        raise PlanError(
            f"{lost} of the second tree is not made of the first one, which gives {', '.join(list(shapes)[:3])}, ..."
        )
    if left := next((name for name in shapes if name not in wanted), None):
        raise PlanError(f"{left} has no place in the second tree; leave it out of the first one, or call it otherwise")
    for name, leaf in wanted.items():
        if shapes[name] != tuple(leaf.array.shape):
            raise PlanError(f"{name} becomes {shapes[name]}, and is {tuple(leaf.array.shape)} in the second tree")
        if types[name] != leaf.dtype and not cast_types:
            raise PlanError(f"{name} is {types[name]}, and {leaf.dtype} in the second tree; cast=True rounds to that")


def _is_leaf(node: Any) -> bool:
    return leaf_of(node) is not None


def _as_spec(node: Any) -> Any:
    """A leaf without its data, in its box."""
    if (leaf := leaf_of(node)) is None:
        return node
    array = leaf.array
    sharding = getattr(array, "sharding", None)
    spec = jax.ShapeDtypeStruct(  # type: ignore[no-untyped-call]
        array.shape, np.dtype(leaf.dtype) if leaf.kind == "torch" else array.dtype, sharding=sharding
    )
    return leaf.replaced(spec, leaf.axis_names)


def _held_as(node: Any, array: Any) -> Any:
    leaf = leaf_of(node)
    if leaf is None:
        return node
    array = array if array.dtype == leaf.array.dtype else array.astype(leaf.array.dtype)
    if leaf.array.sharding is not None:
        array = jax.device_put(array, leaf.array.sharding)
    return leaf.replaced(array, leaf.axis_names)
