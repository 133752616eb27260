"""The plan: every tensor of the output, and where each of its elements comes from. Pure; reads names and shapes only.

In: an open checkpoint and choices. Out: a plan. It never reads data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from convert.options import Choices
from convert.planning.documents import plan_document
from convert.planning.forms import Targets
from convert.planning.landings import land
from convert.planning.record import family_record, make_record, with_origin
from convert.planning.relay import Landing
from convert.planning.targets import Piece, Target, verbatim
from layouts.computing import NOTHING, Values
from layouts.matching.describe import Description, describe
from layouts.reader import Reader
from layouts.tensors import columns

__all__ = ["Action", "Merging", "Piece", "Plan", "Target", "make_plan", "plan_as_stored", "plan_described", "verbatim"]

Action = Literal["prefuse", "split", "convert", "merge", "save"]
"""What a conversion does to the experts.

`convert` leaves them as the other format has them, `merge` where they are; `save` is a tree in memory.
"""
DEFAULTS = Choices()


@dataclass(frozen=True, slots=True, kw_only=True)
class Merging:
    """An adapter of `nbytes` whose updates are computed into the tensors `names`; `lines` tell how.

    That takes `base` bytes besides, and `each` more for each worker.
    """

    adapter: Path
    nbytes: int
    names: frozenset[str]
    lines: tuple[str, ...]
    base: int
    each: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do; print it with `convert.report.describe_plan`.

    `targets` are in the order of their first source tensor, so that reading goes through the input once. It has no slots, so
    that it keeps what it has counted.
    """

    source: Path
    out: Path
    action: Action
    format: str
    family: str
    layout: str
    record: Mapping[str, Any] | None
    targets: Targets
    side_files: Mapping[str, int]
    """The files that are copied as they are: name -> bytes (unknown, and 0, in a store)."""
    left_out_files: Mapping[str, int] = field(default_factory=dict)
    """Other weights and their indexes, which are copied only if that is asked for: name -> bytes."""
    never_copied: tuple[str, ...] = ()
    """Files of the input, and folders (with `/`), that no output has."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the input that the user asked to leave out, and by which option."""
    twins: tuple[tuple[str, str], ...] = ()
    """Tensors of the input that the output does not have, each with the one that has to hold the same."""
    scanned: bool | None = None
    """Whether the layers of a MaxText tree that is made are stacked."""
    keep_chunks: bool = False
    """Whether Orbax chunks stay as they are even where an array is one large chunk."""
    mesh: Mapping[str, int] | None = None
    """The devices that will restore an Orbax output, by axes of their mesh: its chunks end where their parts do."""
    shardings: Mapping[str, str] = field(default_factory=dict)
    """What such devices say of their arrays, by the arrays' names: a `NamedSharding` in Orbax' JSON."""
    remarks: tuple[str, ...] = ()
    """What could not be told of the input."""
    computed: str | None = None
    """By which rule values were computed; None where only bits are moved."""
    exact: bool = False
    """Whether what is computed comes back bit for bit by itself."""
    computed_kinds: tuple[str, ...] = ()
    """Which tensors they are, a line for each kind."""
    values: Values = NOTHING
    """What is computed of tensors of the input."""
    merging: Merging | None = None
    content: Mapping[str, Any] | None = None
    """The digest of what the input holds, and so the output, if it was asked for (`convert.verifier.content`)."""
    card: str = ""
    """What the output's model card is to say of the layout (`convert.card`); nothing where experts are not fused."""

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(first.spec.nbytes * count for first, count in self.targets.forms)

    @property
    def side_bytes(self) -> int:
        """Bytes of the side files."""
        return sum(self.side_files.values())

    @property
    def beside(self) -> dict[Path, int]:
        """The same by their places: bytes of each, 0 in a store."""
        return {self.source / name: nbytes for name, nbytes in self.side_files.items()}

    def to_dict(self) -> dict[str, Any]:
        """For programs, as `--json` has it."""
        return plan_document(self, self.targets)


def make_plan(
    reader: Reader, out: Path, action: Action, choices: Choices = DEFAULTS, *, whole: bool = True, idle: bool = False
) -> Plan:
    """Plan the conversion of an open checkpoint within its format; `whole` as for `describe`.

    With `idle`, experts that are in the wanted layout already are taken as they are.

    Raises:
        PlanError: no lossless plan exists, or there is nothing to do.
        InputError: experts are missing.
    """
    said, scan_axis = choices.source_layout, choices.scan_axis
    described = describe(reader, family=choices.family, source_layout=said, scan_axis=scan_axis, whole=whole)
    return plan_described(reader, described, out, action, choices, idle=idle)


def plan_described(
    reader: Reader, described: Description, out: Path, action: Action, choices: Choices = DEFAULTS, *, idle: bool = False
) -> Plan:
    """The same of what is described already: who asks for several plans describes once.

    Raises:
        PlanError: no lossless plan exists, or there is nothing to do.
    """
    layout, landed = choices.layout, land(reader, described, action, choices, idle=idle)
    landings = [(each, list(each.targets())) for each in landed.landings]
    others = (verbatim(reader.tensors[name]) for name in described.verbatim)
    beside = reader.side_files
    copied, left_out_files = beside.chosen(copy_all=choices.copy_all)
    if action == "split":
        record = family_record(described.family, landed.origin)
    else:
        experts = [(each.group.native, target) for each, targets in landings for target in targets]
        record = with_origin(make_record(layout, described.family, landed.wanted, experts, landed.lora), landed.origin)
    return Plan(
        source=reader.path,
        out=out,
        action=action,
        format=reader.format,
        family=described.family.name,
        layout="native" if action == "split" else layout,
        record=record,
        targets=_in_reading_order(reader, landings, [*landed.lora, *others]),
        side_files=copied,
        left_out_files=left_out_files,
        never_copied=beside.never,
        remarks=(*described.remarks, *landed.told),
        keep_chunks=choices.keep_chunks,
    )


def plan_as_stored(reader: Reader, choices: Choices = DEFAULTS) -> Plan:
    """Every tensor as it is, whatever it is: nothing is described."""
    beside = reader.side_files
    copied, left_out_files = beside.chosen(copy_all=choices.copy_all)
    record = reader.record
    return Plan(
        source=reader.path,
        out=Path(),
        action="convert",
        format=reader.format,
        family=str((record or {}).get("family", "")),
        layout=str((record or {}).get("layout", "native")),
        record=record,
        targets=Targets(map(verbatim, reader.tensors.values())),
        side_files=copied,
        left_out_files=left_out_files,
        never_copied=beside.never,
    )


def _in_reading_order(
    reader: Reader, landings: Iterable[tuple[Landing, Sequence[Target]]], others: Iterable[Target]
) -> Targets:
    order = columns(reader.tensors).rows
    found: list[tuple[int, str, Target]] = []
    for each, targets in landings:
        if each.begin_alike:
            first = order[targets[0].first_source] if targets else 0
            found += [(first, target.spec.name, target) for target in targets]
        else:
            found += [(order[target.first_source], target.spec.name, target) for target in targets]
    for target in others:
        name = target.spec.name
        found.append((order[name if target.role == "verbatim" else target.first_source], name, target))
    return Targets(target for _, _, target in sorted(found))
