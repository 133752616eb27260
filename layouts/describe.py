"""Match every tensor of a checkpoint against its family's table; nothing is guessed and nothing is left over.

The result is complete by construction: each source tensor is in exactly one `Group`, or it is verbatim, or there is an error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from layouts.checkpoint import Reader, TensorSpec
from layouts.errors import InputError, PlanError
from layouts.families import FAMILIES, ROLES, Family, Layouts, Placed, expert_count, find_family, fitting, layouts
from layouts.pattern import Index, Pattern, Template
from layouts.targets import TARGETS, UNMARKED, VERSION

Bindings = tuple[tuple[str, int | str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All tensors of one role in one MoE block: together they hold each element of `W[e, k, g, n]` (or `[e, n, k]`) once."""

    role: str
    placed: Placed
    index: Index
    sizes: Mapping[str, int]
    dtype: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A checkpoint in the words of the tables."""

    family: Family
    groups: tuple[Group, ...]
    verbatim: tuple[str, ...]


def describe(reader: Reader, *, family: str | None = None, source_layout: str | None = None) -> Description:
    """Say what every tensor of an open checkpoint is.

    Raises:
        PlanError: unknown family, expert tensors that its table does not know, or a fused layout that nobody has named.
        InputError: experts are missing, or differ in shape or element type.
    """
    found = _family(reader, family)
    candidates = [*_accepted(reader, found, source_layout), found.native]
    matched, verbatim = _match(reader, found, candidates)
    if not matched:
        raise PlanError(
            f"{reader.path}: no expert weights found where family {found.name} keeps them ({found.experts})"
            f"{_hint(reader, found)}. First tensors: {', '.join(sorted(reader.tensors)[:3])}"
        )
    groups = tuple(_group(reader, role, placed, dict(index), names) for (role, index), (placed, names) in matched.items())
    _check_blocks(reader, groups)
    return Description(family=found, groups=groups, verbatim=tuple(verbatim))


def _family(reader: Reader, override: str | None) -> Family:
    if reader.format == "hf" or override:
        wanted = override or _record(reader).get("family")
        return find_family(
            reader.config.get("model_type"), list(reader.tensors), where=reader.path, format=reader.format, override=wanted
        )
    return next(family for family in FAMILIES if family.format == reader.format)


def _record(reader: Reader) -> Mapping[str, Any]:
    record = reader.record or {}
    if not isinstance(record, Mapping):
        raise InputError(f"{reader.path}: the record of the layout is damaged: expected an object, found {record!r}")
    return record


def _accepted(reader: Reader, family: Family, source_layout: str | None) -> list[Layouts]:
    """The fused layouts that this checkpoint may be in: what our record says, what the user says, or what its producer owns."""
    record = _record(reader)
    if record and not source_layout:
        if record.get("version") != VERSION:
            raise PlanError(f"{reader.path}: layout record of version {record.get('version')}, this tool knows {VERSION}")
        try:
            wi, wo = (
                (record[role]["key"].replace(family.experts, "{experts}"), record[role]["pattern"]) for role in ("wi", "wo")
            )
            return [layouts(wi=wi, wo=wo)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{reader.path}: the record of the layout is damaged: {error!r}") from None
    name = source_layout or UNMARKED.get(reader.format)
    return [TARGETS[name]] if name else []


def _match(
    reader: Reader, family: Family, candidates: Sequence[Layouts]
) -> tuple[dict[tuple[str, Bindings], tuple[Placed, list[str]]], list[str]]:
    placed = [(role, layout.place(family.experts)) for table in candidates for role, layout in table.items()]
    suspects = [(name, layout.place(family.experts)) for name, table in TARGETS.items() for layout in table.values()]
    scope = Template(family.experts + ".{path}") if family.format == "hf" else None
    matched: dict[tuple[str, Bindings], tuple[Placed, list[str]]] = {}
    verbatim = []
    for name in reader.tensors:
        hit = next(((role, p, i) for role, p in placed if (i := p.key.parse(name)) is not None), None)
        if hit is None:
            _refuse_unknown_expert(reader, family, name, suspects, scope)
            verbatim.append(name)
            continue
        role, where, index = hit
        block: Bindings = tuple((slot, value) for slot, value in index.items() if slot not in ROLES[role])
        first, names = matched.setdefault((role, block), (where, []))
        if first.key != where.key:
            raise PlanError(f"{reader.path}: {name} and {names[0]} hold the same weights in two layouts; remove one")
        names.append(name)
    return matched, verbatim


def _refuse_unknown_expert(
    reader: Reader, family: Family, name: str, suspects: Iterable[tuple[str, Placed]], scope: Template | None
) -> None:
    for layout, place in suspects:
        if place.key.parse(name) is not None:
            raise PlanError(
                f"{reader.path}: {name} looks like layout {layout!r}, but neither the checkpoint nor --source-layout says so. "
                f"Shapes cannot tell the layouts of a fused tensor apart: name it with --source-layout"
            )
    if scope and (scope.parse(name) is not None or "experts" in name.split(".")):
        raise PlanError(
            f"{reader.path}: {name} (in {reader.where(name)}) is an expert tensor that family {family.name} does not know; "
            f"expected names such as {family.native['wi'].place(family.experts).key.text}{_hint(reader, family)}"
        )


def _hint(reader: Reader, family: Family) -> str:
    """What to try when none of the names is one of the family's."""
    others = fitting(reader.tensors, reader.format)
    if not others or family in others:
        return ""
    return f"; there are names as in {', '.join(f.name for f in others)}: if it is one of these, say so with --family"


