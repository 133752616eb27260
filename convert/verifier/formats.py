"""Compare a Hugging Face checkpoint with a MaxText tree, tensor by tensor, by the table of both and einops.

The rows say which tensor is which; how the bits get from one to the other is done here once more, without the code that
converts: a tensor of Hugging Face is read, einops turns it, and the part of MaxText's array that should be the same is cut out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange

from convert.cross_pairs import Pair, names_of
from convert.verifier.across import Formats
from convert.verifier.verdict import Level
from layouts.checkpoint import Reader
from layouts.layout import ROLES
from layouts.maxtext import ROOT

_LARGE = 64 << 20
"""Bytes of a tensor above which it is compared row by row."""


def compare_formats(both: Formats, progress: Callable[[int], None]) -> tuple[Level, ...]:
    """Every tensor of the model on both sides, bit for bit; what is on one side only is a difference."""
    hf, tree = both.hf, both.tree
    differences: dict[bool, list[str]] = {True: [], False: []}
    seen: tuple[set[str], set[str]] = (set(), set())
    for pair in both.pairs:
        seen[1].update(names_of(pair))
        for index, name in _hf_names(pair):
            seen[0].add(name)
            differences[pair.role in ROLES] += _compare(hf, tree, pair, index, name, progress)
    differences[False] += [f"{name} is only in {hf.path}" for name in hf.tensors if name not in seen[0]]
    differences[False] += [f"{n} is only in {tree.path}" for n in tree.tensors if n not in seen[1] and n.startswith(ROOT)]
    rest = sum(not name.startswith(ROOT) for name in tree.tensors)
    return (
        Level(name="exact", covered="every expert weight, in both formats, bit for bit", differences=tuple(differences[True])),
        Level(
            name="others",
            covered=f"attention, norms, routers, embeddings; {rest} tensors of training state have no counterpart",
            differences=tuple(differences[False]),
        ),
    )


def _hf_names(pair: Pair) -> Iterator[tuple[dict[str, int], str]]:
    key = pair.target.key
    for point in itertools.product(*(range(pair.counts[slot]) for slot in key.slots)):
        index = dict(zip(key.slots, point, strict=True))
        yield index, key.render(index)


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
    first, rows = pair.target.pattern.tokens[0], spec.shape[0] if spec.shape else 1
    step = max(1, rows * _LARGE // max(_LARGE, spec.nbytes)) if first.isalpha() and first not in ("e", "d") else rows
    for start in range(0, rows, step):
        strip = range(start, min(start + step, rows))
        slices = tuple(slice(strip.start, strip.stop) if at == 0 else slice(None) for at in range(len(spec.shape)))
        block = hf.read(name, slices)
        for g, part in _projections(pair, index, block):
            other = _other(tree, pair, {**index, **g}, {first: strip} if step < rows else {})
            if other is None or part.dtype != other.dtype or not np.array_equal(part, other):
                yield f"{name} differs from {pair.source.key.render({'l': 0, **index, **g})}"
                return
        progress(block.nbytes)
        hf.release(name, slices)


def _projections(pair: Pair, index: Mapping[str, int], block: Any) -> Iterator[tuple[dict[str, int], Any]]:
    """The block in MaxText's axes without those that are cut off; gate and up of a fused tensor one after the other."""
    axes = pair.target.pattern.text
    kept = [axis for axis in pair.source.pattern.axes if axis not in index and axis != "g"]
    known = {axis: size for axis, size in {**pair.counts, "g": 2}.items() if axis in pair.target.pattern.axes}
    if "g" not in pair.target.pattern.axes:
        yield {}, rearrange(block, f"{axes} -> {' '.join(kept)}", **known)
        return
    both = rearrange(block, f"{axes} -> g {' '.join(kept)}", **known)
    yield from (({"g": g}, both[g]) for g in (0, 1))


def _other(tree: Reader, pair: Pair, index: Mapping[str, int], strips: Mapping[str, range]) -> Any:
    """The part of MaxText's array at this index; halves of a fused `wi` are cut as its model cuts them."""
    name = pair.source.key.render(index)
    if name not in tree.tensors:
        return None
    slices, dropped = [], []
    for at, (axes, size) in enumerate(zip(pair.source.pattern.groups, tree.tensors[name].shape, strict=True)):
        if axes == ("g", "n"):
            n = size // 2
            slices.append(slice(index["g"] * n, (index["g"] + 1) * n))
        elif axes[0] in index:
            slices.append(slice(index[axes[0]], index[axes[0]] + 1))
            dropped.append(at)
        else:
            span = strips.get(axes[0], range(size))
            slices.append(slice(span.start, span.stop))
    block = tree.read(name, tuple(slices))
    tree.release(name, tuple(slices))
    return block.squeeze(tuple(dropped))
