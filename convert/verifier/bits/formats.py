"""Compare a Hugging Face checkpoint with a MaxText tree, tensor by tensor, by the table of both and einops.

In: two open checkpoints and pairs of places. Out: levels `exact` and `others`. It never uses the code that converts.

The rows say which tensor is which; how the bits get from one to the other is done here once more, without the code that
converts: a tensor of Hugging Face is read, einops turns it, and the part of MaxText's array that should be the same is cut out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from convert.planning.cross_pairs import Pair, names_of
from convert.verifier.bits.across import Formats
from convert.verifier.bits.order import by_place, hold, place_of
from convert.verifier.bits.stored import arranged, dimensions
from convert.verifier.verdict import Level
from layouts.language.layout import ROLES
from layouts.reader import Reader
from layouts.tables.maxtext import ROOT
from layouts.tensors import TensorSpec
from layouts.windows import lengths

_WOVEN = ("g", "s", "c")
"""Axes that lie within a dimension of a fused `wi`, and are one with `n` or none in Hugging Face."""
_LARGE = 64 << 20
"""Bytes of a tensor above which it is compared row by row."""


def compare_formats(both: Formats, memory: int, progress: Callable[[int], None]) -> tuple[Level, ...]:
    """Every tensor of the model on both sides, bit for bit; what is on one side only is a difference."""
    hf, tree = both.hf, both.tree
    differences: dict[bool, list[str]] = {True: [], False: []}
    seen: tuple[set[str], set[str]] = (set(), set())
    looked = {True: 0, False: 0}
    for pair in both.pairs:
        seen[1].update(names_of(pair))
        for index, name in _in_order(both, pair, memory):
            seen[0].add(name)
            differences[pair.role in ROLES] += _compare(hf, tree, pair, index, name, progress)
            looked[pair.role in ROLES] += hf.tensors[name].nbytes if name in hf.tensors else 0
    differences[False] += [f"{name} is only in {hf.path}" for name in hf.tensors if name not in seen[0]]
    differences[False] += [f"{n} is only in {tree.path}" for n in tree.tensors if n not in seen[1] and n.startswith(ROOT)]
    rest = sum(not name.startswith(ROOT) for name in tree.tensors)
    return (
        Level(
            name="exact",
            covered="every expert weight, in both formats, bit for bit",
            compared=looked[True],
            differences=tuple(differences[True]),
        ),
        Level(
            name="others",
            covered=f"attention, norms, routers, embeddings; {rest} tensors of training state have no counterpart",
            compared=looked[False],
            differences=tuple(differences[False]),
        ),
    )


def _hf_names(pair: Pair) -> Iterator[tuple[dict[str, int], str]]:
    key = pair.target.key
    for point in itertools.product(*(range(pair.counts[slot]) for slot in key.slots)):
        index = dict(zip(key.slots, point, strict=True))
        yield index, key.render(index)


def _in_order(both: Formats, pair: Pair, memory: int) -> list[tuple[dict[str, int], str]]:
    """The tensors of a kind in the order in which the tree is read, through windows of its arrays."""
    halves = ({"g": 0}, {"g": 1}) if "g" in pair.target.pattern.axes else ({},)
    parts: list[tuple[tuple[dict[str, int], str], list[_Part]]] = []
    for index, name in _hf_names(pair):
        spec = both.hf.tensors.get(name)
        strip = _strips(pair, spec)[0] if spec else {}
        found = [_located(both.tree, pair, {**index, **half}, strip) for half in halves]
        parts.append(((index, name), [part for part in found if part]))
    units = {part.name: lengths(part.slices) for _, found in parts for part in found}
    hold(both.tree, units, len(halves), memory)
    ordered = by_place(parts, lambda entry: [place_of(both.tree, part.name, part.slices) for part in entry[1]])
    return [item for item, _ in ordered]


def _strips(pair: Pair, spec: TensorSpec) -> list[dict[str, range]]:
    """The parts along the first axis of a tensor of Hugging Face; one that is small, or has other axes within, is not cut."""
    first, rows = pair.target.pattern.tokens[0], spec.shape[0] if spec.shape else 1
    whole = _is_woven(pair) and (first == "n" or first in pair.source.pattern.padding)
    if spec.nbytes <= _LARGE or not first.isalpha() or first in ("e", "d") or whole:
        return [{}]
    step = max(1, rows * _LARGE // spec.nbytes)
    return [{first: range(start, min(start + step, rows))} for start in range(0, rows, step)]


def _compare(
    hf: Reader,
    tree: Reader,
    pair: Pair,
    index: Mapping[str, int],
    name: str,
    progress: Callable[[int], None],
) -> Iterator[str]:
    """One tensor of Hugging Face against its part of an array, in strips of its first axis where it is large."""
    if name not in hf.tensors:
        yield f"{name} is not in {hf.path}"
        return
    spec = hf.tensors[name]
    for strip in _strips(pair, spec):
        rows = [slice(span.start, span.stop) for span in strip.values()]
        slices = (*rows, *[slice(None)] * (len(spec.shape) - len(rows)))
        block = hf.read(name, slices)
        for g, part in _projections(pair, index, block):
            try:
                other = _other(tree, pair, {**index, **g}, strip)
            except ValueError as error:
                yield f"{name}: {pair.source.key.render({'l': 0, **index, **g})}: {error}"
                return
            if other is None or part.dtype != other.dtype or not np.array_equal(part, other):
                yield f"{name} differs from {pair.source.key.render({'l': 0, **index, **g})}"
                return
        progress(block.nbytes)


def _projections(pair: Pair, index: Mapping[str, int], block: Any) -> Iterator[tuple[dict[str, int], Any]]:
    """The block in MaxText's axes without those that are cut off; gate and up of a fused tensor one after the other."""
    axes = pair.target.pattern.text
    kept = _kept(pair, index)
    known = {axis: size for axis, size in {**pair.counts, "g": 2}.items() if axis in pair.target.pattern.axes}
    if "g" not in pair.target.pattern.axes:
        yield {}, rearrange(block, f"{axes} -> {' '.join(kept)}", **known)
        return
    both = rearrange(block, f"{axes.replace('-', '')} -> g {' '.join(kept)}", **known)
    both = both[::-1] if pair.target.pattern.reversed else both
    yield from (({"g": g}, both[g]) for g in (0, 1))


