"""What an output's model card says of how it was made: the text, and the file that it goes into.

In: a plan, what the user chose, an open staging directory. Out: `README.md` there. It names no path, host, user or time, so
that equal runs give equal bytes.

Experts that are fused are explained, because no program expects them so; a way back takes exactly that away again.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from convert.commit.inventory import read_card
from convert.options import Choices, Running
from convert.options.option import named
from convert.planning.across.computed import originals_of
from convert.planning.choices import comparable
from convert.planning.planner import Plan
from convert.version import TOOL
from layouts.card import CARD, MOST, add, strip, takes_section
from layouts.reader import Reader
from layouts.side_files import ORIGINALS
from layouts.tables.targets import LOADED_BY, TAKEN_BY

_PLACES = ("base", "sharding")
"""Options that are places: a card names none."""
_HOW = frozenset({"jobs", "memory", "resume", "overwrite", "content", "to", *_PLACES})
"""Options that change no byte of the output, or are told otherwise."""
_AXES = (
    "`e` expert, `k` embed, `g` gate and up (gate first; `-g` up first), `n` expert mlp, `s` shards, `c` chunks, `...` layers; "
    "`%128` is padded to a multiple of 128."
)
_FORMATS = {"hf": "Hugging Face safetensors", "orbax": "Orbax (MaxText)"}


class Planned(Protocol):
    """What is asked of a plan, be it of a checkpoint or of an adapter."""

    @property
    def source(self) -> Path:
        """The input."""

    @property
    def action(self) -> str:
        """What is done to the experts."""

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What the output says of its layout."""

    @property
    def side_files(self) -> Mapping[str, int]:
        """The files beside the tensors: name -> bytes."""

    @property
    def card(self) -> str:
        """The section that the output's card gets."""


class Beside(Protocol):
    """A directory, or a place in a store, that is written into."""

    def write_text(self, name: str, text: str) -> None:
        """Write a small file."""

    def copy_in(self, source: Path, name: str) -> None:
        """Copy a file as it is."""


def explained(plan: Plan, before: str, choices: Choices, running: Running) -> Plan:
    """A plan with the section that its output gets; `before` is the format of the input."""
    return replace(plan, card="\n".join(_lines(plan, before, choices, running)) + "\n") if _is_fused(plan.record) else plan


def _is_fused(record: Mapping[str, Any] | None) -> bool:
    """Whether a record speaks of a layout; others say of which family unfused experts are."""
    return "layout" in (record or {})


def _lines(plan: Plan, before: str, choices: Choices, running: Running) -> Iterator[str]:
    record = plan.record or {}
    yield from ("## How the experts are stored here", "")
    made = f"layout `{plan.layout}` of {_FORMATS[plan.format]}"
    yield f"The gate and up projections of all experts of a layer are one tensor, in {made}."
    yield from (f"The keys and axes, slowest first, of MoE family `{plan.family}`:", "")
    yield from ("| tensors | key | axes |", "| --- | --- | --- |")
    for role, title in (("wi", "gate and up"), ("wo", "down")):
        if role in record:
            yield f"| {title} | `{record[role]['key']}` | `{record[role]['pattern']}` |"
    yield from ("", _AXES, "", f"Made by moe-convert {TOOL}; OUT is this checkpoint, and IN what it was made of:", "")
    yield from (f"    {command(plan.action, choices, running, content=bool(plan.content))}", "")
    kept = f"; the originals are in `{ORIGINALS}`" if originals_of(plan) else ""
    yield f"- Values: {f'computed: {plan.computed}{kept}' if plan.computed else 'every bit is as it was in IN'}."
    if plan.content:
        yield f"- sha256 of what it holds, the same in every layout: `{plan.content['model']['sha256']}` (`convert --digest`)."
    yield f"- To load it: {_loading(plan)}."
    back = "" if before == plan.format else f" --to {before}"
    back += f" --compute {choices.compute}" if choices.compute else ""
    yield f"- To get gate and up apart again, as they were before: `convert --split{back} OUT BACK`; this section goes, too."
    bits = "all bits, computed ones with the originals or by their rule" if plan.computed else "all bits"
    pair = f"; `convert --verify IN OUT` compares {bits}" if comparable(plan.computed, choices) else ""
    yield f"- To check it: `convert --verify OUT` compares the digests in its manifest{pair}."


def command(action: str, choices: Choices, running: Running, *, content: bool = False) -> str:
    """What the user asked for, without what changes no byte; a call of the library is told as the command that it is."""
    words = ["convert", *(["--to", str(choices.to)] if action == "convert" else [f"--{action}"]), "IN", "OUT"]
    words += ["--to", choices.to] if choices.to and action != "convert" else []
    words += [word for name in _PLACES if getattr(choices, name) for word in (f"--{name}", name.upper())]
    words += ["--content"] if content else []
    for kind in (choices, running):
        for each in named(type(kind)):
            value = getattr(kind, each.name)
            if each.name not in _HOW and value != each.default:
                words += [each.flag] if each.is_switch else [each.flag, _word(value)]
    return shlex.join(words)


def _word(value: object) -> str:
    return ",".join(f"{axis}={size}" for axis, size in value.items()) if isinstance(value, Mapping) else str(value)


def _loading(plan: Plan) -> str:
    (stored, loads), takes = LOADED_BY.get(plan.layout, ("", "")), TAKEN_BY.get(plan.layout)
    told = ["`convert.load('OUT')` in JAX"]
    told += [loads] if plan.format == stored else []
    return "; ".join([*told, f"your own code gives it to {takes}"] if takes else told)


def write_card(plan: Planned, reader: Reader, folder: Beside) -> tuple[str, ...]:
    """Write the card of an output, if it has one; what the user should know of it.

    The section of the input goes where its experts were fused and are told of anew, or no more. It stays where a tree is
    saved, which nobody has told of, and where an input without a record is prefused: a split gives that back as it is.

    Raises:
        OSError: the disk is full or failing.
        InputError: the input's card is no regular file.
    """
    source, has = plan.source / CARD, CARD in plan.side_files
    apart = plan.action == "split" or not _is_fused(plan.record)
    stale = (_is_fused(reader.record) and (plan.card or apart)) or (apart and _has_fused(plan))
    if any(name.startswith(f"{CARD}/") for name in plan.side_files):
        return (_untold(plan, "is a directory"),) if plan.card else ()
    card = read_card(source) if has else None
    if has and not ((plan.card or stale) and takes_section(card)):
        folder.copy_in(source, CARD)
        return (_untold(plan, f"is no text of at most {MOST:,} bytes"),) if plan.card else ()
    kept = strip(card) if stale else card
    if (made := add(kept, plan.card) if plan.card else kept) is not None:
        folder.write_text(CARD, made.decode())
    return ()


def _has_fused(plan: Planned) -> bool:
    """Whether experts of the input are fused: whoever saved it again may have kept the card, and no record."""
    targets = getattr(plan, "targets", ())
    return plan.action == "split" or any(each.role == "wi" and "g" in each.source.pattern.axes for each in targets)


def _untold(plan: Planned, why: str) -> str:
    return f"{plan.source / CARD} {why}, so that the output's does not say how its experts are stored; its manifest does"
