"""The plan: every tensor of the output, and where each of its elements comes from. Pure; reads names and shapes only.

There is one operation, whatever the two layouts are: a target block and a source block are viewed along the same axes and one
is copied into the other. A `Target` therefore only holds both layouts and the sizes; `pieces` derives the copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layouts.checkpoint import Reader, TensorSpec
from layouts.describe import Description, Group, describe, identity
from layouts.errors import PlanError
from layouts.families import Layouts, Placed
from layouts.pattern import Box, Index, Template
from layouts.targets import DEFAULT, TARGETS, VERSION

Action = Literal["prefuse", "split"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One block copy: `source_box` of the tensor `source` goes to `target_box` of the target."""

    source: str
    source_box: Box
    target_box: Box


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A tensor of the output. `index` is where its name puts it, `sizes` has every axis of both layouts."""

    spec: TensorSpec
    role: str
    index: Index
    sizes: Mapping[str, int]
    source: Placed
    target: Placed

    @property
    def moved(self) -> bool:
        """Whether anything but the name's place in a file changes."""
        return self.source != self.target

    def pieces(self, box: Box) -> Iterator[Piece]:
        """The block copies that fill `box`, a range for each axis of the target's pattern, in source order."""
        bound = {axis: range(at, at + 1) for axis, at in self.index.items() if isinstance(at, int)}
        full = {**bound, **box}
        named = [slot for slot in self.source.key.slots if slot in full]
        for point in itertools.product(*(full[axis] for axis in named)):
            at = dict(zip(named, point, strict=True))
            one = {**full, **{axis: range(i, i + 1) for axis, i in at.items()}}
            yield Piece(
                source=self.source.key.render({**self.index, **at}),
                source_box={axis: one[axis] for axis in self.source.pattern.axes},
                target_box={axis: one[axis] for axis in self.target.pattern.axes},
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a conversion will do; print it with `convert.report.describe_plan`.

    `targets` are in the order of their first source tensor, so that reading goes through the input once.
    """

    source: Path
    out: Path
    action: Action
    format: str
    family: str
    layout: str
    record: Mapping[str, Any] | None
    targets: tuple[Target, ...]
    side_files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(target.spec.nbytes for target in self.targets)


def make_plan(
    reader: Reader,
    out: Path,
    action: Action,
    *,
    layout: str = DEFAULT,
    family: str | None = None,
    source_layout: str | None = None,
) -> Plan:
    """Plan the conversion of an open checkpoint.

    Raises:
        PlanError: no lossless plan exists, or there is nothing to do.
        InputError: experts are missing.
    """
    described = describe(reader, family=family, source_layout=source_layout)
    wanted = described.family.native if action == "split" else TARGETS[layout]
    order = {name: position for position, name in enumerate(reader.tensors)}
    found = [target for group in described.groups for target in _targets(group, described, wanted)]
    if not any(target.moved for target in found):
        state = "separate" if action == "split" else f"in layout {layout!r}"
        raise PlanError(f"{reader.path}: all experts are {state} already; there is nothing to {action}")
    found += [_verbatim(reader.tensors[name]) for name in described.verbatim]
    _check_names(reader, found)
    first = {id(t): order[_first_source(t)] for t in found}
    return Plan(
        source=reader.path,
        out=out,
        action=action,
        format=reader.format,
        family=described.family.name,
        layout="native" if action == "split" else layout,
        record=None if action == "split" else _record(layout, described, wanted),
        targets=tuple(sorted(found, key=lambda t: (first[id(t)], t.spec.name))),
        side_files=tuple(reader.side_files),
    )


def _targets(group: Group, described: Description, wanted: Layouts) -> Iterator[Target]:
    """The tensors that hold this group's weights in the wanted layout: one per point of the axes in the key."""
    placed = wanted[group.role].place(described.family.experts)
    scan = sum(axis not in ("e", "k", "g", "n") for axis in group.placed.pattern.axes)
    written = len(placed.pattern.groups) - ("..." in placed.pattern.axes)
    target = Placed(placed.key, placed.pattern.expand(written + scan))
    if scan and "..." not in placed.pattern.axes:
        raise PlanError(f"{group.names[0]} has {scan} scan axes, which layout '{placed.pattern.text}' has no place for")
    named = [slot for slot in target.key.slots if slot in group.sizes]
    shape = target.pattern.shape(group.sizes)
    for point in itertools.product(*(range(group.sizes[axis]) for axis in named)):
        index = {**group.index, **dict(zip(named, point, strict=True))}
        spec = TensorSpec(name=target.key.render(index), dtype=group.dtype, shape=shape)
        yield Target(spec=spec, role=group.role, index=index, sizes=group.sizes, source=group.placed, target=target)


def _first_source(target: Target) -> str:
    if target.role == "verbatim":
        return target.spec.name
    return next(target.pieces(target.target.pattern.whole(target.sizes))).source


def _verbatim(spec: TensorSpec) -> Target:
    same = Placed(Template(spec.name, literal=True), identity(len(spec.shape)))
    sizes = dict(zip(same.pattern.axes, spec.shape, strict=True))
    return Target(spec=spec, role="verbatim", index={}, sizes=sizes, source=same, target=same)


def _check_names(reader: Reader, targets: list[Target]) -> None:
    seen: set[str] = set()
    for target in targets:
        if target.spec.name in seen:
            raise PlanError(f"{reader.path}: two tensors of the output would be called {target.spec.name}")
        seen.add(target.spec.name)
    bytes_in, bytes_out = (sum(s.nbytes for s in specs) for specs in (reader.tensors.values(), (t.spec for t in targets)))
    if bytes_in != bytes_out:
        raise PlanError(f"{reader.path}: the plan reads {bytes_in} bytes but writes {bytes_out}; this is a bug, report it")


def _record(layout: str, described: Description, wanted: Layouts) -> dict[str, Any]:
    """What the output says about itself, so that nobody has to guess: see `layouts.describe`."""
    parts = {role: table.place(described.family.experts) for role, table in wanted.items()}
    return {
        "layout": layout,
        "version": VERSION,
        "family": described.family.name,
        **{role: {"key": placed.key.text, "pattern": placed.pattern.text} for role, placed in parts.items()},
    }
