"""The proof: every logical weight of the experts of two checkpoints is equal bit for bit.

In: the layers of two checkpoints. Out: level `exact`. It never rounds.

Floating-point comparison would call NaN unlike itself and -0.0 like 0.0; bits do neither.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from convert.commit.processes import ALONE, Processes
from convert.errors import too_little
from convert.options.values import counted
from convert.progress import Progress, begin, say
from convert.verifier.bits.alike import Difference, differing
from convert.verifier.bits.counts import nbytes_of
from convert.verifier.bits.logical import (
    PROJECTIONS,
    Block,
    Kind,
    Scope,
    Sides,
    cuttable,
    name_at,
    pair,
    projections,
    unlike,
)
from convert.verifier.bits.order import by_place, places_of
from convert.verifier.bits.stored import Cut
from convert.verifier.bits.together import consecutive, equal_in
from convert.verifier.bits.work import Scratch, Work, in_order
from convert.verifier.share import joined
from convert.verifier.verdict import Level
from layouts.reader import is_chunked

PADDING = "more than zeros behind"
"""What is said of a tensor whose padding holds something."""
TOGETHER = 4 << 20
"""Bytes of small experts that are held to be compared together: a call for each of 100,000 takes longer than their bytes."""
AXES: Mapping[str, str] = {"wi": "kn", "wo": "nk"}
"""The logical axes of a projection."""


Cuts = Mapping[Kind, Sequence[Cut | None]]
"""In which parts each tensor of an expert is compared; the same for all experts of a layer."""


class Looked(NamedTuple):
    """What was looked at on the first side, in bytes, and the differences in words."""

    nbytes: int
    differences: Sequence[str]


def compare_experts(
    a: Mapping[str, Block],
    b: Mapping[str, Block],
    progress: Progress,
    scope: Scope,
    memory: int = 2 << 30,
    jobs: int | None = 1,
    processes: Processes = ALONE,
) -> Level:
    """Compare every expert of every MoE layer; differences name layer, expert and projection.

    Several processes compare a part of the experts each, and all of them get the level of all.

    Raises:
        UsageError: `memory` does not hold the smallest part that an expert can be cut into.
    """
    pairs, lines, own = list(pair(a, b)), list[str](), 0
    work = Work.within(memory, jobs, max((_held(sides, kind) for sides in pairs for kind in sides[0].groups), default=0))
    for both, kind in ((sides, kind) for sides in pairs for kind in sides[0].groups):
        if (least := _least(both, kind)) > work.each:
            name = both[0].groups[kind].names[0]
            raise too_little(memory, f"to compare the smallest part of an expert of {name} takes {2 * least:,} bytes")
    cuts = {id(one): {kind: list(_cuts((one, other), kind, work.each)) for kind in one.groups} for one, other in pairs}
    call = partial(_compare_run, cuts=cuts, scratch=Scratch())
    chosen = [(sides, run) for sides in pairs for run in _runs(sides, scope, min(TOGETHER, work.each))]
    mine = by_place(chosen, _places)[processes.stretch([len(run) for _, run in chosen])]
    number = {one.label: at for at, (one, _) in enumerate(pairs, start=1)}
    each = {one.label: nbytes_of(one) // max(1, one.stored) for one, _ in pairs}
    begin(progress, "bits of experts", sum(each[one.label] * len(run) for (one, _), run in mine))
    for _, group in itertools.groupby(mine, _places):  # one window after the other
        together = list(group)
        for ((one, _), _), found in zip(together, in_order(call, together, work.jobs), strict=True):
            say(progress, f"layer {number[one.label]}/{len(pairs)}")
            lines.extend(found.differences)
            own += found.nbytes
            progress(found.nbytes)
    differences, (nbytes,) = joined(processes, lines, own)
    layers, experts = len(pairs), max((len(scope.of(range(one.stored))) for one, _ in pairs), default=0)
    companions = {part for one, _ in pairs for _, part in one.groups if part}
    beside = f", with {', '.join(sorted(companions))}" if companions else ""
    return Level(
        name="exact",
        covered=f"{counted(layers, 'MoE layer')} x {counted(experts, 'expert')}, gate, up and down{beside}, bit for bit",
        compared=nbytes,
        differences=(*unlike(a, b), *differences),
    )


def _places(item: tuple[Sides, range]) -> list[tuple[str, tuple[int, ...]]]:
    sides, run = item
    return places_of(sides, run.start)


def _held(sides: Sides, kind: Kind) -> int:
    """Bytes in memory while an expert is compared: both sides with their padding, and one turned into logical axes."""
    return sum(_nbytes(block, kind) for block in (*sides, sides[0]))


def _nbytes(block: Block, kind: Kind) -> int:
    group = block.groups[kind]
    whole = block.reader.tensors[group.names[0]].nbytes * len(group.names)  # `check_equal`: they are alike
    return whole // max(1, math.prod([group.sizes.get("e", 1), *(group.sizes[axis] for axis in block.scan)]))


def _runs(sides: Sides, scope: Scope, most: int) -> Iterator[range]:
    """The experts that are compared, as many at a time as `most` bytes hold; what is decoded has an order of its own."""
    chunked = any(is_chunked(block.reader) for block in sides)
    count = 1 if chunked else most // max(1, sum(_held(sides, kind) for kind in sides[0].groups))
    return consecutive(scope.of(range(sides[0].stored)), max(1, count))


def _least(sides: Sides, kind: Kind) -> int:
    """Bytes in memory while the smallest part that an expert can be cut into is compared."""
    sizes = _cuttable(sides, kind)
    return -(-_held(sides, kind) // max([1, *sizes.values()]))


def _cuttable(sides: Sides, kind: Kind) -> dict[str, int]:
    """The axes along which both sides can be cut, with their lengths."""
    return {axis: sides[0].groups[kind].total(axis) for axis in sorted(cuttable(sides[0], kind) & cuttable(sides[1], kind))}


def _cuts(sides: Sides, kind: Kind, most: int) -> Iterator[Cut | None]:
    """The parts in which an expert is compared: the whole if it is within so many bytes, or can be cut nowhere."""
    sizes = _cuttable(sides, kind)
    count = -(-_held(sides, kind) // most)
    if count <= 1 or not sizes:
        yield None
        return
    axis = next((axis for axis, size in sizes.items() if size >= count), max(sizes, key=lambda axis: sizes[axis]))
    size = sizes[axis]
    step = -(-size // count)
    for start in range(0, size, step):
        yield Cut(axis, start, start + step if start + step < size else None)


def _compare_run(item: tuple[Sides, range], cuts: Mapping[int, Cuts], scratch: Scratch) -> Looked:
    """Compare experts that follow one another: together, and one by one what is not equal in all of them."""
    (a, b), run = item
    experts = {kind: range(run.start, min(run.stop, a.groups[kind].sizes.get("e", a.stored))) for kind in sorted(a.groups)}
    looked, alike = list[Looked](), set[Kind]()
    for kind, own in experts.items() if len(run) > 1 else ():
        scratch.rewind()
        if own and (nbytes := equal_in((a, b), kind, own, scratch.empty)) is not None:
            looked.append(Looked(nbytes, ()))
            alike.add(kind)
    each = ((e, kind) for e in run for kind, own in experts.items() if e in own and kind not in alike)
    looked += [_compare_kind((a, b), kind, e, cuts[id(a)][kind], scratch) for e, kind in each]
    return Looked(sum(each.nbytes for each in looked), [line for each in looked for line in each.differences])


def _compare_kind(sides: Sides, kind: Kind, e: int, cuts: Sequence[Cut | None], scratch: Scratch) -> Looked:
    role, part = kind
    words = PROJECTIONS[role] if role == "wo" or "g" in sides[0].groups[kind].sizes else (" and ".join(PROJECTIONS[role]),)
    where, nbytes, sizes = f"{sides[0].label}, expert {e}", 0, dict.fromkeys(words, 0)
    found: dict[str, list[Difference]] = {}
    for cut in cuts:
        scratch.rewind()
        try:
            one, other = (projections(block, kind, e, scratch.empty, cut) for block in sides)
            for projection, x, y in zip(words, one, other, strict=True):
                nbytes, sizes[projection] = nbytes + x.nbytes, sizes[projection] + x.size
                if difference := differing(x, y):
                    found.setdefault(projection, []).append(_moved(difference, role, cut))
        except ValueError as error:
            return Looked(nbytes, [f"{where}, {_words(kind)}: {error}"])
    lines = []
    for g, projection in enumerate(words):
        if projection in found:
            said = _said(found[projection], sizes[projection], kind)
            lines.append(f"{_names(*sides, kind, e, g)}{where}, {f'{projection} {part}'.strip()}: {said}")
    return Looked(nbytes, lines)


def _moved(difference: Difference, role: str, cut: Cut | None) -> Difference:
    """With its place in the whole expert."""
    starts = [cut.start if cut and cut.axis == axis else 0 for axis in AXES[role]]
    return Difference(difference.count, tuple(map(sum, zip(difference.first, starts, strict=False))))


def _said(found: Sequence[Difference], size: int, kind: Kind) -> str:
    role, part = kind
    axes = "" if part else f", first at ({', '.join(AXES[role])}) = {min(each.first for each in found)}"
    return f"{sum(each.count for each in found)} of {size} elements{axes}"


def _names(a: Block, b: Block, kind: Kind, e: int, g: int) -> str:
    """Both tensors by name where formats call them differently."""
    if a.reader.format == b.reader.format:
        return ""
    one, other = (name_at(block, kind, {"e": e, "g": g}) for block in (a, b))
    return f"{one} differs from {other}: "


def _words(kind: Kind) -> str:
    return f"{' and '.join(PROJECTIONS[kind[0]])} {kind[1]}".strip()
