"""Look at a checkpoint as a conversion would, without weights: the answer to `--inspect`.

In: a path and what the user says of it. Out: an `Inspection`. It reads no data but single scales, and never writes; what it
says of `--prefuse` and `--split` is what their plans say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from convert.answers.inspection import Blocks, Inspection
from convert.answers.tables import made_for
from convert.errors import ConvertError, PlanError, UsageError, readable
from convert.options import Choices
from convert.options.values import counted
from convert.options.values import in_units as size
from convert.planning.landings import land
from convert.planning.planner import Action
from layouts.checkpoint import growing, is_adapter, open_checkpoint
from layouts.disk.files import CONFIG, INDEX, RECORD
from layouts.disk.places import place
from layouts.language.parts import CHUNKS
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description, describe
from layouts.matching.group import Group
from layouts.matching.packing import WEIGHTS
from layouts.matching.scales import Scales, notes
from layouts.reader import Reader, is_chunked, remarks_of
from layouts.tables.family import Family
from layouts.tables.natives import SOURCES
from layouts.tensors import columns

_AXES = frozenset({"e", "k", "g", "n", "d", *CHUNKS})
_OUT = "OUT"
"""The name of an output that nobody makes."""


def inspected(path: str | Path, choices: Choices) -> Inspection:
    """See `convert.inspect`."""
    with readable(path), growing(), closing(open_checkpoint(path)) as reader:
        facts = _facts(path, reader)
        if is_adapter(place(path)):
            return Inspection(**facts, **_adapter(place(path), choices))
        if choices.scan_axis is not None and not is_chunked(reader):
            raise UsageError(f"--scan-axis is for MaxText trees, and {path} is none")
        try:
            asked = {"family": choices.family, "source_layout": choices.source_layout, "scan_axis": choices.scan_axis}
            described = describe(reader, **asked)  # type: ignore[arg-type]
        except ConvertError as problem:
            why = f"cannot: {str(problem).removeprefix(f'{reader.path}: ')}"
            said = {"quantisation": _quantisation(reader.config, ())}
            return Inspection(**facts | _nothing(why, "cannot, for the same reason") | said, problem=problem)
        return Inspection(**facts, **_described(reader, described, choices))


def _facts(path: str | Path, reader: Reader) -> dict[str, Any]:
    """What needs no family."""
    dtypes = columns(reader.tensors).nbytes
    carried, left_out = reader.side_files.chosen(copy_all=False, gate=False)
    return {
        "path": str(path),
        "format": reader.format,
        "files": len(reader.headers),
        "tensors": len(reader.tensors),
        "nbytes": sum(dtypes.values()),
        "dtypes": dict(sorted(dtypes.items(), key=lambda entry: -entry[1])),
        "indexed": is_chunked(reader) or (reader.path / INDEX).exists(),
        "side_files": carried,
        "left_out": tuple(left_out),
    }


def _nothing(prefuse: str, split: str) -> dict[str, Any]:
    """What is said of experts that cannot be told, or that are none of a model's."""
    empty = {"family": None, "told_by": "", "layout": None, "recorded": (), "blocks": (), "quantisation": None}
    return empty | {"prefuse": prefuse, "split": split, "made_for": None, "remarks": ()}


def _adapter(path: Path, choices: Choices) -> dict[str, Any]:
    """What the plans of an adapter say.

    Raises:
        UsageError: an option is for checkpoints.
    """
    from convert.adapters.write import open_and_plan

    def would(action: Action) -> str:
        try:
            reader, plan = open_and_plan(path, Path(_OUT), action, choices)
        except UsageError:
            raise
        except ConvertError as problem:
            return f"cannot: {problem}"
        reader.close()
        return f"writes form {plan.way.target.name} (this is form {plan.way.source.name}), {size(plan.nbytes)}"

    return _nothing(would("prefuse"), would("split"))


def _described(reader: Reader, described: Description, choices: Choices) -> dict[str, Any]:
    record = record_of(reader)
    blocks = tuple(_blocks(described))
    layout = record.get("layout") or ", ".join(dict.fromkeys(each.layout for each in blocks))
    relaid = any(group.relaid for group in described.groups)
    return {
        "family": described.family.name,
        "told_by": _told_by(reader, described, choices),
        "layout": layout,
        "recorded": tuple(_places(reader)) if "layout" in record else ("--source-layout",) if choices.source_layout else (),
        "blocks": blocks,
        "quantisation": _quantisation(reader.config, blocks),
        "prefuse": _would(reader, described, "prefuse", choices),
        "split": _would(reader, described, "split", choices),
        "made_for": made_for(str(layout)) if relaid else None,
        "remarks": (*described.remarks, *remarks_of(reader), *_loras(described), *notes(reader, _scales(described))),
    }


