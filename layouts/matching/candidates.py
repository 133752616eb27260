"""The layouts that a checkpoint may be in: what our record says, what the user says, or what its producer owns.

In: an open checkpoint, its family, the user's word. Out: layouts to try, in order. It never goes by shapes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from layouts.errors import InputError, PlanError
from layouts.language.layout import ROLES, Layout, Layouts, checked
from layouts.language.parts import worded
from layouts.language.pattern import Pattern
from layouts.reader import Reader
from layouts.tables.families import Family
from layouts.tables.natives import SOURCES
from layouts.tables.targets import ALIGNMENTS, TARGETS, VERSION, target

ORIGIN = "hf"
"""Where the record of a MaxText tree says of which Hugging Face checkpoint it was made; see `layouts.matching.origin`."""

_NUMBER = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """How a tensor is stored where the layout alone does not tell: packed ones keep their order, companions have fewer dims.

    `unpadded` are the real sizes of padded axes.
    """

    pattern: str
    dims: str
    unpadded: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A layout that one role may be in.

    `natives` is empty if that is how the tensors came into the world; else they were in one of these, the first one unless
    `native_of` says otherwise of a tensor.
    """

    role: str
    layout: Layout
    natives: tuple[Layout, ...] = ()
    native_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """What a checkpoint may be in, to be tried in order; `stored` says more about single tensors."""

    known: tuple[Known, ...]
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """By the name of a tensor, or by role and part for all of a kind: `wi.scale_inv`."""
    said: Layout | None = None
    """That in which the user says some gate and up are."""


def record_of(reader: Reader) -> Mapping[str, Any]:
    """What this tool wrote into the checkpoint; nothing if it did not make it.

    Raises:
        InputError: it is not a record, or it stands in several places that do not agree.
    """
    record = reader.record or {}
    if not isinstance(record, Mapping):
        raise InputError(f"{reader.path}: the record of the layout is damaged: expected an object, found {record!r}")
    for place, other in reader.records.items():
        if (other or {}) != record:
            raise InputError(
                f"{reader.path}: {place} and the checkpoint say different things about the layout of the experts; somebody has "
                f"changed one of them. Take the file from where the checkpoint came from, or remove the record from both"
            )
    return record


def candidates(reader: Reader, family: Family, source_layout: str | None, like: Mapping[str, Any] | None = None) -> Candidates:
    """What the checkpoint may be in; without a record of its own, also what the record `like` says its experts were in.

    Raises:
        PlanError: an unknown layout, another than the record says, or two that share their keys and nothing tells which.
        InputError: the record is damaged.
    """
    record = record_of(reader)
    separate = "layout" not in record and set(record) <= {"version", "family", ORIGIN}
    if source_layout and separate and not _is_origin(source_layout, record):
        said = _stated(source_layout, family)
        return Candidates(known=_apart(said, family.stored), said=named(source_layout, family)["wi"])
    if separate:
        if like and "layout" in like:
            return Candidates(known=_apart(_natives_of(reader, like, family), family.stored))
        return Candidates(known=_apart([], _by_writer(reader, family)))
    if record.get("version") != VERSION:
        raise PlanError(f"{reader.path}: layout record of version {record.get('version')}, this tool knows {VERSION}")
    try:
        relaid = [_recorded(role, record[role], family) for role in ROLES]
        stored = {name: _stored(entry) for name, entry in record.get("stored", {}).items()}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{reader.path}: the record of the layout is damaged: {error!r}") from None
    if source_layout and not _is_origin(source_layout, record):
        _check_said(reader, source_layout, family, relaid)
    return Candidates(known=_apart(relaid, family.stored), stored=stored)


def _is_origin(text: str, record: Mapping[str, Any]) -> bool:
    """Whether this is what a tree's record says of the checkpoint that it was made of: said once more, it changes nothing."""
    found = record.get(ORIGIN)
    return isinstance(found, Mapping) and found.get("layout") == text


def _check_said(reader: Reader, text: str, family: Family, recorded: Iterable[Known]) -> None:
    """See that what the user says is what the record says, of what is here or of what it was made of."""
    table = {
        role: checked(role, each.key.replace(family.experts, "{experts}"), each.pattern)  # as `_recorded` has them
        for role, each in named(text, family).items()
    }
    if any(table[known.role] not in (known.layout, *known.natives) for known in recorded):
        raise PlanError(
            f"{reader.path}: its record says that its experts are in layout {record_of(reader)['layout']!r}, and neither that "
            f"nor what it was made of is {text!r}; do without --source-layout"
        )


def _stated(text: str, family: Family) -> list[Known]:
    """What the user says: a layout that checkpoints come in is what it was before, too; a target was something else."""
    table = named(text, family)
    came = text in SOURCES and text not in TARGETS
    return [Known(role=role, layout=table[role], natives=() if came else (family.native[0][role],)) for role in table]


def _natives_of(reader: Reader, record: Mapping[str, Any], family: Family) -> list[Known]:
    """The layouts that experts were in, by the record of what was made from them."""
    try:
        found = [(role, native) for role in ROLES for native in _recorded(role, record[role], family).natives]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{reader.path}: the record of the layout is damaged: {error!r}") from None
    return [Known(role=role, layout=native) for role, native in dict.fromkeys(found)]