def _kept(pair: Pair, index: Mapping[str, int]) -> list[str]:
    """The axes of MaxText's side that are not cut off; `n` with all of its shards and chunks is one."""
    cut = _WOVEN if pair.role in ROLES else ("g",)
    return [axis for axis in pair.source.pattern.axes if axis not in {*index, *cut}]


def _is_woven(pair: Pair) -> bool:
    """Whether the array holds gate and up otherwise than side by side, or padding."""
    pattern = pair.source.pattern
    return pair.role in ROLES and (
        bool(pattern.padding or pattern.reversed) or any("g" in axes and axes != ("g", "n") for axes in pattern.groups)
    )


class _Part(NamedTuple):
    """A part of MaxText's array, and the dimensions that only say which."""

    name: str
    slices: tuple[slice, ...]
    dropped: tuple[int, ...]


def _located(tree: Reader, pair: Pair, index: Mapping[str, int], strips: Mapping[str, range]) -> _Part | None:
    """The part of MaxText's array at this index; halves of a fused `wi` that lie side by side are cut as its model does."""
    name = pair.source.key.render(index)
    if name not in tree.tensors:
        return None
    slices, dropped, woven = [], [], _is_woven(pair)
    for at, (axes, size) in enumerate(zip(pair.source.pattern.groups, tree.tensors[name].shape, strict=True)):
        if woven and ("g" in axes or "n" in axes):
            slices.append(slice(0, size))
        elif axes == ("g", "n"):
            n = size // 2
            span = strips.get("n", range(n))
            slices.append(slice(index["g"] * n + span.start, index["g"] * n + span.stop))
        elif axes[0] in index:
            slices.append(slice(index[axes[0]], index[axes[0]] + 1))
            dropped.append(at)
        else:
            span = strips.get(axes[0], range(size))
            slices.append(slice(span.start, span.stop))
    return _Part(name, tuple(slices), tuple(dropped))


def _other(tree: Reader, pair: Pair, index: Mapping[str, int], strips: Mapping[str, range]) -> Any:
    """What is at this index in the array, or None.

    Raises:
        ValueError: there is something in the padding.
    """
    part = _located(tree, pair, index, strips)
    if part is None:
        return None
    data = tree.read(part.name, part.slices)
    if not _is_woven(pair):
        return data.squeeze(part.dropped)
    sizes = pair.source.pattern.sizes(tree.tensors[part.name].shape, {**pair.counts, **pair.real})
    stored = dimensions(pair.source.pattern.text, sizes | {axis: len(span) for axis, span in strips.items()})
    dims = [dimension for at, dimension in enumerate(stored) if at not in part.dropped]
    order = ["g", *itertools.chain.from_iterable(("s", "c", "n") if axis == "n" else (axis,) for axis in _kept(pair, index))]
    found = arranged(data.squeeze(part.dropped), dims, order)
    return found[index["g"]] if "g" in pair.source.pattern.axes else found