def _loras(described: Description) -> Iterator[str]:
    if described.loras:
        yield f"LoRA of gate and up, {len(described.loras)} tensors, first {described.loras[0]}: it goes where they go"


def _scales(described: Description) -> Iterator[Scales]:
    for group in (group for group in described.groups if group.role == "wi"):
        yield Scales(
            part=group.part, dims=group.dims, dtype=group.dtype, placed=group.placed, index=group.index, sizes=group.sizes
        )


def _told_by(reader: Reader, described: Description, choices: Choices) -> str:
    family, record = described.family, record_of(reader)
    if choices.family:
        return "--family"
    if record.get("family"):
        return "the record of this tool"
    if family.by_structure:
        return "the structure of the tree"
    stated = reader.config.get("model_type")
    if family.by_names and choices.source_layout:
        return "its layout, which --source-layout says"
    if family.by_names:
        found = f"model_type {stated!r} is not in the table" if stated else "config.json names no model_type"
        return f"the names of its experts ({found})"
    return f"model_type {stated!r} in {CONFIG}" if stated in family.model_types else f"the model_type of a part in {CONFIG}"


def _places(reader: Reader) -> Iterator[str]:
    """Where the record stands; headers are counted."""
    if RECORD in reader.config:
        yield CONFIG
    headers = [name for name in reader.records if name.endswith(".safetensors")]
    yield from (name for name in reader.records if name not in headers)
    if headers:
        yield counted(len(headers), "header")


def _blocks(described: Description) -> Iterator[Blocks]:
    """Blocks that are alike, with how many there are; a stack of layers counts as many."""
    companions: dict[frozenset[Any], set[str]] = defaultdict(set)
    for group in described.groups:
        if group.part:
            companions[frozenset(group.index.items())].add(group.part)
    counts: dict[tuple[Any, ...], int] = defaultdict(int)
    for group in described.groups:
        if group.role == "wi" and group.part in WEIGHTS:
            stacked = math.prod(at for axis, at in group.sizes.items() if axis not in _AXES)
            beside = tuple(sorted(companions[frozenset(group.index.items())]))
            counts[(*_kind(group, described.family), group.dtype, beside, group.packed)] += stacked
    for (layout, names, axes, e, k, n, dtype, beside, packed), layers in counts.items():
        yield Blocks(
            layout=layout, names=names, axes=axes, layers=layers, experts=e, embed=k, mlp=n, dtype=dtype,
            companions=beside, packed=packed,
        )  # fmt: skip


def _kind(group: Group, family: Family) -> tuple[str, str, str, int, int, int]:
    name = next((name for name, table in SOURCES.items() if family.own(table)["wi"] == group.layout), "re-laid")
    return name, group.placed.key.text, group.layout.pattern, group.total("e"), group.sizes.get("k", 0), group.total("n")


def _quantisation(config: Mapping[str, Any], blocks: tuple[Blocks, ...]) -> str | None:
    """What `config.json` says, or else the scales beside the weights."""
    found: Mapping[str, Any] = next(
        (config[word] for word in ("quantization_config", "quantization") if isinstance(config.get(word), Mapping)), {}
    )
    method = next((str(found[word]) for word in ("quant_method", "quant_algo", "mode") if word in found), None)
    beside = sorted({part for each in blocks for part in each.companions if part != "bias"})
    words = [f"{method} ({CONFIG})"] if method else []
    return ", ".join([*words, *([f"experts with {', '.join(beside)}"] if beside else [])]) or None


def _would(reader: Reader, described: Description, action: Action, choices: Choices) -> str:
    """What the plan of an action says, with the usual choices."""
    try:
        if is_chunked(reader):
            from layouts.orbax.state import with_optimizer

            reader = with_optimizer(reader, drop=False)
        landed = land(reader, described, action, choices)
    except PlanError as problem:
        text = str(problem).removeprefix(f"{reader.path}: ")
        return text if "nothing to" in text else f"cannot: {text}"
    layout = f"layout {choices.layout}" if action == "prefuse" else "gate and up apart, as they were"
    lora = f"{len(landed.lora):,} of LoRA, " if landed.lora else ""
    others = f"{lora}{counted(len(described.verbatim), 'other')} copied"
    return f"writes {layout}: {counted(landed.count, 'expert tensor')}, {others}, {size(landed.nbytes)}"
