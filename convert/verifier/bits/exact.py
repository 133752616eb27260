"""The proof: every logical weight of two checkpoints is equal bit for bit, and so is every other tensor.

In: the layers and tensors of two checkpoints. Out: levels `exact` and `others`. It never rounds.

Floating-point comparison would call NaN unlike itself and -0.0 like 0.0; bits do neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from convert.verifier.bits.logical import PROJECTIONS, Block, Kind, Scope, expert, pair, unlike
from convert.verifier.bits.order import STRIP, by_place, places_of
from convert.verifier.verdict import Level
from layouts.language.pattern import strips
from layouts.matching.describe import Description
from layouts.reader import Reader

PADDING = "more than zeros behind"
"""What is said of a tensor whose padding holds something."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was looked at on the first side so far."""

    nbytes: int = 0


def compare_experts(a: Mapping[str, Block], b: Mapping[str, Block], progress: Callable[[int], None], scope: Scope) -> Level:
    """Compare every expert of every MoE layer; differences name layer, expert and projection."""
    differences = unlike(a, b)
    pairs, looked = list(pair(a, b)), Tally()
    chosen = [(sides, e) for sides in pairs for e in scope.of(range(sides[0].experts))]
    for (one, other), e in by_place(chosen, lambda item: places_of(*item)):
        differences.extend(_compare_expert(one, other, e, progress, looked))
    layers, experts = len(pairs), max((len(scope.of(range(one.experts))) for one, _ in pairs), default=0)
    companions = {part for one, _ in pairs for _, part in one.groups if part}
    beside = f", with {', '.join(sorted(companions))}" if companions else ""
    return Level(
        name="exact",
        covered=f"{layers} MoE layers x {experts} experts, gate, up and down{beside}, bit for bit",
        compared=looked.nbytes,
        differences=tuple(differences),
    )


def _compare_expert(a: Block, b: Block, e: int, progress: Callable[[int], None], looked: Tally) -> Iterator[str]:
    for kind in sorted(a.groups):
        try:
            one, other = expert(a, kind, e), expert(b, kind, e)
        except ValueError as error:
            yield f"{a.label}, expert {e}, {_words(kind)}: {error}"
            continue
        parts = zip(one, other, strict=True) if kind[0] == "wi" else [(one, other)]
        for projection, (x, y) in zip(PROJECTIONS[kind[0]], parts, strict=True):
            unequal = np.not_equal(x, y)
            if count := int(np.count_nonzero(unequal)):
                first = tuple(int(i) for i in np.argwhere(unequal)[0]) if np.ndim(unequal) else ()
                axes = "" if kind[1] else f", first at {'(k, n)' if kind[0] == 'wi' else '(n, k)'} = {first}"
                what = f"{projection} {kind[1]}".strip()
                yield f"{a.label}, expert {e}, {what}: {count} of {np.size(x)} elements{axes}"
        progress(other.nbytes)
        looked.nbytes += one.nbytes


def _words(kind: Kind) -> str:
    return f"{' and '.join(PROJECTIONS[kind[0]])} {kind[1]}".strip()


def compare_others(a: Reader, b: Reader, ones: Description, others: Description, progress: Callable[[int], None]) -> Level:
    """Compare every tensor that is no expert weight, by name."""
    differences, looked = [], Tally()
    left, right = set(ones.verbatim), set(others.verbatim)
    for name in sorted(left ^ right):
        differences.append(f"{name} is only in {(a if name in left else b).path}")
    for name in sorted(left & right):
        differences.extend(_compare_tensor(a, b, name, progress, looked))
    covered = f"{len(left & right)} other tensors (attention, norms, routers, embeddings, dense and shared MLPs)"
    sizes = (reader.tensors[name].nbytes for reader, names in ((a, left), (b, right)) for name in names)
    why = "" if any(sizes) else "neither has a tensor that is no expert's"
    return Level(
        name="others",
        covered=covered,
        compared=looked.nbytes,
        differences=tuple(differences),
        not_run=why,
        asked=not why,
    )


def _compare_tensor(a: Reader, b: Reader, name: str, progress: Callable[[int], None], looked: Tally) -> Iterator[str]:
    one, other = a.tensors[name], b.tensors[name]
    if one != other:
        yield f"{name}: {one.dtype} {one.shape} in one, {other.dtype} {other.shape} in the other"
        return
    count = 0
    for slices in strips(one.shape, STRIP):
        block = b.read(name, slices)
        count += int(np.count_nonzero(a.read(name, slices) != block))
        progress(block.nbytes)
        looked.nbytes += block.nbytes
    if count:
        yield f"{name}: {count} elements differ"
