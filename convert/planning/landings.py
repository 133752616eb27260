"""Where all experts of a checkpoint land in a wanted layout, and that no byte is lost or written twice. Pure.

In: a described checkpoint and choices. Out: `Landed`, which is all of a plan but its single tensors. It never makes these:
there may be 100,000, and who only asks what a plan would do has no use for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from convert.options import Choices
from convert.planning.loras import adapted
from convert.planning.relay import Landing, landing
from convert.planning.targets import Target, Way
from layouts.errors import PlanError
from layouts.language.alike import NUMBER
from layouts.language.layout import Layouts
from layouts.matching.describe import Description
from layouts.matching.group import Group
from layouts.matching.origin import Origin, origin_of
from layouts.reader import Reader
from layouts.tables.targets import TAKE_SCALARS, target
from layouts.tensors import total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """Where groups land; `count` tensors of experts, and `nbytes` of these and of all others together."""

    wanted: Layouts
    origin: Origin
    landings: tuple[Landing, ...]
    lora: tuple[Target, ...]
    """A and B of gate and up of a tree, of which there are few."""
    told: tuple[str, ...]
    """What a plan should say of them."""
    count: int
    nbytes: int


def land(reader: Reader, described: Description, action: str, choices: Choices, *, idle: bool = False) -> Landed:
    """Find it for a `prefuse` or a `split`; with `idle`, experts that are in the wanted layout already are taken as they are.

    Raises:
        PlanError: no lossless plan exists, or there is nothing to do.
        InputError: the record of what a tree was made of is damaged.
    """
    layout, split = choices.layout, action == "split"
    wanted = target(layout, described.family, shards=choices.shards, align=choices.align, block=choices.glu_block)
    origin = origin_of(reader, choices.family)
    landings = tuple(_experts(reader, described, None if split else wanted))
    if action == "prefuse" and (layout not in TAKE_SCALARS or described.family.by_structure):
        _check_scalars(reader, described, layout)
    some = (made for each in landings for made in itertools.islice(each.targets(), 1))
    lora, told = adapted(reader, described, choices.source_layout, some, None if split else wanted)
    if not idle and not any(way.moved for way in _ways(landings, lora)):
        state = "as they were published" if split else f"in layout {layout!r}"
        raise PlanError(f"{reader.path}: all experts are {state} already; there is nothing to {action}")
    count, nbytes = _check_written(reader, described, landings, lora)
    return Landed(wanted=wanted, origin=origin, landings=landings, lora=tuple(lora), told=told, count=count, nbytes=nbytes)


def _experts(reader: Reader, described: Description, wanted: Layouts | None) -> Iterator[Landing]:
    """Where the experts land; where nothing is wanted, as they were before, or as the family is published.

    Layers that are alike land alike: a `Way`, and what is worked out for it, is worked out once.
    """
    beside: dict[tuple[str, Any], list[Group]] = {}
    for group in described.groups:
        beside.setdefault((group.role, frozenset(group.index.items())), []).append(group)
    known: dict[Any, list[Landing]] = {}
    for groups in beside.values():
        if (found := known.get(alike := tuple(map(_kind, groups)))) is None:
            found = known[alike] = []
            for group in groups:
                before = group.native if group.relaid else described.family.native[0][group.role]
                layout = wanted[group.role] if wanted else before
                found.append(landing(reader, group, groups, layout, described.family.experts, bare=bool(wanted)))
        yield from (each._replace(group=group) for group, each in zip(groups, found, strict=True))


def _kind(group: Group) -> tuple[object, ...]:
    """All of a group but the place of its block, and its names."""
    words = group.role, group.part, group.dims, group.dtype, group.packed, group.relaid
    return (*words, group.layout, group.native, group.placed, tuple(group.sizes.items()))


def _check_scalars(reader: Reader, described: Description, layout: str) -> None:
    consumer, way = f"layout {layout!r}", ". Use a layout that keeps (E, 2), as concat or vllm do"
    if described.family.by_structure:
        consumer, way = "MaxText's wi", ""
    for group in described.groups:
        if group.role == "wi" and group.part and not {"in", "out", "rest", "both", "all"} & set(group.dims.split()):
            raise PlanError(
                f"{reader.path}: {group.names[0]} is one number for gate, and another stands for up; {consumer} "
                f"has room for one, and to make them one would change values{way}"
            )


_MOST = 1 << 20
"""Tensors of experts in an output: the largest models have some 300,000, scales counted. A few bytes of a header say more."""


def _check_written(
    reader: Reader, described: Description, landings: Sequence[Landing], lora: Sequence[Target]
) -> tuple[int, int]:
    """See that each name is given once, and that what is read and written have one size; the experts' tensors, and all bytes.

    Raises:
        PlanError: it is not so.
    """
    others = [*(each.spec.name for each in lora), *described.verbatim]
    nbytes = sum(reader.tensors[name].nbytes for name in described.verbatim) + sum(each.spec.nbytes for each in lora)
    count = sum(each.tensors for each in landings)
    if count > _MOST:
        raise PlanError(f"{reader.path}: its experts would be {count:,} tensors; {_MOST:,} are the most that are written")
    nbytes += sum(each.tensors * each.nbytes for each in landings)
    if not _apart(landings, others):
        _check_names(reader, itertools.chain(*(each.names() for each in landings), others))
    ways = _ways(landings, lora)
    padded = any(way.diagonal or way.source.pattern.padding or way.target.pattern.padding for way in ways)
    bytes_in = total_bytes(reader.tensors)
    if bytes_in != nbytes and not padded:
        raise PlanError(f"{reader.path}: the plan reads {bytes_in} bytes but writes {nbytes}; this is a bug, report it")
    return count, nbytes


def _ways(landings: Sequence[Landing], lora: Sequence[Target]) -> list[Way]:
    return [each.way for each in landings] + [each.way for each in lora]


def _apart(landings: Iterable[Landing], others: Sequence[str]) -> bool:
    """Whether forms and keys tell that all names differ: those of a form are of one key, and differ where it does not count."""
    homes: dict[str, object] = {NUMBER.sub("0", name): None for name in others}
    places = set[object]()
    for each in landings:
        key, place = each.place
        if (key, place) in places or any(homes.setdefault(NUMBER.sub("0", name), key) != key for name in each.firsts()):
            return False
        places.add((key, place))
    return len({*others}) == len(others)


def _check_names(reader: Reader, names: Iterable[str]) -> None:
    """See that no name is given twice.

    Raises:
        PlanError: one is.
    """
    seen = set[str]()
    for name in names:
        if name in seen:
            raise PlanError(f"{reader.path}: two tensors of the output would be called {name}")
        seen.add(name)