def at_home(family: Family, text: str | None, record: Mapping[str, Any]) -> Family:
    """The family of a model that no table has, as a layout of the user has it: with its experts at the place of that layout.

    What is made of `{path}.{l}.mlp.gate_proj` in a tree goes there, too, and not to `{path}`, which all layers share. Where
    gate and up are apart, that is how the model is published: a split has nothing else to write.
    """
    table = SOURCES.get(text or "")
    if table is None or family.model_types or _is_origin(str(text), record):
        return family
    home = os.path.commonprefix([layout.key for layout in table.values()]).rpartition(".")[0]  # noqa: RUF071 - up to a dot
    while home.endswith("}"):  # that is the place of one expert, or of all layers
        home = home.rpartition(".")[0]
    placed = replace(family, experts=home) if home.startswith("{path}") else family
    apart = "{g" in table["wi"].key
    return replace(placed, native=tuple(placed.own(table) if apart or _has_home(each) else each for each in family.native))


def _has_home(table: Layouts) -> bool:
    return any(layout.key.startswith("{path}") for layout in table.values())


def named(text: str, family: Family) -> Layouts:
    """A layout as `--source-layout` names it: `concat`, `fused-in-out`, `per-shard:8:128`, `lane:8`, `glu:64`.

    Raises:
        PlanError: no such layout.
    """
    name, *options = text.split(":")
    if name in SOURCES and not options:
        return family.own(SOURCES[name])
    if name in TARGETS and "{block}" in TARGETS[name]["wi"].pattern and len(options) == 1 and _NUMBER.fullmatch(options[0]):
        return target(name, family, shards=1, align=1, block=int(options[0]))
    shards, align = [*options, *("1", None)[len(options) :]][:2]
    sound = _NUMBER.fullmatch(shards or "") and (align is None or _NUMBER.fullmatch(align) or align in ALIGNMENTS)
    if name not in TARGETS or len(options) > 2 or not sound:
        raise PlanError(
            f"no layout is called {text!r}; known: {', '.join({**TARGETS, **SOURCES})}, per-shard:SHARDS:ALIGN, "
            f"lane:SHARDS:ALIGN, glu:BLOCK; ALIGN is a number of columns, {' or '.join(ALIGNMENTS)}"
        )
    return target(name, family, shards=int(shards or 1), align=align)


def _stored(entry: Mapping[str, Any]) -> Stored:
    sizes = {str(axis): int(size) for axis, size in entry.get("unpadded", {}).items()}
    return Stored(pattern=Pattern(entry["pattern"]).text, dims=str(entry["dims"]), unpadded=sizes)


def _recorded(role: str, entry: Mapping[str, Any], family: Family) -> Known:
    layout, *natives = (
        checked(role, each["key"].replace(family.experts, "{experts}"), each["pattern"]) for each in (entry, *entry["native"])
    )
    native_of = {str(name): int(number) for name, number in entry.get("native_of", {}).items()}
    if any(Pattern(each.pattern).reversed - {"g"} for each in (layout, *natives)):
        raise ValueError(f"{role}: only gate and up may be stored in reverse")
    if not natives or any(number not in range(len(natives)) for number in native_of.values()):
        raise ValueError(f"{role} needs native layouts")
    return Known(role=role, layout=layout, natives=tuple(natives), native_of=native_of)


def _by_writer(reader: Reader, family: Family) -> tuple[Layouts, ...]:
    """The family's layouts, without those that another version of transformers writes under the same keys."""
    if family.changed_in is None:
        return _present_first(reader, family)
    version = str(reader.config.get("transformers_version", "")).partition(".")[0]
    if version.isdecimal():
        return family.stored[int(version) >= family.changed_in :]
    keys = [layout.template(family.experts) for layout in family.native[0].values()]
    if any(key.parse(name) is not None for name in reader.tensors for key in keys):
        raise PlanError(
            f"{reader.path}: {family.name} stands in two layouts under the same names, and config.json has no "
            f"transformers_version that tells which. Say so: --source-layout=fused-in-out (E, K, 2N), as published, or "
            f"--source-layout=fused-out-in (E, 2N, K), as saved by transformers {family.changed_in} and later"
        )
    return family.stored[1:]


def _present_first(reader: Reader, family: Family) -> tuple[Layouts, ...]:
    """The family's layouts; where two give the same key another meaning, that whose gate and up are there goes first."""
    keys = [layout for table in family.stored for layout in dict.fromkeys(table.values())]
    if len({layout.key for layout in keys}) == len(set(keys)):
        return family.stored
    wi = {id(table): table["wi"].template(family.experts) for table in family.stored}
    there = {number for number, key in wi.items() if any(key.parse(name) is not None for name in reader.tensors)}
    return tuple(sorted(family.stored, key=lambda table: id(table) not in there))


def _worded(table: Layouts) -> Layouts:
    """The layout whose companions have their words behind an underscore; nothing where they stand so or behind a dot."""
    keys = {role: worded(layout.key) for role, layout in table.items()}
    return {role: Layout(key, table[role].pattern) for role, key in keys.items() if key}


def _apart(first: Iterable[Known], tables: Iterable[Layouts]) -> tuple[Known, ...]:
    """The layouts whose keys no earlier one has with another meaning; behind them, how quantisers name their companions."""
    kept, tables = list(first), list(tables)
    for table in (*tables, *filter(None, map(_worded, tables))):
        known = {each.layout.key: each.layout for each in kept}
        if all(known.get(layout.key, layout) == layout for layout in table.values()):
            kept += [Known(role=role, layout=layout) for role, layout in table.items() if layout.key not in known]
    return tuple(kept)
