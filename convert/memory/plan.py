"""What becomes of which leaf: the planner of files, asked about the names in a tree.

In: the leaves of a tree by name, a layout. Out: moves, and the record of the layout. It never looks at data.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from convert.errors import ConvertError, PlanError
from convert.memory.leaves import Leaf
from convert.memory.relay import Relay, Side
from convert.memory.tree import Held
from convert.options import Choices
from convert.planning.planner import Action, Plan, make_plan
from convert.planning.targets import Target
from layouts.language.layout import ROLES, Layout, Layouts, Placed
from layouts.language.pattern import Pattern
from layouts.matching.candidates import named
from layouts.matching.lookup import fitting
from layouts.reader import Reader
from layouts.side_files import SideFiles
from layouts.tables.families import FAMILIES, Family, maxtext
from layouts.tables.targets import TARGETS, VERSION, target
from layouts.tensors import DTYPES, TensorSpec

_CODES = {name: code for code, name in DTYPES.items()}
_OTHER_TYPE = "I8"
"""The code for element types that no file has, such as int4: the planner compares codes, and `moved` the types themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One move: the names of leaves, the names of what they become, and how; by no relay if they only keep places."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    relay: Relay | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """All moves, and what the new tree does not say of itself."""

    moves: tuple[Planned, ...]
    record: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tree:
    """A tree as the planner sees a checkpoint, of which it asks names and shapes alone."""

    tensors: Mapping[str, TensorSpec]
    format: str
    record: Mapping[str, Any] | None
    config: Mapping[str, Any]
    path: Path = Path("in memory")
    records: Mapping[str, Any] = field(default_factory=dict)
    side_files: SideFiles = field(default_factory=SideFiles)

    def where(self, name: str) -> str:
        """The place of a leaf, for messages."""
        return name.partition(".")[0]


def planned(
    held: Mapping[str, Held],
    action: Action,
    *,
    choices: Choices,
    record: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Moves:
    """Plan a change of layout.

    `record` is what `layout_of` gave. `sizes` are those of logical axes that shapes do not tell: of padded `n` and `k`, and the
    number `e` of experts where they are stored flat.

    Raises:
        PlanError, InputError: as for files; messages name leaves, and arguments instead of flags.
    """
    said = choices.family or (record or {}).get("family")
    family = next((f for f in FAMILIES if said == f.name or said in f.model_types), maxtext())
    known = dict(sizes or {})
    config = {"num_experts": known.pop("e")} if "e" in known else {}
    try:
        if known and choices.source_layout and (record := _stated(choices.source_layout, family, known)):
            choices = dataclasses.replace(choices, source_layout=None)
        wanted = target(choices.layout, family, shards=choices.shards, align=choices.align)
        _check_arrays(held, family, (*family.native, wanted))
        tensors = {name: _spec(name, each.leaf) for name, each in held.items() if each.leaf is not None}
        _check_names(tensors, family, said)
        reader = _Tree(tensors=tensors, format=family.format, record=record, config=config)
        plan = make_plan(cast(Reader, reader), Path(), action, choices, whole=False)
    except ConvertError as error:
        raise type(error)(_in_arguments(str(error), action)) from None
    return Moves(moves=(*_moves(plan), *_places(held, plan)), record=plan.record)


def _spec(name: str, leaf: Leaf) -> TensorSpec:
    return TensorSpec(name=name, dtype=_CODES.get(leaf.dtype, _OTHER_TYPE), shape=tuple(leaf.array.shape))


def _moves(plan: Plan) -> Iterator[Planned]:
    """The targets that are made of the same sources, together."""
    made: dict[Any, list[Target]] = {}
    for each in plan.targets:
        if each.role in ROLES and each.moved:
            block = frozenset((slot, at) for slot, at in each.index.items() if slot not in ROLES[each.role])
            made.setdefault((each.role, each.part, block), []).append(each)
    for targets in made.values():
        first = targets[0]
        source, target = _side(first.source, first.source_sizes), _side(first.target, first.sizes)
        yield Planned(
            sources=_names(first.source, source, first.index),
            targets=_names(first.target, target, first.index),
            relay=Relay(source=source, target=target),
        )


def _side(placed: Placed, sizes: Mapping[str, int]) -> Side:
    axes = [slot for slot in placed.key.slots if slot in "ekgn"]
    held = {axis: sizes[axis] for axis in (*axes, *placed.pattern.axes)}
    return Side(named=tuple(axes), pattern=placed.pattern, sizes=tuple(held.items()))


def _names(placed: Placed, side: Side, index: Mapping[str, Any]) -> tuple[str, ...]:
    """All names of a side, in the order of its grid."""
    points = itertools.product(*map(range, side.grid))
    return tuple(placed.key.render({**index, **dict(zip(side.named, point, strict=True))}) for point in points)


def _places(held: Mapping[str, Held], plan: Plan) -> Iterator[Planned]:
    """Where leaves only keep the places of experts (optimizers mask what they do not train), the places are moved."""
    keys = {(t.source.key, t.target.key): t for t in plan.targets if t.role in ROLES and t.moved}
    empty = [name for name, each in held.items() if each.is_empty]
    for (source, _), first in keys.items():
        sides = [_side(first.source, first.source_sizes), _side(first.target, first.sizes)]
        found: dict[Any, dict[str, Any]] = {}
        for name in empty:
            if (index := source.parse(name)) is not None:
                found.setdefault(frozenset(i for i in index.items() if i[0] not in sides[0].named), {})[name] = index
        for names in found.values():
            index = next(iter(names.values()))
            sources = _names(first.source, sides[0], index)
            if lost := [name for name in sources if name not in names]:
                raise PlanError(f"{next(iter(names))} is empty and {lost[0]} is not; both or neither")
            yield Planned(sources=sources, targets=_names(first.target, sides[1], index), relay=None)


def _check_arrays(held: Mapping[str, Held], family: Family, tables: Iterable[Layouts]) -> None:
    """See that what has the name of an expert's weight is an array."""
    keys = [layout.template(family.experts) for table in tables for layout in table.values()]
    for name, each in held.items():
        if each.leaf is None and not each.is_empty and any(key.parse(name) is not None for key in keys):
            raise PlanError(
                f"{name} has the name of an expert's weight and is a {type(each.node).__qualname__}; "
                f"known are arrays of NumPy, JAX and PyTorch, jax.ShapeDtypeStruct, and Flax's boxes around these"
            )


