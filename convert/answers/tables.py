"""The tables of this tool as people read them: model families, the layouts that checkpoints come in, and target layouts.

In: the tables of `layouts`. Out: text of 100 columns or so many as are asked for, or JSON. It never looks at a checkpoint.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from convert.errors import UsageError, did_you_mean
from layouts.language.layout import Layouts
from layouts.tables.families import FAMILIES, NOT_GATED, Family, name_of
from layouts.tables.natives import SOURCES
from layouts.tables.targets import LOADED_BY, TAKEN_BY, TARGETS

WIDTH = 100


def made_for(layout: str, form: str | None = None) -> str | None:
    """Who loads such a checkpoint of this format, or of any, as it is, and who takes such tensors from the user's own code."""
    (stored, loads), takes = LOADED_BY.get(layout, ("", "")), TAKEN_BY.get(layout)
    told = [f"loaded by {loads}"] * bool(loads and form in (None, stored)) + [f"taken from your code by {takes}"] * bool(takes)
    return "; ".join(told) or None


def families(name: str | None = None) -> dict[str, Any]:
    """Every family, or the one of this name or `model_type`, as JSON.

    Raises:
        UsageError: there is none.
    """
    found = [each for each in FAMILIES if name in (None, each.name, *each.model_types)]
    if name and not found and name not in NOT_GATED:
        known = {alias for each in FAMILIES for alias in (each.name, *each.model_types)}
        part = sorted(each for each in known if name.lower() in each)
        near = did_you_mean(name, known) or (f" (did you mean {'one of ' * (len(part) > 1)}{', '.join(part)}?)" if part else "")
        raise UsageError(f"no family is called {name!r}{near}; convert --families lists the words of config.json's model_type")
    lost = {word: has for word, has in NOT_GATED.items() if name in (None, word)}
    return {"families": [_family(each) for each in found], "no_gate": lost}


def families_text(name: str | None = None, width: int = WIDTH) -> str:
    """The same for people: of one family all that the table knows, of all a line or two each."""
    found = families(name)
    lines: list[str] = []
    for each in found["families"]:
        rows = [("family", each["name"]), ("told by", each["told_by"]), ("model_type", ", ".join(each["model_types"]))]
        rows += [("experts", each["experts"]), ("published", ", ".join(each["native"]))]
        if name:
            rows += [("also read", ", ".join(each["also"]))]
            lines += [line for word, text in rows if text for line in _wrapped(f"{word:<12}", text, width)]
            lines += ["", *_layouts({at: SOURCES[at] for at in each["native"]}.items(), width)]
        else:
            told = f"{', '.join(each['model_types']) or each['told_by']}; {', '.join(each['native'])}"
            lines += _wrapped(f"{each['name']:<22}", told, width)
    if found["no_gate"]:
        lines += [*([""] if lines else []), "no gate, so nothing to fuse:"]
        lines += [f"{word:<22}{has}" for word, has in found["no_gate"].items()]
    told = "model_type; layouts it is published in (convert --families NAME says more)"
    head = [] if name else [*_wrapped(f"{'family':<22}", told, width), ""]
    return "\n".join([*head, *lines]).strip()


def layouts() -> dict[str, Any]:
    """Every layout, as JSON: those of `--layout`, and those that checkpoints come in."""
    targets = {name: _layout(table) | {"made_for": made_for(name)} for name, table in TARGETS.items()}
    return {"targets": targets, "sources": {name: _layout(table) for name, table in SOURCES.items()}}


def layouts_text(width: int = WIDTH) -> str:
    """The same for people."""
    lines = ["--layout NAME: what wi (gate and up) and wo (down) become, as key and axes", ""]
    for name, table in TARGETS.items():
        lines += [*_layouts([(name, table)], width), *_wrapped(" " * 22, made_for(name) or "no program that we know of", width)]
    lines += ["", "--source-layout NAME: what checkpoints come in, besides these", "", *_layouts(SOURCES.items(), width)]
    axes = "e expert, k embed, g gate and up, n expert mlp, s shards, c chunks; %128 is padded, {pad} by --align; l, ... layers"
    return "\n".join([*lines, "", *_wrapped("", axes, width)])


def _family(family: Family) -> dict[str, Any]:
    native, stored = ([name_of(table, family) for table in tables] for tables in (family.native, family.stored))
    told = (
        "the structure of the tree" if family.by_structure else "the names of its experts" if family.by_names else "model_type"
    )
    return {
        "name": family.name,
        "format": family.format,
        "model_types": list(family.model_types),
        "told_by": told,
        "experts": family.experts,
        "native": native,
        "also": [name for name in stored if name not in native],
    }


def _layout(table: Layouts) -> dict[str, dict[str, str]]:
    return {role: {"key": each.key, "axes": each.pattern} for role, each in table.items()}


def _layouts(rows: Iterable[tuple[str, Layouts]], width: int) -> Iterator[str]:
    """Two lines for each layout: gate and up, and down."""
    for name, table in rows:
        for word, role in ((name, "wi"), ("", "wo")):
            key, axes = f"{word:<20}  {table[role].key}", f"'{table[role].pattern}'"
            if len(key) > width:
                yield from [word] * bool(word)
                key = f"    {table[role].key}"
            yield from [f"{key}  {axes}"] if len(key + axes) < width - 2 else [key, " " * 22 + axes]


def _wrapped(word: str, text: str, width: int) -> Sequence[str]:
    return textwrap.wrap(word + text, width, subsequent_indent=" " * len(word), break_on_hyphens=False, break_long_words=False)
