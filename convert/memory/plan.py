"""What becomes of which leaf: the planner of files, asked about the names in a tree.

In: the leaves of a tree by name, a layout. Out: moves, and the record of the layout. It never looks at data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from convert.errors import ConvertError, PlanError, UsageError
from convert.memory.leaves import Leaf
from convert.memory.names import absent, check_arrays, family_of, has_gates
from convert.memory.relay import Planned, Relay, rendered, side_of
from convert.memory.tree import Held
from convert.options import Choices
from convert.options.wording import as_arguments
from convert.planning.loras import columns_of, loras, sizes_of, stated_in
from convert.planning.planner import Action, Plan, make_plan
from convert.planning.targets import LORA, Target
from layouts.adapters.trees import is_lora
from layouts.language.layout import ROLES, Layout, Layouts
from layouts.language.pattern import Pattern
from layouts.language.template import Template
from layouts.matching.candidates import named
from layouts.reader import Reader
from layouts.side_files import SideFiles
from layouts.tables import targets as tables
from layouts.tables.families import Family
from layouts.tensors import DTYPES, TensorSpec

_CODES = {name: code for code, name in DTYPES.items()}
_OTHER_TYPE = "I8"
"""The code for element types that no file has, such as int4: the planner compares codes, and `moved` the types themselves."""


_Pair = tuple[Template, Template, Mapping[str, int]]
"""The key of what is there, the key of what it becomes, and the sizes of the axes of the weight in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """All moves, and what the new tree does not say of itself."""

    moves: tuple[Planned, ...]
    record: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
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

    def unit(self, name: str) -> None:
        """Any part can be read alone."""


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
    number `e` of experts where they are stored flat, or of each kind where a layer has several, numbered through.

    Raises:
        PlanError, InputError: as for files; messages name leaves, and arguments instead of flags.
    """
    family = family_of(choices.family or (record or {}).get("family"))
    try:
        return _planned(held, action, family, choices, record, _checked(sizes or {}))
    except ConvertError as error:
        raise type(error)(_in_arguments(str(error), action)) from None


def _planned(
    held: Mapping[str, Held],
    action: Action,
    family: Family,
    choices: Choices,
    record: Mapping[str, Any] | None,
    sizes: dict[str, int],
) -> Moves:
    config = {"moe_num_experts" if family.is_open else "num_experts": sizes.pop("e")} if "e" in sizes else {}
    family = family.filled(config["moe_num_experts"]) if family.is_open and config else family
    there = choices.source_layout or (record or {}).get("layout")
    if sizes:
        record, choices = _stated(choices.source_layout, family, sizes), replace(choices, source_layout=None)
    wanted = tables.target(choices.layout, family, shards=choices.shards, align=choices.align, block=choices.glu_block)
    before, after = (family.native, wanted) if action == "prefuse" else ((), family.native[0])
    before = before if there is None else (named(there, family), *before)
    check_arrays(held, family, (*before, *family.native, wanted))
    tensors = {name: spec_of(name, each.leaf) for name, each in held.items() if each.leaf is not None}
    found = {name: tensors.pop(name) for name in list(tensors) if family.by_structure and is_lora(name)}
    columns = columns_of(found, record, before if there else (), wanted if action == "prefuse" else None)
    beside = partial(loras, found, columns, said={**(stated_in(record) if found else {}), **sizes})
    if not has_gates(tensors, family, before if action == "split" else ()):
        moves = (*_places(held, _empty_pairs(family, before, after)), *_moves(beside(weights={})))
        return Moves(moves=moves or absent(held, family, before, said=bool(choices.family)), record=None)
    reader = Tree(tensors=tensors, format=family.format, record=record, config=config)
    plan = make_plan(cast(Reader, reader), Path(), action, choices, whole=False)
    moved = _moves((*plan.targets, *beside(weights=sizes_of(plan.targets))))
    return Moves(moves=(*moved, *_places(held, _pairs(plan))), record=plan.record or {})


def _checked(sizes: Mapping[str, int]) -> dict[str, int]:
    for axis, size in sizes.items():
        if axis not in ("e", "k", "n") or type(size) is not int or size < 1:
            raise UsageError(f"sizes: {{{axis!r}: {size!r}}} is no number of e, k or n")
    return dict(sizes)


def spec_of(name: str, leaf: Leaf) -> TensorSpec:
    """What the planner asks of a leaf."""
    return TensorSpec(name=name, dtype=_CODES.get(leaf.dtype, _OTHER_TYPE), shape=tuple(leaf.array.shape))


def _moves(found: Iterable[Target]) -> Iterator[Planned]:
    """The targets that are made of the same sources, together."""
    made: dict[Any, list[Target]] = {}
    for each in found:
        if each.role in (*ROLES, LORA) and each.moved:
            block = frozenset((slot, at) for slot, at in each.index.items() if slot not in ROLES.get(each.role, "g"))
            made.setdefault((each.role, each.part, block), []).append(each)
    for targets in made.values():
        first = targets[0]
        source, target = side_of(first.source, first.source_sizes, "ekgn"), side_of(first.target, first.sizes, "ekgn")
        yield Planned(
            sources=rendered(first.source.key, first.index, dict(source.sizes)),
            targets=rendered(first.target.key, first.index, dict(target.sizes)),
            relay=Relay(source=source, target=target, diagonal=first.way.diagonal),
        )


def _places(held: Mapping[str, Held], pairs: Iterable[_Pair]) -> Iterator[Planned]:
    """Where leaves only keep the places of experts (optimizers mask what they do not train), the places are moved."""
    empty = [name for name, each in held.items() if each.is_empty]
    for source, target, sizes in pairs:
        found: dict[Any, dict[str, Any]] = {}
        for name in empty:
            if (index := source.parse(name)) is not None:
                found.setdefault(frozenset(i for i in index.items() if i[0] not in sizes), {})[name] = index
        for names in found.values():
            first, index = next(iter(names.items()))
            sources = rendered(source, index, sizes)
            if lost := [name for name in sources if name not in names]:
                raise PlanError(f"{first} is empty and {lost[0]} is not there, or is not empty; both or neither")
            yield Planned(sources=sources, targets=rendered(target, index, sizes), relay=None)


def _pairs(plan: Plan) -> Iterator[_Pair]:
    """The names of what was planned, and the sizes of the axes in them."""
    found = {(t.source.key, t.target.key): t for t in plan.targets if t.role in ROLES and t.moved}
    for (source, target), each in found.items():
        sizes = {**each.source_sizes, **each.sizes}
        yield source, target, {axis: sizes[axis] for axis in "ekgn" if axis in (*source.slots, *target.slots)}


def _empty_pairs(family: Family, sources: Iterable[Layouts], wanted: Layouts) -> Iterator[_Pair]:
    """The same of a tree that holds no experts, only their places: no shape says how many there are."""
    for table in sources:
        for role in ROLES:
            source, target = (each[role].template(family.experts).bind("part", 0) for each in (table, wanted))
            if not {"e", "k", "n"} & {*source.slots, *target.slots} and source != target:
                yield source, target, {"g": 2}


def _stated(text: str | None, family: Family, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The record of a layout that somebody has named, with the sizes of what it pads.

    Raises:
        UsageError: nobody has, or it pads nothing.
        PlanError: a size is missing, or cannot be.
    """
    record: dict[str, Any] = {"layout": text, "version": tables.VERSION, "family": family.name, "stored": {}}
    for role, layout in named(text, family).items() if text else ():
        pattern = Pattern(layout.pattern)
        shards = pattern.fixed.get("s", 1)
        if lost := [axis for axis in pattern.padding if axis not in sizes or (axis == "n" and sizes[axis] % shards)]:
            raise PlanError(f"sizes: {text} pads {lost[0]}; give the whole of it without padding, a multiple of {shards}")
        unpadded = {axis: sizes[axis] // (shards if axis == "n" else 1) for axis in pattern.padding}
        record[role] = _words(layout, family) | {"native": [_words(family.native[0][role], family)]}
        if unpadded:
            record["stored"][f"{role}."] = {"pattern": layout.pattern, "dims": "out in", "unpadded": unpadded}
    if not record["stored"]:
        raise UsageError("sizes: k and n are those of a padded layout that is named; else shapes or the record say them")
    return record


def _words(layout: Layout, family: Family) -> dict[str, str]:
    return {"key": layout.key.replace("{experts}", family.experts), "pattern": layout.pattern}


def _in_arguments(text: str, action: Action) -> str:
    """A message for who calls a function on a tree, which has no files."""
    text = as_arguments(text.replace("neither the checkpoint nor", "neither a record nor"))
    text = text.replace("source_layout=", "layout=") if action == "split" else text
    return f"{text}; say it with sizes={{'n': ...}}" if "nothing says how many" in text else text
