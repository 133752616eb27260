"""What a report says besides the levels: both sides, the digests of what they hold, the self-test.

In: a verdict and the checkpoints it is about. Out: the same verdict with more in it. It never writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.commit.processes import ALONE, Processes
from convert.errors import InputError, PlanError, UsageError
from convert.options import Verification
from convert.progress import Progress, begin
from convert.verifier.content.hashing import Content
from convert.verifier.content.sides import contents
from convert.verifier.control.trials import Compare, Sides, tried
from convert.verifier.sides import described, said_alone
from convert.verifier.verdict import Level, Side, Verdict
from layouts.checkpoint import FORMATS
from layouts.disk.places import is_remote
from layouts.language.pattern import Pattern
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description
from layouts.matching.group import Group
from layouts.matching.origin import origin_of
from layouts.reader import Reader
from layouts.tables.families import name_of
from layouts.tensors import total_bytes

_AXES = {"e": "expert", "k": "embed", "n": "expert mlp", "g": "gate, up", "s": "shard", "c": "chunk", "d": "pack"}


def attested(
    verdict: Verdict, sides: Sides, options: Verification, progress: Progress, compare: Compare, processes: Processes = ALONE
) -> Verdict:
    """A verdict on two with what else a report has, as far as that is asked for; `compare` compares them again."""
    if not (options.content or options.self_test):
        return verdict
    verdict = stood(verdict, sides, options, progress, processes=processes)
    if not options.self_test:
        return verdict
    begin(progress, "self-test")
    return tried(verdict, sides, options, compare)


def stood(
    verdict: Verdict,
    readers: Sequence[Reader],
    options: Verification,
    progress: Progress,
    wanted: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Verdict:
    """With both sides and, if asked for, a level `content`: whether they hold the same, by the digest of each alone.

    Of one side `wanted` is what it was made of, as its manifest says.
    """
    found: list[Content] = []
    levels = verdict.levels
    if options.content:
        nbytes = sum(total_bytes(reader.tensors) for reader in readers)
        begin(progress, "digests of what is held", nbytes // processes.count)
        try:
            found = contents(*readers, options=options, progress=progress, processes=processes)
            other = found[1].to_dict() if len(found) > 1 else wanted
            levels += (_content(found[0].to_dict(), other),) if other else ()
        except (InputError, PlanError, UsageError) as error:
            levels += (Level(name="content", covered="", compared=0, not_run=str(error)),)
    sides = []
    for at, reader in enumerate(readers):
        beside = [record_of(other) for other in readers if other is not reader]
        sides.append(_side(reader, said_alone(options, at), beside, found[at] if found else None))
    return replace(verdict, levels=levels, sides=tuple(sides))


def _content(one: Mapping[str, Any], other: Mapping[str, Any]) -> Level:
    """Whether two contents, as JSON has them, are the same, by the digests that both have; of the state where both have one."""
    alike = one["terms"] == other["terms"]
    keys = [key for key in ("model", "state") if one[key] and other[key]]
    both = [(key, word) for key in keys for word in ("sha256", "xxh3") if word in one[key] and word in other[key]]
    compared = sum(one[key]["tensors"] for key in dict.fromkeys(key for key, _ in both))
    different = (
        f"the digest of the {key} is {word}:{one[key][word]} in one, {word}:{other[key][word]} in the other"
        for key, word in both
        if one[key][word] != other[key][word]
    )
    digests = ", ".join(f"{word}:{one[key][word]}" for key, word in both if key == "model")
    why = "" if both else "the two have no digest of one kind"
    return Level(
        name="content",
        covered=f"{compared} logical tensors, by {one['terms']}: {digests}",
        compared=compared if alike else 0,
        differences=tuple(different) if alike else (),
        not_run=why if alike else f"one goes by {one['terms']}, the other by {other['terms']}",
        asked=alike,
    )


def _side(reader: Reader, options: Verification, beside: list[Mapping[str, Any]], content: Content | None) -> Side:
    try:
        description = described(reader, options, beside)
        family, layout = origin_of(reader).family or description.family.name, tuple(_layouts(reader, description))
    except (InputError, PlanError) as error:  # one checkpoint is compared with its manifest, whatever it is
        family, layout = "not known", (str(error),)
    return Side(
        path=str(reader.path) if is_remote(reader.path) else os.path.abspath(reader.path),
        nbytes=_size(reader.path),
        format=FORMATS[reader.format].title,
        family=family,
        layout=layout,
        tensors=len(reader.tensors),
        content=content.to_dict() if content else {},
        why=content.why if content else "",
    )


def _size(path: Path) -> int | None:
    """Bytes of all files below it; nobody knows in a store."""
    if is_remote(path):
        return None
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _layouts(reader: Reader, description: Description) -> Iterator[str]:
    """How experts are stored: the word for it, then each kind of tensor with its axes in words."""
    weights = [group for group in description.groups if not group.part] or list(description.groups)
    word = record_of(reader).get("layout") or name_of({g.role: g.layout for g in weights}, description.family)
    fused = any(group.role == "wi" and "g" not in group.placed.key.slots for group in weights)
    yield f"{word or 'as its family has it'}, gate and up {'in one tensor' if fused else 'apart'}"
    kinds = {(group.role, group.layout): group for group in weights}
    yield from (_told(group) for group in kinds.values())


def _told(group: Group) -> str:
    role = "gate and up" if group.role == "wi" else "down"
    axes = " x ".join(_dimension(token, axes) for token, axes in zip(group.placed.pattern.tokens, _groups(group), strict=True))
    return f"{role}: {group.layout.key} '{group.layout.pattern}', {axes}"


def _groups(group: Group) -> tuple[tuple[str, ...], ...]:
    return Pattern(group.placed.pattern.text).groups


def _dimension(token: str, axes: tuple[str, ...]) -> str:
    """`(g n%128)` as `[gate, up; expert mlp, padded to 128]`."""
    words = []
    for axis, word in zip(axes, token.strip("()").split(), strict=True):
        text = "up, gate" if word.startswith("-g") else _AXES.get(axis, "layer")
        multiple = word.partition("%")[2]
        padded = f", padded {'as MaxText does' if multiple == 'maxtext' else f'to {multiple}'}" if multiple else ""
        words.append(text + padded)
    return words[0] if len(words) == 1 else f"[{'; '.join(words)}]"
