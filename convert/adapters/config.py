"""`adapter_config.json` of an output: which modules have LoRA, their ranks and alphas. Pure.

In: the settings of the input, the modules of the output with their scales. Out: the new file's object. What it says is checked
by reading it as PEFT does: every module must have its scale, those that were only copied, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convert.errors import PlanError
from layouts.adapters.forms import FORMS, Form
from layouts.adapters.patterns import Patterns
from layouts.adapters.settings import Scale, Settings

PACKING = "lora_B_layout"
_WORDS = frozenset(word for form in FORMS.values() for word in re.sub(r"^.*\{p:|\}.*$", "", form.key).split(","))
_PARAMETERS = ("gate_up_proj", "down_proj")


def adapted(
    settings: Settings, form: Form, wanted: Mapping[str, Scale], others: Sequence[str], routers: Sequence[str]
) -> dict[str, Any]:
    """The settings for another form. `others` are modules that stay as they are; `routers` those of them that route.

    Raises:
        PlanError: no patterns say all scales.
    """
    raw = dict(settings.raw)
    kept = {name: settings.scale(name) for name in others}
    rank, alpha = settings.rank, settings.alpha
    scales = {(scale.rank, scale.alpha) for scale in wanted.values()}
    if not kept and (rank, alpha) not in scales:
        rank, alpha = Counter((s.rank, s.alpha) for s in wanted.values()).most_common(1)[0][0]
        raw |= {"r": rank, "lora_alpha": alpha}
    ranks = {name: scale.rank for name, scale in wanted.items()}
    alphas = {name: scale.alpha for name, scale in wanted.items()}
    raw["rank_pattern"] = _patterns(ranks, {n: s.rank for n, s in kept.items()}, rank, settings.ranks)
    raw["alpha_pattern"] = _patterns(alphas, {n: s.alpha for n, s in kept.items()}, alpha, settings.alphas)
    raw |= _targets(raw, form, wanted, others, routers)
    raw |= _marks(raw, form)
    _check(Settings.of(raw, f"the new {settings.where}"), {**wanted, **kept})
    return raw


def _check(found: Settings, wanted: Mapping[str, Scale]) -> None:
    for name, scale in wanted.items():
        if found.scale(name) != scale:
            raise PlanError(
                f"{name}: no pattern gives it rank {scale.rank} and alpha {scale.alpha}, and leaves the others alone"
            )


def _patterns(
    wanted: Mapping[str, Any], kept: Mapping[str, Any], default: Any, before: Patterns
) -> dict[str, Any]:  # fmt: skip
    """Patterns for these values: one for each kind of module where that does not touch the others, else each name."""
    stay = {key for name in kept if (key := before.key(name)) is not None}
    old = {key: value for key, value in before.values.items() if key in stay}
    left = Patterns.of(old, "patterns")
    groups: dict[str, dict[str, Any]] = {}
    for name, value in wanted.items():
        groups.setdefault(name.rpartition(".")[2], {})[name] = value
    found: dict[str, Any] = {}
    for word, group in groups.items():
        if all(value == default and left.key(name) is None for name, value in group.items()):
            continue
        found |= _shortest(word, group, kept)
    return {**found, **old}


def _shortest(word: str, group: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    value = next(iter(group.values()))
    if all(each == value for each in group.values()):
        for key in (rf".*\.{word}", rf".*\.experts\.{word}", rf".*\.experts\.\d+\.{word}"):
            one = Patterns.of({key: value}, "patterns")
            if all(one.key(name) for name in group) and not any(one.key(name) for name in kept):
                return {key: value}
    return {name: each for name, each in group.items() if each is not None}


def _targets(
    raw: Mapping[str, Any], form: Form, wanted: Mapping[str, Scale], others: Sequence[str], routers: Sequence[str]
) -> dict[str, Any]:
    """`target_modules` and `target_parameters`: what the file really has."""
    words = list(dict.fromkeys(name.rpartition(".")[2] for name in wanted))
    modules, parameters = raw.get("target_modules"), raw.get("target_parameters")
    held = [name for name in (parameters if isinstance(parameters, list) else []) if not _of_experts(str(name))]
    held = [name for name in held if not any(f".{router}.weight".endswith(f".{name}") for router in routers)]
    plain = [name for name in others if name not in routers or form.per_expert]
    named = _named(modules, plain)
    if form.of_parameters:
        ours = dict.fromkeys(f"{_below_layer(name)}" for name in wanted)
        gates = dict.fromkeys(f"{_below_layer(name)}.weight" for name in routers)
        first = sorted(ours, key=lambda name: not name.endswith("gate_up_proj"))
        return {"target_modules": named, "target_parameters": [*first, *gates, *held], "lora_dropout": 0.0}
    return {"target_modules": list(dict.fromkeys([*named, *words])), "target_parameters": held or None}


def _named(modules: Any, others: Iterable[str]) -> list[str]:
    """The words that still name a module of the file; those that name experts, too, are written out."""
    listed = [str(word) for word in modules] if isinstance(modules, list) else []
    found: dict[str, None] = {}
    for name in others:
        word = next((word for word in listed if name == word or name.endswith(f".{word}")), None)
        found[name if word is None or word.rpartition(".")[2] in _WORDS else word] = None
    order = {word: at for at, word in enumerate(listed)}
    return sorted(found, key=lambda word: order.get(word, len(order)))


def _of_experts(name: str) -> bool:
    return name.rpartition(".")[2] in _PARAMETERS


def _below_layer(module: str) -> str:
    """`mlp.experts.gate_up_proj`: what stands behind the number of the layer."""
    parts = module.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _marks(raw: dict[str, Any], form: Form) -> dict[str, Any]:
    """Unsloth's marker for the packing of B, where nothing else would tell, or an old one stands there."""
    mapping = raw.get("auto_mapping")
    unsloth = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    needed = PACKING in raw or "unsloth_fused_expert_lora" in raw or unsloth or "peft_version" not in raw or form.grouped
    for key in (PACKING, "unsloth_fused_expert_lora"):
        raw.pop(key, None)
    if not (form.wrapped and form.rank == 2 and needed):
        return {}
    return {PACKING: "grouped_by_expert" if form.grouped else "rank_major"}
