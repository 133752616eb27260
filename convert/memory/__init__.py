"""Fuse and split parameters that are in memory: what `--prefuse` and `--split` do to files, on a tree of arrays.

In: a tree of arrays, a layout. Out: the same kind of tree, its experts in that layout. It never changes what it is given.

    tree.py      any container as names and leaves, and back          leaves.py    an array, and the box that it may stand in
    plan.py      the files' own planner, asked about these names      relay.py     a pattern as reshape, transpose, stack, pad
    move.py      one relay compiled, with its derivative              places.py    where the axes of an array lie on the devices

One engine: names are matched, and refused, by the tables and the planner that files go through. Only the copying differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from convert.errors import PlanError, UsageError
from convert.memory import tree
from convert.memory.leaves import Leaf, leaf_of
from convert.memory.move import moved
from convert.memory.names import Names
from convert.memory.plan import planned
from convert.memory.relay import Planned
from convert.options import Choices
from convert.planning.choices import check
from convert.planning.planner import Action
from layouts.tables.targets import BLOCK, TARGETS

__all__ = ["record", "relaid", "source_choices"]


def relaid(params: Any, action: Action, *, names: Mapping[str, str] | None = None, donate: bool = False, **asked: Any) -> Any:
    """The tree with its experts in another layout; see `planned` for what may be asked; `donate` gives the arrays up.

    Raises:
        PlanError: there are no experts, they cannot be told or are not alike, or the container cannot hold what they become.
    """
    called, held = _read(params, names, asked["choices"])
    plan = planned(held, action, **asked)
    holders = Counter(id(each.leaf.array) for each in held.values() if each.leaf is not None)
    made: dict[Sequence[str], Mapping[str, Any]] = {}
    for move in plan.moves:
        made[move.sources] = found = {called.write(name): node for name, node in _made(held, move).items()}
        if donate:
            _give_up([each.leaf.array for each in map(held.get, move.sources) if each and each.leaf], found, holders)
    return tree.rebuilt(params, held, made)


def source_choices(choices: Choices, layout: str | Mapping[str, Any] | None) -> Choices:
    """The choices with a named layout as the one that there is, not as the one that is wanted.

    Raises:
        UsageError: there is none of this name, or it does not take these options.
    """
    if layout is not None and not isinstance(layout, str | Mapping):
        raise UsageError(f"layout: {layout!r} is neither a name nor a record of layout_of")
    if not isinstance(layout, str):
        return choices
    if layout in TARGETS:
        check(replace(choices, layout=layout))
        if "{shards}" in TARGETS[layout]["wi"].pattern:
            layout = f"{layout}:{choices.shards}{f':{choices.align}' if choices.align else ''}"
        elif "{block}" in TARGETS[layout]["wi"].pattern:
            layout = f"{layout}:{choices.glu_block}"
    chosen = replace(choices, shards=1, glu_block=BLOCK, source_layout=layout)
    check(chosen)
    return chosen


def record(params: Any, *, names: Mapping[str, str] | None = None, **asked: Any) -> Mapping[str, Any]:
    """What a fused tree does not say of itself, as JSON; see `convert.layout_of`."""
    _, held = _read(params, names, asked["choices"])
    return planned(held, "prefuse", **asked).record or {}


def _read(params: Any, names: Mapping[str, str] | None, choices: Choices) -> tuple[Names, dict[str, tree.Held]]:
    """The leaves by the names that the tables know, and how to write these.

    Raises:
        PlanError: two leaves would have one name.
    """
    called, held, found = Names(names, choices.family), tree.flatten(params), dict[str, tree.Held]()
    for name, each in held.items():
        if (known := called.read(name)) in found:
            raise PlanError(f"{name} and {found[known].path} are both called {known} by these names; rename one")
        found[known] = each
    return called, found


def _made(held: Mapping[str, tree.Held], move: Planned) -> dict[str, Any]:
    """What a move makes of the leaves of its sources: name -> what stands in the tree."""
    if move.relay is None:
        return dict.fromkeys(move.targets, held[move.sources[0]].node)
    leaves: list[Leaf] = [held[name].leaf for name in move.sources]  # type: ignore[misc]
    return dict(zip(move.targets, moved(move.relay, leaves, move.sources), strict=True))


def _give_up(arrays: Iterable[Any], made: Mapping[str, Any], holders: Mapping[int, int]) -> None:
    """Free what was moved, once it was: JAX itself would keep donated arrays whose shape no result has.

    Arrays that stand in the tree in several places, or became a result as they are, stay; so do traced ones.
    """
    results = [leaf.array for leaf in map(leaf_of, made.values()) if leaf is not None]
    if any(isinstance(array, jax.core.Tracer) for array in results):
        return
    jax.block_until_ready(results)  # type: ignore[no-untyped-call]
    for array in arrays:
        if isinstance(array, jax.Array) and holders[id(array)] == 1 and all(array is not result for result in results):
            array.delete()