def _group(reader: Reader, role: str, placed: Placed, index: Index, names: Sequence[str]) -> Group:
    specs = [reader.tensors[name] for name in names]
    _check_equal(reader, specs)
    first = specs[0]
    grid = _check_grid(reader, role, placed.key, index, names)
    try:
        pattern = placed.pattern.expand(len(first.shape))
        sizes = grid | pattern.sizes(first.shape, {"g": 2})
    except ValueError as error:
        raise PlanError(f"{reader.path}: {first.name} (in {reader.where(first.name)}): {error}") from None
    stated = expert_count(reader.config)
    if stated and sizes["e"] != stated:
        raise InputError(f"{reader.path}: {first.name} is of {sizes['e']} experts, but config.json says {stated}")
    return Group(role=role, placed=Placed(placed.key, pattern), index=index, sizes=sizes, dtype=first.dtype, names=tuple(names))


def _check_equal(reader: Reader, specs: Sequence[TensorSpec]) -> None:
    first = specs[0]
    for spec in specs:
        if (spec.shape, spec.dtype) != (first.shape, first.dtype):
            raise PlanError(
                f"{reader.path}: experts of one layer must be alike, but {first.name} is {first.dtype} {first.shape} and "
                f"{spec.name} (in {reader.where(spec.name)}) is {spec.dtype} {spec.shape}"
            )


def _check_grid(reader: Reader, role: str, key: Template, index: Index, names: Sequence[str]) -> dict[str, int]:
    """Experts 0..E-1, each with every projection; the sizes of the axes that the names hold."""
    grid = [slot for slot in key.slots if slot in ROLES[role]]
    seen = [int((key.parse(name) or {}).get("e", 0)) + 1 for name in names]
    counts = {"e": max(*seen, expert_count(reader.config) or 1, 1), "g": 2}
    total = math.prod(counts[axis] for axis in grid)
    if total != len(names):  # each name is another point of the grid, so that counting is enough
        have = set(names)
        points = _points([counts[axis] for axis in grid])
        wanted = (key.render({**index, **dict(zip(grid, point, strict=True))}) for point in points)
        raise InputError(
            f"{reader.path}: {next(name for name in wanted if name not in have)} is missing, and so are {total - len(have)} of "
            f"the {total} tensors of {counts['e']} experts; the others are in {_shards(reader, names)}"
        )
    return {axis: counts[axis] for axis in grid}


def _points(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All points of a grid in order, one at a time: `itertools.product` would first write down every axis."""
    if not counts:
        yield ()
        return
    yield from ((first, *rest) for first in range(counts[0]) for rest in _points(counts[1:]))


def _shards(reader: Reader, names: Iterable[str]) -> str:
    """A few of the places where these tensors lie."""
    places = sorted({reader.where(name) for name in names})
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _check_blocks(reader: Reader, groups: Sequence[Group]) -> None:
    """Every MoE block has all roles, and they agree on E, K and N."""
    blocks: dict[Any, dict[str, Group]] = defaultdict(dict)
    for group in groups:
        blocks[frozenset(group.index.items())][group.role] = group
    for block in blocks.values():
        any_group = next(iter(block.values()))
        if lacking := set(ROLES) - set(block):
            raise InputError(f"{reader.path}: {any_group.names[0]} has no {' and no '.join(sorted(lacking))} beside it")
        wi, wo = block["wi"], block["wo"]
        if any(wi.sizes[axis] != wo.sizes[axis] for axis in "ekn"):
            sizes = [{axis: group.sizes[axis] for axis in "ekn"} for group in (wi, wo)]
            raise PlanError(f"{reader.path}: {wi.names[0]} and {wo.names[0]} do not fit together: {sizes[0]} and {sizes[1]}")


@cache
def identity(rank: int) -> Pattern:
    """The pattern of a tensor that is copied as it is: one axis per dimension."""
    return Pattern(" ".join(f"d{i}" for i in range(rank)))
