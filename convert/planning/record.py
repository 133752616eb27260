"""What the output says about itself, so that nobody has to guess: which layout, and which one it was. Pure.

In: targets and their layouts. Out: a record. It never reads one.

It stands in `config.json` and in the metadata of every shard; `layouts.matching.candidates` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from convert.planning.targets import Target
from layouts.language.layout import Layout, Layouts
from layouts.language.pattern import Pattern
from layouts.matching.candidates import ORIGIN
from layouts.matching.origin import Origin
from layouts.tables.families import Family, maxtext
from layouts.tables.targets import VERSION

_Made = Sequence[tuple[Layout, Target]]
"""Each target with the layout that its sources had before anybody re-laid them."""
_SCAN = re.compile(r"\b(?:l\d*|p)\b")
"""An axis of stacked layers, in a pattern: `l0`, `l1` within a format, `l` and `p` between formats."""


def make_record(layout: str, family: Family, wanted: Layouts, made: _Made, loras: Sequence[Target] = ()) -> dict[str, Any]:
    """The record of a prefused checkpoint: for each role its layout and the ones before, and what these do not tell.

    Where only A and B of gate and up are, `loras`, they tell how much of padded columns is real.
    """
    record: dict[str, Any] = {"layout": layout, "version": VERSION, "family": family.name}
    for role, each in wanted.items():
        own = [(native, t) for native, t in made if t.role == role]
        record[role] = _words(each, family) | _natives(own, family, family.native[0][role])
    b = next((each for each in loras if each.part == "b" and each.target.pattern.padding), None) if not made else None
    alone = {"wi.": _padded(b, wanted["wi"].pattern)} if b else {}
    if stored := _stored([target for _, target in made], wanted) | alone:
        record["stored"] = stored
    return record


def family_record(family: Family, origin: Origin) -> dict[str, Any] | None:
    """The record of experts that are not fused: what nothing else in the checkpoint tells."""
    usual = not family.by_structure or family.name == maxtext().name
    return None if usual and not origin.words else with_origin({"version": VERSION, "family": family.name}, origin)


def with_origin(record: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """The record of a MaxText tree, with what is known of the checkpoint that it was made of."""
    return {**record, ORIGIN: origin.words} if origin.words else record


def _words(layout: Layout, family: Family) -> dict[str, Any]:
    return {"key": layout.key.replace("{experts}", family.experts), "pattern": layout.pattern}


def _natives(made: _Made, family: Family, native: Layout) -> dict[str, Any]:
    natives = list(dict.fromkeys(native for native, _ in made)) or [native]  # of a role that is not there, as it would be
    numbers = {target.spec.name: natives.index(native) for native, target in made}
    later = {name: number for name, number in numbers.items() if number}
    return {"native": [_words(native, family) for native in natives], **({"native_of": later} if later else {})}


def _stored(targets: Iterable[Target], wanted: Layouts) -> dict[str, Any]:
    """How tensors are stored where the layout does not tell; once for all of a kind if they are alike."""
    kinds: dict[str, dict[str, Mapping[str, Any] | None]] = {}
    for target in targets:
        kinds.setdefault(f"{target.role}.{target.part}", {})[target.spec.name] = _entry(target, wanted)
    folded: dict[str, Any] = {}
    for kind, entries in kinds.items():
        first = next(iter(entries.values()))
        alike = all(entry == first for entry in entries.values())
        folded |= {kind: first} if alike else entries
    return {name: entry for name, entry in folded.items() if entry}


def _padded(target: Target, pattern: str) -> Mapping[str, Any]:
    unpadded = {axis: target.sizes[axis] for axis in target.target.pattern.padding}
    return {"pattern": pattern, "dims": "out in", "unpadded": unpadded}


def _entry(target: Target, wanted: Layouts) -> Mapping[str, Any] | None:
    pattern = target.target.pattern
    unpadded = {axis: target.sizes[axis] for axis in pattern.padding}
    text = pattern.text
    if not target.part:
        usual = Pattern(wanted[target.role].pattern).expand(len(pattern.groups)).text
        if _SCAN.sub("l", text) == _SCAN.sub("l", usual):
            if not unpadded:
                return None
            text = usual  # one name for each axis of layers, whichever way the tree came about
    return {"pattern": text, "dims": target.dims, "unpadded": unpadded}
