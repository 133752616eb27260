"""The plan of a conversion from one format to the other: family, scan and record around its tensors. Pure.

In: an open checkpoint and choices. Out: a plan. It never reads data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.options import Choices
from convert.planning.across.beside import beside, left_out_of
from convert.planning.across.computed import computed_in
from convert.planning.across.pairs import Sides, trees_of
from convert.planning.across.tensors import cross_targets, twins_of
from convert.planning.across.which import is_aside, named_in, tree_in, written_as
from convert.planning.forms import Targets
from convert.planning.planner import Action, Plan
from convert.planning.record import family_record, make_record, with_origin
from convert.planning.targets import Target
from layouts.computing import computing
from layouts.disk.files import CONFIG, RECORD
from layouts.errors import InputError, PlanError
from layouts.language.layout import ROLES, Layout, Layouts
from layouts.language.pattern import Pattern
from layouts.matching.candidates import candidates, record_of
from layouts.matching.describe import Description, describe
from layouts.matching.lookup import find_family
from layouts.matching.origin import FIRST, Origin, origin_of
from layouts.reader import Reader
from layouts.tables.families import Family, maxtext, name_of
from layouts.tables.maxtext import ROOT, Tree
from layouts.tables.natives import SOURCES
from layouts.tables.targets import IN_MAXTEXT, TARGETS, target


def make_cross_plan(reader: Reader, out: Path, action: Action, choices: Choices) -> Plan:
    """Plan HF -> Orbax (MaxText) or back. Whether the layers of a tree that is read are stacked, its names tell.

    Raises:
        PlanError: no lossless plan exists.
        InputError: tensors or `config.json` are missing.
    """
    to_maxtext, fused = reader.format == "hf", action == "prefuse"
    config = config_of(reader)
    origin = origin_of(reader, choices.family)
    named = choices.family or origin.family or (record_of(reader).get("family") if to_maxtext else None)
    found = find_family(config, list(reader.tensors), where=reader.path, format="hf", override=named)
    tree, sides, came = (_into_maxtext if to_maxtext else _out_of_maxtext)(reader, found, origin, choices, fused)
    side_files, left_out_files = beside(reader, choices, to_maxtext=to_maxtext)
    left_out = left_out_of(reader, tree, config, choices, to_maxtext=to_maxtext)
    if choices.drop_mtp and to_maxtext:
        origin = replace(origin, without="mtp")
    computed = computed_in(reader, tree, sides, config, choices.compute)
    origin = replace(origin, computed=choices.compute if computed.values else None, names=tree.names or None)
    seen = computing(reader, computed.values)
    targets = sorted(cross_targets(seen, tree, sides, config, left_out), key=lambda target: target.spec.name)
    if to_maxtext and sides.scan and any(is_aside(tree, target.spec.name) for target in targets):
        origin = replace(origin, aside=FIRST)
    return Plan(
        source=reader.path,
        out=out,
        action=action,
        format="orbax" if to_maxtext else "hf",
        family=found.name,
        layout=choices.layout if fused else ("maxtext" if to_maxtext else "native"),
        record=_record(choices.layout if fused else None, sides, targets, came, origin),
        targets=Targets(targets),
        side_files=side_files,
        left_out_files=left_out_files,
        never_copied=reader.side_files.never,
        left_out=left_out,
        twins=() if choices.drop_mtp else twins_of(reader, tree, sides, config),
        scanned=sides.scan if to_maxtext else None,
        computed=computed.rule,
        computed_kinds=computed.kinds,
        exact=computed.exact,
        values=computed.values,
    )


_Made = tuple[Tree, Sides, Layouts]
"""A tree, the sides, and the layouts that the experts have in the Hugging Face checkpoint when nobody has fused them."""


def _into_maxtext(reader: Reader, family: Family, _: Origin, choices: Choices, fused: bool) -> _Made:
    tree, where = written_as(reader, trees_of(family, reader.path))[0], maxtext(choices.scan_axis)
    if fused and choices.layout not in IN_MAXTEXT:
        known = ", ".join(name for name in TARGETS if name in IN_MAXTEXT)
        raise PlanError(f"{reader.path}: MaxText's tree has no place for layout {choices.layout!r}; it can take {known}")
    described = describe(reader, family=family.name, source_layout=choices.source_layout)
    hf, came = (_anywhere(table, family) for table in stored_in(reader, described))
    _check_place(reader, hf)
    real = real_sizes(reader, described)
    stored = (
        target(choices.layout, where, shards=choices.shards, align=choices.align, block=choices.glu_block)
        if fused
        else where.native[0]
    )
    return tree, Sides(family=family, tree=where, hf=hf, maxtext=stored, scan=choices.scan, to_maxtext=True, real=real), came


def _out_of_maxtext(reader: Reader, family: Family, origin: Origin, choices: Choices, fused: bool) -> _Made:
    tree, scan = tree_in(reader, named_in(reader, trees_of(family, reader.path)))
    where = stacked_along(reader, choices.scan_axis)
    stored, real = fused_in(reader, where, choices.source_layout)
    came = SOURCES[origin.layout] if origin.layout else family.native[0]
    hf = target(choices.layout, family, shards=choices.shards, align=choices.align, block=choices.glu_block) if fused else came
    _check_place(reader, hf)
    return tree, Sides(family=family, tree=where, hf=hf, maxtext=stored, scan=scan, to_maxtext=False, real=real), came


def _anywhere(table: Layouts, family: Family) -> Layouts:
    """A layout of this family as the table has it, without the place of its experts."""
    name = name_of(table, family)
    return SOURCES[name] if name else table


def _check_place(reader: Reader, hf: Layouts) -> None:
    """See that the experts of Hugging Face are where the tree's model has them.

    Raises:
        PlanError: their layout has a place of its own.
    """
    if own := next((layout.key for layout in hf.values() if layout.key.startswith("{path}")), None):
        raise PlanError(
            f"{reader.path}: {own} is a place of its own, and between formats experts are where their model keeps them. Use "
            f"--prefuse within the format first, and convert what comes out"
        )


def stored_in(reader: Reader, described: Description) -> tuple[Layouts, Layouts]:
    """The layouts of a Hugging Face checkpoint's experts: as they are stored, and as they were before anybody fused them.

    Raises:
        PlanError: they are in several.
    """
    found: dict[str, dict[tuple[Layout, Layout], str]] = {role: {} for role in ROLES}
    for group in described.groups:
        found[group.role].setdefault((group.layout, group.native), group.names[0])
    for several in found.values():
        if len(several) > 1:
            one, other, *_ = several.values()
            raise PlanError(f"{reader.path}: {one} and {other} are in two layouts, and layers that are stacked have only one")
    pairs = {role: next(iter(each)) for role, each in found.items()}
    return {role: layout for role, (layout, _) in pairs.items()}, {role: native for role, (_, native) in pairs.items()}


def stacked_along(reader: Reader, axis: int | None = None) -> Family:
    """The family of a MaxText tree by the axis of its layers: as asked for, else as our record says, else as MaxText has it.

    Raises:
        PlanError: the tree says otherwise.
    """
    stated = record_of(reader).get("family")
    if stated and axis is not None and stated != maxtext(axis).name:
        raise PlanError(f"{reader.path}: it was written as {stated}; do without --scan-axis={axis}")
    return find_family({}, (), where=reader.path, format="orbax", override=str(stated)) if stated else maxtext(axis)


def config_of(reader: Reader) -> Mapping[str, Any]:
    """`config.json`, which an Orbax checkpoint that came from Hugging Face has beside it."""
    if not reader.config:
        raise InputError(
            f"{reader.path / CONFIG}: not there; put the model's config.json there, it says how heads and layers lie"
        )
    return {key: value for key, value in reader.config.items() if key != RECORD}


def fused_in(reader: Reader, tree: Family, stated: str | None = None) -> tuple[Layouts, dict[str, dict[str, int]]]:
    """The layouts of the experts in a tree that is read, and for each role how much of its padded axes is real.

    They are as our record says, or as is `stated` where there is none.

    Raises:
        PlanError: experts are fused, and nothing says in which layout.
    """
    if not record_of(reader).get("layout"):
        if not any(name.endswith(".wi") for name in reader.tensors):
            return tree.native[0], {}
        if stated is None:
            raise PlanError(
                f"{reader.path}: it has a fused wi, and nothing says in which layout; if it is gate and up side by side, as "
                f"MaxText has it, say so with --source-layout=concat, else name its layout ({', '.join(sorted(IN_MAXTEXT))})"
            )
    known = candidates(reader, tree, stated).known
    layouts = {role: next(each.layout for each in known if each.role == role) for role in ROLES}
    if not any(Pattern(layout.pattern).padding for layout in layouts.values()):
        return layouts, {}
    return layouts, real_sizes(reader, describe(reader, family=tree.name, source_layout=stated), ROOT)


def real_sizes(reader: Reader, described: Description, below: str = "") -> dict[str, dict[str, int]]:
    """How much of the padded axes of a role's weights is real; of a tree, of those `below` a place.

    Raises:
        PlanError: they differ.
    """
    real: dict[str, dict[str, int]] = {}
    for group in described.groups:
        sizes = {axis: group.sizes[axis] for axis in group.placed.pattern.padding}
        if (
            not group.part
            and str(group.index.get("path", "")).startswith(below)
            and real.setdefault(group.role, sizes) != sizes
        ):
            raise PlanError(f"{reader.path}: {group.names[0]} has {sizes} before its padding, others {real[group.role]}")
    return real


def _record(
    layout: str | None, sides: Sides, targets: Iterable[Target], came: Layouts, origin: Origin
) -> dict[str, Any] | None:
    """The record of the experts, in the words of the format that has them; a tree's says of what it was made, too."""
    origin = replace(origin, family=sides.family.name, layout=name_of(came, sides.family)) if sides.to_maxtext else Origin()
    if layout is None:
        return family_record(sides.tree, origin) if sides.to_maxtext else None
    owner, wanted = (sides.tree, sides.maxtext) if sides.to_maxtext else (sides.family, sides.hf)
    natives = sides.tree.native[0] if sides.to_maxtext else came
    made = [(natives[each.role], each) for each in targets if each.role in ROLES]
    return with_origin(make_record(layout, owner, wanted, made), origin)
