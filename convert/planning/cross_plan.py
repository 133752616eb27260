"""The plan of a conversion from one format to the other: family, scan and record around `convert.planning.cross`. Pure.

In: an open checkpoint and choices. Out: a plan. It never reads data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.options import Choices
from convert.planning.cross import cross_targets
from convert.planning.cross_pairs import Sides, sides_of, trees_of
from convert.planning.planner import Action, Plan
from convert.planning.record import family_record, make_record
from convert.planning.targets import Target
from layouts.errors import InputError, PlanError
from layouts.files import CONFIG, RECORD
from layouts.language.layout import ROLES
from layouts.matching.candidates import record_of
from layouts.matching.lookup import find_family
from layouts.orbax.tree import COMMITTED, STEP
from layouts.reader import Reader
from layouts.tables.families import Family, maxtext
from layouts.tables.maxtext import ROOT, Tree

_FUSED = ("concat",)
"""The layouts in which MaxText has a place for `wi`, for experts that are not cut into shards."""


def make_cross_plan(reader: Reader, out: Path, action: Action, choices: Choices) -> Plan:
    """Plan HF -> Orbax (MaxText) or back. Whether the layers of a tree that is read are stacked, its names tell.

    Raises:
        PlanError: no lossless plan exists.
        InputError: tensors or `config.json` are missing.
    """
    layout, to_maxtext = choices.layout, reader.format == "hf"
    config = config_of(reader)
    found = find_family(config.get("model_type"), list(reader.tensors), where=reader.path, format="hf", override=choices.family)
    trees = trees_of(found, reader.path)
    fused = layout if action == "prefuse" else None
    if to_maxtext and fused and fused not in _FUSED:
        raise PlanError(f"{reader.path}: MaxText's tree has no place for layout {fused!r}; it can take {', '.join(_FUSED)}")
    tree, scan = (trees[0], choices.scan) if to_maxtext else tree_in(reader, trees)
    if to_maxtext:
        check_separate(reader)
        where, taken_apart = maxtext(choices.scan_axis), False
    else:
        where, taken_apart = stacked_along(reader, choices.scan_axis), is_fused(reader, choices.source_layout)
    sides = sides_of(found, where, fused, scan=scan, to_maxtext=to_maxtext, is_fused=taken_apart)
    # What Orbax keeps of a step is said anew for a tree, and says nothing of a Hugging Face checkpoint.
    beside = reader.side_files
    copied, left_out_files = beside.chosen(copy_all=choices.copy_all)
    side_files = {name: nbytes for name, nbytes in copied.items() if name.rpartition("/")[2] not in (STEP, COMMITTED)}
    left_out = tuple(name for name in reader.tensors if choices.params_only and not to_maxtext and not name.startswith(ROOT))
    targets = sorted(cross_targets(reader, tree, sides, config, set(left_out)), key=lambda target: target.spec.name)
    return Plan(
        source=reader.path,
        out=out,
        action=action,
        format="orbax" if to_maxtext else "hf",
        family=found.name,
        layout=layout if fused else ("maxtext" if to_maxtext else "native"),
        record=_record(layout, sides, targets) if fused else family_record(where) if to_maxtext else None,
        targets=tuple(targets),
        side_files=side_files,
        left_out_files=left_out_files,
        never_copied=beside.never,
        left_out=left_out,
        scanned=scan if to_maxtext else None,
    )


def tree_in(reader: Reader, trees: Sequence[Tree]) -> tuple[Tree, bool]:
    """Which of a family's trees a checkpoint of MaxText has, and whether its layers are stacked; its names tell."""
    places = [(tree, f"{ROOT}{stack.scanned}.") for tree in trees for stack in tree.stacks if stack.scanned]
    found = next((tree for tree, place in places if any(name.startswith(place) for name in reader.tensors)), None)
    return found or trees[0], found is not None


def stacked_along(reader: Reader, axis: int | None = None) -> Family:
    """The family of a MaxText tree by the axis of its layers: as asked for, else as our record says, else as MaxText has it.

    Raises:
        PlanError: the tree says otherwise.
    """
    stated = record_of(reader).get("family")
    if stated and axis is not None and stated != maxtext(axis).name:
        raise PlanError(f"{reader.path}: it was written as {stated}; do without --scan-axis {axis}")
    return find_family(None, (), where=reader.path, format="orbax", override=str(stated)) if stated else maxtext(axis)


def config_of(reader: Reader) -> Mapping[str, Any]:
    """`config.json`, which an Orbax checkpoint that came from Hugging Face has beside it."""
    if not reader.config:
        raise InputError(
            f"{reader.path / CONFIG}: not there; put the model's config.json there, it says how heads and layers lie"
        )
    return {key: value for key, value in reader.config.items() if key != RECORD}


def is_fused(reader: Reader, stated: str | None = None) -> bool:
    """Whether an Orbax tree that is read has its experts fused: as our record says, or as is `stated` where there is none."""
    record = record_of(reader)
    if record.get("layout") in _FUSED:
        return True
    if any(name.endswith(".wi") for name in reader.tensors):
        if not record.get("layout") and stated in _FUSED:
            return True
        raise PlanError(
            f"{reader.path}: it has a fused wi, and nothing says in which layout; if it is gate and up side by side, as "
            f"MaxText has it, say so with --source-layout {_FUSED[0]}, else split it first"
        )
    return False


def check_separate(reader: Reader) -> None:
    """See that the experts of a Hugging Face checkpoint are not fused.

    Raises:
        PlanError: they are.
    """
    if record_of(reader).get("layout"):
        raise PlanError(f"{reader.path}: its experts are fused already; split it first, then convert it to the other format")


def _record(layout: str, sides: Sides, targets: Iterable[Target]) -> dict[str, Any]:
    """The record of the fused experts, in the words of the format that has them."""
    owner = sides.tree if sides.to_maxtext else sides.family
    wanted = sides.maxtext if sides.to_maxtext else sides.hf
    return make_record(layout, owner, wanted, [(owner.native[0][t.role], t) for t in targets if t.role in ROLES])
