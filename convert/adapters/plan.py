"""The plan of an adapter's conversion: every tensor of the output, its place in the file, the new settings.

In: an open adapter and choices. Out: an `AdapterPlan`. It reads data only to see whether gate and up share A, or whether B is
block diagonal, one block at a time; it never writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.adapters.making import Making, Way, look_at, specs
from convert.adapters.outline import config_of_output, file_for, kept_record, record_of, restored, stamp_text
from convert.adapters.recipes import recipes
from convert.commit import manifest
from convert.errors import PlanError, UsageError
from convert.hf.shards import File
from convert.options import Choices
from convert.options.evidence import known_of
from convert.planning.documents import plan_document
from layouts.adapters.describe import Description, describe
from layouts.adapters.forms import DEFAULTS, FORMS, GATE_UP, Form
from layouts.adapters.opening import config_of
from layouts.adapters.settings import CONFIG, Settings
from layouts.adapters.units import Block
from layouts.adapters.writers import check_kinds, interleaved, unknown_turns
from layouts.reader import Reader
from layouts.tables.families import FAMILIES
from layouts.tables.natives import PER_EXPERT_W123
from layouts.tensors import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """What the conversion of an adapter will do; `str` is what `--dry-run` prints.

    `copied` are the other tensors: their names in the output -> in the input. `texts` are the files that are made anew.
    """

    source: Path
    out: Path
    action: str
    described: Description
    way: Way
    makings: tuple[Making, ...]
    copied: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    file: File
    texts: Mapping[str, str]
    record: Mapping[str, Any] | None
    restored: bool
    """Whether file and settings are the original ones, which the input remembers."""
    remarks: tuple[str, ...]
    side_files: Mapping[str, int]
    left_out_files: Mapping[str, int]
    never_copied: tuple[str, ...]
    peak: int
    card: str = ""
    """What the output's model card is to say of the form (`convert.card`)."""

    @property
    def family(self) -> str | None:
        """The family of the model, if it is known."""
        return self.described.known.family

    @property
    def layout(self) -> str:
        """The name of the form that is made."""
        return self.way.target.name

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data in the output."""
        return sum(spec.nbytes for spec in self.specs.values())

    def to_dict(self) -> dict[str, Any]:
        """For programs, as `--json` has it: the layout is a form."""
        return plan_document(self, self.specs)


def make_plan(reader: Reader, out: Path, action: str, choices: Choices) -> AdapterPlan:
    """Plan the conversion of an open adapter.

    Raises:
        UsageError: choices that are none of an adapter's.
        InputError, PlanError: see `layouts.adapters.describe` and `convert.adapters.recipes`.
    """
    if action not in ("prefuse", "split"):
        raise UsageError(f"{reader.path} is an adapter: --prefuse or --split it; --to is for checkpoints")
    record = reader.record or {}
    described = _described(reader, record, choices)
    target = _target(reader, described, action, choices, record)
    way, said = _way(reader, described, target, record)
    makings = tuple(_making(reader, described, block, way, record) for block in described.blocks)
    copied = _copied(reader, described, makings)
    found = _specs(reader, makings, copied, way.target)
    config = config_of_output(described, way, makings, copied)
    texts = {CONFIG: json.dumps(config, indent=2) + "\n", **stamp_text(reader, way)}
    made = record_of(described, way, makings, record)
    back = way.target.name == record.get("from") and not way.target.fused  # a fused original would not say of which family
    original = restored(reader, found, config) if back else None
    file, texts[CONFIG] = original or (file_for(reader, found, made), texts[CONFIG])
    return AdapterPlan(
        source=reader.path,
        out=out,
        action=action,
        described=described,
        way=way,
        makings=makings,
        copied=copied,
        specs=found,
        file=file,
        texts=texts,
        record=kept_record(file) if original else made,
        restored=original is not None,
        remarks=(*described.remarks, *said, *_counted(described, way), *_dropped(described.settings, way)),
        **_beside(reader, choices, texts),
        peak=_peak(reader, makings, found, way),
    )


def _described(reader: Reader, record: Mapping[str, Any], choices: Choices) -> Description:
    config = config_of(reader.path)
    found = describe(reader, Settings.of(config, CONFIG), known_of(reader, config, record, choices))
    check_kinds(reader.path, found.known.family)
    return found


def _target(reader: Reader, described: Description, action: str, choices: Choices, record: Mapping[str, Any]) -> Form:
    """The form that is asked for: by its name, else what the input was, else what its family is published as."""
    name = choices.layout if action == "prefuse" and choices.layout != Choices().layout else DEFAULTS[action]
    if action == "split":
        family = next((each for each in FAMILIES if each.name == described.known.family), None)
        words = family is not None and any(native is PER_EXPERT_W123 for native in family.native[:1])
        before = FORMS.get(str(record.get("from")))
        name = before.name if before and not before.fused else "per-expert-w123" if words else name
        if not described.form.fused:
            raise PlanError(f"{reader.path}: gate and up are apart already (form {described.form.name}); nothing to split")
    if name not in FORMS:
        raise UsageError(f"no form of adapters is called {name!r}; known: {', '.join(FORMS)}")
    if described.form.name == name:
        raise PlanError(f"{reader.path} is in form {name!r} already; there is nothing to {action}")
    return FORMS[name]


def _way(reader: Reader, described: Description, target: Form, record: Mapping[str, Any]) -> tuple[Way, tuple[str, ...]]:
    """Whether gate and up take turns in fused rows: only the family tells, and per expert none of the table does."""
    source, family = described.form, described.known.family
    turns = interleaved(family) if family else record.get("turns")
    if source.fused == target.fused or isinstance(turns, bool):
        return Way(source=source, target=target, turns=turns is True), ()
    if source.fused or family is not None:
        raise PlanError(f"{reader.path}: {unknown_turns(family)}")
    said = "gate's rows before up's: no family with adapters per expert has them otherwise (gpt_oss: --family gpt_oss)"
    return Way(source=source, target=target, turns=False), (said,)


def _making(reader: Reader, described: Description, block: Block, way: Way, record: Mapping[str, Any]) -> Making:
    kinds = {frozenset(GATE_UP if unit in ("gate", "up") else unit for unit in each.units) for each in described.blocks}
    if way.target.wrapped and len(kinds) > 1:
        raise PlanError(f"{reader.path}: layers have adapters on other projections each, which {way.target.name} cannot hold")
    hints = found if isinstance(found := record.get("gate_up"), dict) else {}
    hint = found if isinstance(found := hints.get(block.path), dict) else {}
    seen = look_at(reader, block, way, hint)
    path = _path(block.path, way.target, described.known.family, record)
    return Making(block=block, path=path, recipes=recipes(block, way.target, seen))


def _path(path: str, form: Form, family: str | None, record: Mapping[str, Any]) -> str:
    """What stands before the experts; transformers 5 calls Mixtral's `block_sparse_moe` `mlp`."""
    stem, _, last = path.rpartition(".")
    if last == "block_sparse_moe" and form.fused and not form.per_expert:
        return f"{stem}.mlp"
    twice = any(each.name == family and "block_sparse_moe,mlp" in each.experts for each in FAMILIES)
    back = last == "mlp" and form.name == "per-expert-w123" and (twice or record.get("place") == "block_sparse_moe")
    return f"{stem}.block_sparse_moe" if back else path


