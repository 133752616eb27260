"""The plan of a conversion from one format to the other: family, scan and record around `convert.cross`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.cross import cross_targets
from convert.cross_pairs import Sides, layouts_of, trees_of
from convert.planner import Action, Plan
from convert.record import make_record
from convert.targets import Target
from layouts.checkpoint import Reader
from layouts.errors import InputError, PlanError
from layouts.families import FAMILIES
from layouts.hf import CONFIG, RECORD, read_json
from layouts.layout import ROLES
from layouts.lookup import find_family
from layouts.maxtext import ROOT, Tree

_FUSED = ("concat",)
"""The layouts in which MaxText has a place for `wi`, for experts that are not cut into shards."""


def make_cross_plan(
    reader: Reader,
    out: Path,
    to: str,
    action: Action,
    *,
    layout: str,
    family: str | None,
    scan: bool,
    params_only: bool = False,
) -> Plan:
    """Plan HF -> Orbax (MaxText) or back.

    `scan` is for MaxText trees to be written: layers stacked, or a subtree for each. A tree that is read says so itself.
    `params_only` leaves out what else a training checkpoint holds: step, optimizer state.

    Raises:
        PlanError: no lossless plan exists.
        InputError: tensors or `config.json` are missing.
    """
    config = config_of(reader)
    found = find_family(config.get("model_type"), list(reader.tensors), where=reader.path, format="hf", override=family)
    trees = trees_of(found, reader.path)
    fused = layout if action == "prefuse" else None
    if to == "orbax" and fused and fused not in _FUSED:
        raise PlanError(f"{reader.path}: MaxText's tree has no place for layout {fused!r}; it can take {', '.join(_FUSED)}")
    tree, scan = (trees[0], scan) if to == "orbax" else tree_in(reader, trees)
    sides = layouts_of(found, fused, scan=scan, to_maxtext=to == "orbax", is_fused=is_fused(reader))
    left_out = tuple(name for name in reader.tensors if params_only and to == "hf" and not name.startswith(ROOT))
    targets = sorted(cross_targets(reader, tree, sides, config, set(left_out)), key=lambda target: target.spec.name)
    return Plan(
        source=reader.path,
        out=out,
        action=action,
        format=to,
        family=found.name,
        layout=layout if fused else ("maxtext" if to == "orbax" else "native"),
        record=_record(layout, sides, targets) if fused else None,
        targets=tuple(targets),
        side_files=tuple(reader.side_files),
        left_out=left_out,
    )


def tree_in(reader: Reader, trees: Sequence[Tree]) -> tuple[Tree, bool]:
    """Which of a family's trees a checkpoint of MaxText has, and whether its layers are stacked; its names tell."""
    places = [(tree, f"{ROOT}{stack.scanned}.") for tree in trees for stack in tree.stacks if stack.scanned]
    found = next((tree for tree, place in places if any(name.startswith(place) for name in reader.tensors)), None)
    return found or trees[0], found is not None


def config_of(reader: Reader) -> Mapping[str, Any]:
    """`config.json`, which an Orbax checkpoint that came from Hugging Face has beside it."""
    if reader.config:
        return {key: value for key, value in reader.config.items() if key != RECORD}
    if not (reader.path / CONFIG).is_file():
        raise InputError(
            f"{reader.path / CONFIG}: not there; put the model's config.json there, it says how heads and layers lie"
        )
    found = read_json(reader.path / CONFIG)
    if not isinstance(found, dict):
        raise InputError(f"{reader.path / CONFIG}: expected a JSON object, found {type(found).__name__}")
    return found


def is_fused(reader: Reader) -> bool:
    """Whether an Orbax tree that is read has its experts fused; our record says so, and only that is believed."""
    record = reader.record or {}
    if isinstance(record, Mapping) and record.get("layout") in _FUSED:
        return True
    if reader.format == "orbax" and any(name.endswith(".wi") for name in reader.tensors):
        raise PlanError(f"{reader.path}: it has a fused wi without our record; split it first, with --source-layout")
    if record and reader.format == "hf":
        raise PlanError(f"{reader.path}: its experts are fused already; split it first, then convert it to the other format")
    return False


def _record(layout: str, sides: Sides, targets: Iterable[Target]) -> dict[str, Any]:
    """The record of the fused experts, in the words of the format that has them."""
    owner = next(each for each in FAMILIES if each.format == "orbax") if sides.to_maxtext else sides.family
    wanted = sides.maxtext if sides.to_maxtext else sides.hf
    return make_record(layout, owner, wanted, [(owner.native[0][t.role], t) for t in targets if t.role in ROLES])
