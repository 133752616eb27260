"""The plan: every tensor of the output, and where each of its elements comes from. Pure; reads names and shapes only.

In: an open checkpoint and choices. Out: a plan. It never reads data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from convert.options import Choices
from convert.planning.documents import plan_document
from convert.planning.record import family_record, make_record, with_origin
from convert.planning.relay import Landing, landing
from convert.planning.targets import Piece, Target, Way
from layouts.errors import PlanError
from layouts.language.layout import Layouts, Placed
from layouts.language.pattern import identity
from layouts.language.template import Template
from layouts.matching.describe import Description, describe
from layouts.matching.group import Group
from layouts.matching.origin import origin_of
from layouts.reader import Reader
from layouts.tables.targets import TAKE_SCALARS, target
from layouts.tensors import TensorSpec

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
    computed_kinds: tuple[str, ...] = ()
    """Which tensors they are, a line for each kind."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """By what the values of tensors of the input are multiplied."""
    merging: Merging | None = None
    content: Mapping[str, Any] | None = None
    """The digest of what the input holds, and so the output, if it was asked for (`convert.verifier.content`)."""
    card: str = ""
    """What the output's model card is to say of the layout (`convert.card`); nothing where experts are not fused."""

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(target.spec.nbytes for target in self.targets)

    @property
    def side_bytes(self) -> int:
        """Bytes of the side files."""
        return sum(self.side_files.values())

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
    layout = choices.layout
    wanted = target(layout, described.family, shards=choices.shards, align=choices.align, block=choices.glu_block)
    origin = origin_of(reader, choices.family)
    landings = list(_experts(reader, described, None if action == "split" else wanted))
    if action == "prefuse" and (layout not in TAKE_SCALARS or described.family.by_structure):
        _check_scalars(reader, described, layout)
    if not idle and not any(each.way.moved for each in landings):
        state = "as they were published" if action == "split" else f"in layout {layout!r}"
        raise PlanError(f"{reader.path}: all experts are {state} already; there is nothing to {action}")
    experts = [(each.group.native, made) for each in landings for made in each.targets()]
    found = [made for _, made in experts]
    found += [verbatim(reader.tensors[name]) for name in described.verbatim]
    _check_names(reader, found)
    beside = reader.side_files
    copied, left_out_files = beside.chosen(copy_all=choices.copy_all)
    return Plan(
        source=reader.path,
        out=out,
        action=action,
        format=reader.format,
        family=described.family.name,
        layout="native" if action == "split" else layout,
        record=family_record(described.family, origin)
        if action == "split"
        else with_origin(make_record(layout, described.family, wanted, experts), origin),
        targets=_in_reading_order(reader, found),
        side_files=copied,
        left_out_files=left_out_files,
        never_copied=beside.never,
        remarks=described.remarks,
        keep_chunks=choices.keep_chunks,
    )


def plan_as_stored(reader: Reader, choices: Choices = DEFAULTS) -> Plan:
    """Every tensor as it is, whatever it is: nothing is described."""
    targets = tuple(map(verbatim, reader.tensors.values()))
    _check_names(reader, list(targets))
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
        targets=targets,
        side_files=copied,
        left_out_files=left_out_files,
        never_copied=beside.never,
    )


def _experts(reader: Reader, described: Description, wanted: Layouts | None) -> Iterator[Landing]:
    """Where the experts land; where nothing is wanted, as they were before, or as the family is published."""
    beside: dict[tuple[str, Any], list[Group]] = {}
    for group in described.groups:
        beside.setdefault((group.role, frozenset(group.index.items())), []).append(group)
    for groups in beside.values():
        for group in groups:
            before = group.native if group.relaid else described.family.native[0][group.role]
            layout = wanted[group.role] if wanted else before
            yield landing(reader, group, groups, layout, described.family.experts, bare=bool(wanted))


def _check_scalars(reader: Reader, described: Description, layout: str) -> None:
    consumer, way = f"layout {layout!r}", ". Use a layout that keeps (E, 2), as concat or vllm do"
    if described.family.by_structure:
        consumer, way = "MaxText's wi", ""
    for group in described.groups:
        if group.role == "wi" and group.part and not {"in", "out", "rest", "both", "all"} & set(group.dims.split()):
            raise PlanError(
                f"{reader.path}: {group.names[0]} is one number for gate, and another stands for up; {consumer} "
                f"has room for one, and to make them one would change values{way}"
            )


def _in_reading_order(reader: Reader, targets: Sequence[Target]) -> tuple[Target, ...]:
    order = {name: position for position, name in enumerate(reader.tensors)}
    first = {id(t): order[_first_source(t)] for t in targets}
    return tuple(sorted(targets, key=lambda t: (first[id(t)], t.spec.name)))


def _first_source(target: Target) -> str:
    if target.role == "verbatim":
        return target.spec.name
    return target.first_source


def verbatim(spec: TensorSpec) -> Target:
    """A tensor of the output that is named and stored as in the input."""
    same = Placed(Template(spec.name, literal=True), identity(len(spec.shape)))
    sizes = dict(zip(same.pattern.axes, spec.shape, strict=True))
    return Target(spec=spec, index={}, way=Way(role="verbatim", sizes=sizes, source_sizes=sizes, source=same, target=same))


def _check_names(reader: Reader, targets: list[Target]) -> None:
    """Each name is given once, and the logical sizes of what is read and written agree."""
    seen: set[str] = set()
    for name in (made.spec.name for made in targets):
        if name in seen:
            raise PlanError(f"{reader.path}: two tensors of the output would be called {name}")
        seen.add(name)
    padded = any(side.pattern.padding for made in targets for side in (made.source, made.target))
    bytes_in, bytes_out = (sum(s.nbytes for s in specs) for specs in (reader.tensors.values(), (t.spec for t in targets)))
    if bytes_in != bytes_out and not padded:
        raise PlanError(f"{reader.path}: the plan reads {bytes_in} bytes but writes {bytes_out}; this is a bug, report it")