def _specs(reader: Reader, makings: tuple[Making, ...], copied: Mapping[str, str], form: Form) -> dict[str, TensorSpec]:
    """Every tensor of the output."""
    found = {spec.name: spec for making in makings for spec in specs(making, form)}
    for name, stored in copied.items():
        if name in found:
            raise PlanError(f"{reader.path}: {stored} has the name of a tensor that the output needs")
        found[name] = replace(reader.tensors[stored], name=name)
    return found


def _beside(reader: Reader, choices: Choices, texts: Mapping[str, str]) -> dict[str, Any]:
    """Which files beside the tensors are carried over, left out and never copied."""
    files, own = reader.side_files, {*texts, manifest.NAME}
    plain, left = files.chosen(copy_all=choices.copy_all)
    return {
        "side_files": {name: size for name, size in plain.items() if name not in own},
        "left_out_files": {name: size for name, size in left.items() if name not in own},
        "never_copied": files.never,
    }


def _counted(described: Description, way: Way) -> Iterator[str]:
    """How many experts there are said to be, where names alone tell: the last may be missing in all layers."""
    if way.source.per_expert and not way.target.per_expert and "e" not in described.known.sizes:
        count = next(unit.experts for unit in described.blocks[0].units.values())
        yield f"{count} experts, by the highest number in a name; --base compares it with the model"


def _dropped(settings: Settings, way: Way) -> Iterator[str]:
    """What a setting was, where the new form takes no other value."""
    if way.target.of_parameters and (dropout := settings.raw.get("lora_dropout")):
        yield f"lora_dropout was {dropout} and is 0.0 now: PEFT takes no other for packed experts"


def _copied(reader: Reader, described: Description, makings: tuple[Making, ...]) -> dict[str, str]:
    """The names of all other tensors in the output -> as they are stored."""
    moved = {each.block.path: each.path for each in makings}
    for name in described.others:
        if ".experts." in name:
            raise PlanError(
                f"{reader.path}: {name} is a whole tensor of experts that have LoRA, and other forms have no place for it; "
                "merge the adapter (--merge)"
            )
    return {_moved(name, moved): stored for name, stored in described.others.items()}


def _moved(name: str, paths: Mapping[str, str]) -> str:
    """The new name of what stands beside experts whose module has another name now (its router)."""
    for old, new in paths.items():
        if old != new and name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def _peak(reader: Reader, makings: tuple[Making, ...], found: Mapping[str, TensorSpec], way: Way) -> int:
    """Bytes that the largest block takes: as it is stored, in the neutral form, and as it will be."""
    peak = max((spec.nbytes for spec in found.values()), default=0)
    for making in makings:
        units = making.block.units.values()
        taken = sum(reader.tensors[name].nbytes for unit in units for names in unit.names for name in names)
        peak = max(peak, 3 * (taken + sum(spec.nbytes for spec in specs(making, way.target))))
    return peak
