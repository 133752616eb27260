"""What of a checkpoint is wanted in memory: the plan, and how its tensors are called and held.

In: an open checkpoint, a layout, names. Out: a plan whose targets are the leaves, and their names. It never reads data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from convert.errors import UsageError, did_you_mean, readable
from convert.options import Choices
from convert.planning.across.plan import make_cross_plan
from convert.planning.across.rooted import rooted
from convert.planning.choices import check
from convert.planning.forms import Targets
from convert.planning.planner import Action, Plan, make_plan, plan_as_stored
from layouts.checkpoint import FORMATS, is_adapter, open_checkpoint
from layouts.dequantize import dequantized
from layouts.disk.places import place
from layouts.reader import Reader, is_chunked
from layouts.tables.maxtext import ROOT
from layouts.tables.targets import TARGETS

Names = Literal["hf", "maxtext"] | Callable[[str], str] | tuple[Literal["hf", "maxtext"], Callable[[str], str]] | None
"""Whose names, or what a function makes of each: of those of the checkpoint, or of theirs."""
NATIVE = "native"
"""The word for experts as they were published, gate and up apart."""
_FORMATS = {"hf": "hf", "maxtext": "orbax"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The plan, the name that each of its tensors has in memory, and whether names are nested."""

    plan: Plan
    names: Mapping[str, str]
    nested: bool


def opened(path: str | Path, choices: Choices) -> Reader:
    """Open a checkpoint as a conversion does; the caller closes it.

    Raises:
        InputError: it is missing or corrupt.
        UsageError: it is a LoRA adapter.
    """
    if is_adapter(place(path)):
        raise UsageError(f"{path}: a LoRA adapter; load it with peft, and convert it with convert.prefuse and convert.split")
    with readable(path):
        reader = open_checkpoint(path)
        if choices.dequantize:
            reader = dequantized(reader)
        return _with_optimizer(reader, drop=True) if choices.drop_optimizer else reader


def named_for(names: Names, reader: Reader) -> Reader:
    """The checkpoint in the names that the tables have, where those of the other format are wanted of it."""
    return rooted(reader) if _whose(names)[0] == "hf" else reader


def _with_optimizer(reader: Reader, *, drop: bool) -> Reader:
    if not is_chunked(reader):
        return reader
    from layouts.orbax.state import with_optimizer  # not without TensorStore

    return with_optimizer(reader, drop=drop)


def request(reader: Reader, layout: str | None, names: Names, choices: Choices) -> Request:
    """Plan what is wanted.

    Raises:
        UsageError: a layout or names that do not exist.
        PlanError: no lossless plan exists.
        InputError: experts are missing.
    """
    if layout not in (None, NATIVE, *TARGETS):
        known = ", ".join((NATIVE, *TARGETS))
        hint = did_you_mean(layout, (NATIVE, *TARGETS)) if isinstance(layout, str) else ""
        raise UsageError(f"layout: {layout!r} is none{hint}; known: {known}, and None for as it is stored")
    whose, called = _whose(names)
    kind = reader.format if whose is None else _FORMATS[whose]
    with readable(reader.path):
        plan = _plan(reader, layout, kind, choices)
    if choices.params_only and is_chunked(reader) and FORMATS[plan.format].chunked:
        plan = replace(plan, targets=Targets(target for target in plan.targets if target.spec.name.startswith(ROOT)))
    found = [target.spec.name for target in plan.targets]
    return Request(plan=plan, names=_called(found, called), nested=kind == "orbax" and called is None)


def _whose(names: Names) -> tuple[str | None, Callable[[str], str] | None]:
    """Whose names are wanted, and what is made of each."""
    whose, called = (
        names if isinstance(names, tuple) and len(names) == 2 else (None, names) if callable(names) else (names, None)
    )
    known = (whose is None and not isinstance(names, tuple)) or (isinstance(whose, str) and whose in _FORMATS)
    if not known or not (called is None or callable(called)) or (isinstance(names, tuple) and called is None):
        raise UsageError(f"names: {names!r} is neither of {', '.join(_FORMATS)}, nor a function of a name, nor a pair of these")
    return whose, called


def _plan(reader: Reader, layout: str | None, kind: str, choices: Choices) -> Plan:
    fused = layout not in (None, NATIVE)
    choices = replace(choices, layout=layout) if fused and layout else choices
    check(choices if fused else replace(choices, shards=1))
    if choices.compute and kind == reader.format:
        raise UsageError(f"{reader.path} has these names already; --compute={choices.compute} is for those of the other format")
    if layout is None and kind == reader.format:
        return plan_as_stored(reader, choices)
    if not choices.params_only:
        _with_optimizer(reader, drop=False)
    if kind != reader.format:
        action: Action = "prefuse" if fused else "convert"
        return make_cross_plan(reader, Path(), action, choices)
    return make_plan(reader, Path(), "prefuse" if fused else "split", choices, idle=True)


def _called(names: Iterable[str], called: Callable[[str], str] | None) -> dict[str, str]:
    """The names of the plan -> those in memory."""
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        new = called(name) if called else name
        if not isinstance(new, str) or not new:
            raise UsageError(f"names: the function gives {new!r} for {name}; it has to be a name")
        if new in taken:
            raise UsageError(f"names: the function gives {new} for both {taken[new]} and {name}")
        taken[new], found[name] = name, new
    return found


def held(leaves: Mapping[str, Any], *, nested: bool) -> dict[str, Any]:
    """The leaves by name: in one dictionary, or in one for each part of the names."""
    if not nested:
        return dict(leaves)
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[last] = leaf
    return tree