def _check_names(names: Collection[str], family: Family, said: object) -> None:
    """See that some leaves have the names of gate and up, before anything is said of the layout that they are in."""
    tables = [*family.native, *(target(each, family, shards=1, align=128) for each in TARGETS)]
    keys = [table["wi"].template(family.experts) for table in tables]
    if any(key.parse(name) is not None for key in keys for name in names):
        return
    near = [] if said else [other.name for other in fitting(names, "hf")][:6]
    wanted = family.native[0]["wi"].key.replace("{experts}", family.experts) if said else "wi_0 and wi_1, nor wi"
    hint = f"; there are names as in {', '.join(near)}: if it is one of these, say so with --family" if near else ""
    raise PlanError(f"no leaves are called {wanted}{hint}. First leaves: {', '.join(sorted(names)[:3]) or 'none'}")


def _stated(text: str, family: Family, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The record of a layout that somebody has named, with the sizes of what it pads; None if it pads nothing."""
    record: dict[str, Any] = {"layout": text, "version": VERSION, "family": family.name, "stored": {}}
    for role, layout in named(text, family).items():
        pattern = Pattern(layout.pattern)
        shards = pattern.fixed.get("s", 1)
        if lost := [axis for axis in pattern.padding if axis not in sizes or (axis == "n" and sizes[axis] % shards)]:
            raise PlanError(f"sizes: {text} pads {lost[0]}; give the whole of it without padding, a multiple of {shards}")
        unpadded = {axis: sizes[axis] // (shards if axis == "n" else 1) for axis in pattern.padding}
        record[role] = _words(layout, family) | {"native": [_words(family.native[0][role], family)]}
        if unpadded:
            record["stored"][f"{role}."] = {"pattern": layout.pattern, "dims": "out in", "unpadded": unpadded}
    return record if record["stored"] else None


def _words(layout: Layout, family: Family) -> dict[str, str]:
    return {"key": layout.key.replace("{experts}", family.experts), "pattern": layout.pattern}


def _in_arguments(text: str, action: Action) -> str:
    """A message for who calls a function: with arguments where it has the flags of the command."""
    source = "layout" if action == "split" else "source_layout"
    text = re.sub(r"(?<!convert )--([a-z-]+[a-z])", lambda flag: flag[1].replace("-", "_"), text).replace(
        "source_layout", source
    )
    return f"{text}; say it with sizes={{'n': ...}}" if "nothing says how many" in text else text
