"""The table of writers: what an adapter cannot say itself, its writer and the version of it do.

In: a writer by its name and version, an `adapter_config.json`. Out: packing of B, roles. It never looks at a tensor.

Sources: wheels of PEFT 0.17.0 to 0.21.2 (`tuners/lora/layer.py`; 0.19.0 and 0.19.1 changed the roles), unsloth_zoo 2026.2.1 to
2026.10.9 (2026.9.6 changed the packing), Megatron-Bridge 067f987, NeMo AutoModel 36044ad and 0.7.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts.errors import PlanError
from layouts.tables.families import FAMILIES

OUT_IN, FLAGGED, IN_OUT = "(E, out, in)", "(E, in, out) with is_transposed", "(E, in, out)"
_IN_OUT_FAMILIES: Mapping[str, str | None] = {
    "gpt_oss": FLAGGED,
    "aria": FLAGGED,
    "openai_privacy_filter": FLAGGED,
    "llama4": IN_OUT,
    "qwen3_vl_moe": None,  # changed between transformers 4.57 and 5.0
}
"""Families whose packed weights are not (E, out, in) in transformers, and how they are; None where versions differ."""
_EVERY = (OUT_IN, FLAGGED, IN_OUT)
_BRIDGE = frozenset(
    {
        *(
            "peft_type",
            "auto_mapping",
            "base_model_name_or_path",
            "bias",
            "fan_in_fan_out",
            "inference_mode",
            "init_lora_weights",
        ),
        *("lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern", "alpha_pattern", "target_modules", "task_type"),
        *("use_dora", "use_rslora", "target_parameters"),
    }
)
"""The keys that Megatron-Bridge writes, all of them and no other."""
_MARKS = {"rank_major": False, "grouped_by_expert": True}
_TURNS: Mapping[str, bool | None] = {"gpt_oss": True, "inkling": None}
"""Families in whose fused rows gate and up take turns; None where published and loaded form differ. All others: gate first."""
STAMP = "automodel_peft_config.json"
_STAMPS = {"peft-0.19.1": ("automodel", (0, 7)), "peft-0.18": ("automodel", (0, 6))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Versions `since` .. `until` (not included) of a writer.

    `grouped` is whether columns of B have the expert outermost; `reversed` are the weights for which it exchanges A and B, None
    where that depends on the PEFT below it.
    """

    name: str
    since: tuple[int, ...] = ()
    until: tuple[int, ...] = (9999,)
    grouped: bool
    reversed: tuple[str, ...] | None


WRITERS = (
    Writer(name="peft", until=(0, 19), grouped=False, reversed=(OUT_IN,)),
    Writer(name="peft", since=(0, 19), until=(0, 19, 1), grouped=False, reversed=(OUT_IN, FLAGGED)),
    Writer(name="peft", since=(0, 19, 1), grouped=False, reversed=(IN_OUT,)),
    Writer(name="unsloth", until=(2026, 9, 6), grouped=True, reversed=None),
    Writer(name="unsloth", since=(2026, 9, 6), grouped=False, reversed=None),
    Writer(name="megatron-bridge", grouped=True, reversed=_EVERY),
    Writer(name="automodel", until=(0, 7), grouped=False, reversed=_EVERY),
    Writer(name="automodel", since=(0, 7), grouped=False, reversed=()),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of a packed file, and from where; None where nothing tells. What is `marked` cannot be otherwise."""

    grouped: bool | None = None
    reversed: bool | None = None
    why: str = ""
    marked: bool = False


def orientation(family: str | None) -> str | None:
    """How the packed weights of a family lie in its module; None if it is unknown."""
    return None if family is None else _IN_OUT_FAMILIES.get(family, OUT_IN)


def interleaved(family: str | None) -> bool | None:
    """Whether gate and up take turns in the fused projection of a family; None if nobody knows."""
    return None if family is None else _TURNS.get(family, False)


def unknown_turns(family: str | None) -> str:
    """Why fused rows cannot be parted, in words."""
    return (
        "nothing in an adapter tells whether gate and up take turns in its rows (gpt_oss), or gate is first"
        f"{f', and for {family} sources disagree' if family else ''}; name the model: --family, or --base"
    )


def check_kinds(path: Path, name: str | None) -> None:
    """See that this is no adapter on experts of several kinds: which number is of which kind, it does not say.

    Raises:
        PlanError: it is one.
    """
    if any(each.kinds > 1 for each in FAMILIES if each.name == name):
        raise PlanError(
            f"{path}: layers of {name} have experts of two kinds, numbered through; adapters on them are not converted"
        )


def said(word: str, family: str | None) -> Evidence:
    """What `--from-writer peft-0.18` says.

    Raises:
        PlanError: no such writer, or a version is needed.
    """
    name, _, version = word.partition("-") if word.startswith(("peft", "unsloth", "automodel")) else (word, "", "")
    number = _version(version)
    rows = [row for row in WRITERS if row.name == name and (not version or row.since <= number < row.until)]
    if not rows or (version and not number):
        known = ", ".join(dict.fromkeys(row.name for row in WRITERS))
        raise PlanError(f"no writer is called {word!r}; known: {known}, with a version behind a dash (peft-0.18)")
    if len({row.grouped for row in rows}) > 1:
        raise PlanError(f"--from-writer={word}: its versions pack B in two ways; give the version, such as {name}-2026.9.5")
    turned = {_reversed(row, family) for row in rows}
    return Evidence(grouped=rows[0].grouped, reversed=turned.pop() if len(turned) == 1 else None, why=f"--from-writer={word}")


def written(config: Mapping[str, Any], stamp: Mapping[str, Any], family: str | None) -> Evidence:
    """What the files of an adapter say: markers, the stamp of AutoModel, a version of PEFT, the keys of Megatron-Bridge.

    Raises:
        PlanError: markers that contradict one another.
    """
    if (grouped := _marked(config)) is not None:
        return Evidence(grouped=grouped, why="lora_B_layout in adapter_config.json", marked=True)
    if isinstance(layout := stamp.get("paramwrapper_layout"), str) and layout in _STAMPS:
        name, version = _STAMPS[layout]
        row = next(row for row in WRITERS if row.name == name and row.since <= version < row.until)
        return Evidence(grouped=row.grouped, reversed=_reversed(row, family), why=f"paramwrapper_layout in {STAMP}")
    mapping = config.get("auto_mapping")
    if isinstance(mapping, dict) and mapping.get("unsloth_fixed"):
        why = "auto_mapping.unsloth_fixed without lora_B_layout, as Unsloth wrote before 2026.9.6 (else --from-writer)"
        return Evidence(grouped=True, why=why)
    if isinstance(text := config.get("peft_version"), str) and _version(text):
        found = said(f"peft-{'.'.join(map(str, _version(text)))}", family)
        return Evidence(grouped=found.grouped, reversed=found.reversed, why=f"peft_version {text} in adapter_config.json")
    if config.keys() == _BRIDGE:
        return Evidence(grouped=True, reversed=True, why="the keys of adapter_config.json, which are Megatron-Bridge's")
    return Evidence()


def _marked(config: Mapping[str, Any]) -> bool | None:
    marks: set[Any] = {config.get("lora_B_layout")}
    fused = config.get("unsloth_fused_expert_lora")
    if isinstance(fused, dict):
        marks.add(fused.get("lora_B_layout"))
        below = fused.get("parameters")
        each = below.values() if isinstance(below, dict) else ()
        marks |= {one.get("lora_B_layout") for one in each if isinstance(one, dict)}
    found = {mark for mark in marks if mark is not None}
    if len(found) > 1 or not found <= _MARKS.keys():
        listed = ", ".join(sorted(map(str, found)))
        raise PlanError(f"adapter_config.json: lora_B_layout is {listed}; it should be one of {', '.join(_MARKS)} for all")
    return _MARKS[found.pop()] if found else None


def _reversed(row: Writer, family: str | None) -> bool | None:
    if row.reversed is None or row.reversed in ((), _EVERY):
        return None if row.reversed is None else bool(row.reversed)
    lie = orientation(family)
    return None if lie is None else lie in row.reversed


def _version(text: str) -> tuple[int, ...]:
    """`0.19.1.dev0` is (0, 19, 1); nothing if it is no version."""
    found = re.match(r"\d{1,6}(?:\.\d{1,6}){0,3}", text)
    return tuple(map(int, found[0].split("."))) if found else ()
