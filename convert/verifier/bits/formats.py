"""Compare what is no expert's in a Hugging Face checkpoint and a MaxText tree, by the table of both and einops.

In: two open checkpoints and pairs of places. Out: level `others`. It never uses the code that converts.

The rows say which tensor is which; how the bits get from one to the other is done here once more, without the code that
converts: a tensor of Hugging Face is read, einops turns it, and the part of MaxText's array that should be the same is cut out.
Experts are compared as everywhere in this package (`convert.verifier.bits.exact`), in whatever layout either side has them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import numpy as np
from einops import EinopsError, rearrange
from numpy.typing import NDArray

from convert.commit.processes import ALONE, Processes
from convert.planning.across.pairs import Pair, names_of
from convert.progress import Progress, begin
from convert.verifier.bits import computed
from convert.verifier.bits.across import Formats
from convert.verifier.bits.order import by_place, hold, place_of
from convert.verifier.bits.stored import rows_of
from convert.verifier.share import joined
from convert.verifier.verdict import Level
from layouts.computing import open_originals
from layouts.language.layout import ROLES
from layouts.language.pattern import Pattern
from layouts.language.sections import ROWS, TENSOR
from layouts.reader import Reader
from layouts.tables.maxtext import LAYERS, ROOT, RULES
from layouts.tensors import TensorSpec
from layouts.windows import lengths

_LARGE = 64 << 20
"""Bytes of a tensor above which it is compared row by row."""


def compare_others_across(both: Formats, memory: int, progress: Progress, processes: Processes = ALONE) -> Level:
    """Every tensor of the model that is no expert's, bit for bit; what is on one side only is a difference.

    Several processes compare a part of them each, and all of them get the level of all.
    """
    hf, tree = both.hf, both.tree
    others = [pair for pair in both.pairs if pair.role not in ROLES and not computed.is_ones(pair)]
    every = [(pair, *item) for pair in others for item in _hf_names(pair)]
    sizes = [_nbytes(hf, pair, index, name) for pair, index, name in every]
    found: list[str] = []
    looked = 0
    kept = open_originals(tree) if any(pair.computed for pair in others) else None
    fitting = frozenset[str]()
    # Experts that either side has alone are a difference of level `exact`.
    seen = {name for group in both.described.groups for name in group.names} | {name for *_, name in every}
    placed = {name for pair in both.pairs for name in names_of(pair)}
    own = processes.stretch(sizes)
    begin(progress, "bits of other tensors", sum(sizes[own]))
    with closing(kept) if kept else nullcontext():
        if kept:
            fitting = computed.fitting(tree, kept, others)
        for pair, items in itertools.groupby(every[own], lambda item: item[0]):
            for index, name in _in_order(both, pair, [(index, name) for _, index, name in items], memory):
                originals = kept if pair.source.key.render(index) in fitting else None
                found += _compare(hf, (tree, originals), pair, index, name, progress)
                looked += _nbytes(hf, pair, index, name)
    differences, (nbytes,) = joined(processes, found, looked)
    for pair in both.pairs:
        differences += [*computed.not_ones(hf, tree, pair), *_stacks_of_another_size(tree, pair)]
    lonely = [name for name in hf.tensors if name not in seen]
    differences += [f"{name} is only in {hf.path}" for name in lonely if not both.lacks(name)]
    dropped = sum(map(both.lacks, hf.tensors))
    words = f"; {dropped} tensors of MTP blocks were left out of the tree, as its record says" if dropped else ""
    differences += [f"{n} is only in {tree.path}" for n in tree.tensors if n not in placed and n.startswith(ROOT)]
    rest = sum(not name.startswith(ROOT) and name not in placed for name in tree.tensors)
    return Level(
        name="others",
        covered=f"attention, norms, routers, embeddings; {rest} tensors of training state have no counterpart{words}"
        f"{computed.words(both.pairs, fitting)}",
        compared=nbytes,
        differences=tuple(differences),
    )


def _stacks_of_another_size(tree: Reader, pair: Pair) -> Iterator[str]:
    """Stacks with more or fewer layers than `config.json` says: nobody would look at those that are too many."""
    for name in (name for name in names_of(pair) if name in tree.tensors):
        for axes, size in zip(pair.source.pattern.groups, tree.tensors[name].shape, strict=False):
            if axes[0] in LAYERS and size != pair.counts.get(axes[0], size):
                yield f"{name} has {size} layers ({axes[0]}), and config.json says {pair.counts[axes[0]]}"


def _hf_names(pair: Pair) -> Iterator[tuple[dict[str, int], str]]:
    """Each tensor of Hugging Face, as often as MaxText has an array for a part of it."""
    key = pair.target.key
    slots = (*key.slots, *_cut(pair), *([TENSOR] if _is_one(pair) else []))
    for point in itertools.product(*(range(pair.counts[slot]) for slot in slots)):
        index = dict(zip(slots, point, strict=True))
        yield index, key.render(index)


def _cut(pair: Pair) -> list[str]:
    """The axes of a tensor of Hugging Face that MaxText has in its names: it has an array for each step."""
    return [axis for axis in pair.source.key.slots if axis in pair.target.pattern.axes]


def _is_one(pair: Pair) -> bool:
    """Whether Hugging Face has one tensor of what MaxText has as several."""
    return TENSOR in pair.source.key.slots


def _stored(pair: Pair, index: Mapping[str, int]) -> Pattern:
    """How MaxText stores what is at this index."""
    return pair.parts[index[TENSOR]] if pair.parts else pair.source.pattern


def _nbytes(hf: Reader, pair: Pair, index: Mapping[str, int], name: str) -> int:
    if name not in hf.tensors:
        return 0
    if pair.turns and _is_one(pair):
        return hf.tensors[name].nbytes * pair.turns.size(index[TENSOR]) // pair.turns.total
    return hf.tensors[name].nbytes // math.prod(pair.counts[axis] for axis in _cut(pair))


def _in_order(
    both: Formats, pair: Pair, items: Iterable[tuple[dict[str, int], str]], memory: int
) -> list[tuple[dict[str, int], str]]:
    """These tensors of a kind in the order in which the tree is read, through windows of its arrays."""
    parts: list[tuple[tuple[dict[str, int], str], list[_Part]]] = []
    for index, name in items:
        spec = both.hf.tensors.get(name)
        strip = _strips(pair, spec)[0] if spec else {}
        found = _located(both.tree, pair, index, strip)
        parts.append(((index, name), [found] if found else []))
    units = {part.name: lengths(part.slices) for _, found in parts for part in found}
    hold(both.tree, units, 1, memory)
    ordered = by_place(parts, lambda entry: [place_of(both.tree, part.name, part.slices) for part in entry[1]])
    return [item for item, _ in ordered]


def _strips(pair: Pair, spec: TensorSpec) -> list[dict[str, range]]:
    """The parts of a tensor of Hugging Face along its first axis, or second; none of one that is small, or has axes within."""
    at, tokens = 1 if pair.turns else 0, pair.target.pattern.tokens  # rows in turns lie elsewhere, columns do not
    first, rows = (tokens[at], spec.shape[at]) if at < min(len(tokens), len(spec.shape)) else ("", 1)
    if spec.nbytes <= _LARGE or not first.isalpha() or first in ("e", "d"):
        return [{}]
    step = max(1, rows * _LARGE // spec.nbytes)
    return [{first: range(start, min(start + step, rows))} for start in range(0, rows, step)]


def _compare(
    hf: Reader, trees: tuple[Reader, Reader | None], pair: Pair, index: Mapping[str, int], name: str, progress: Progress
) -> Iterator[str]:
    """One tensor of Hugging Face against its part of an array, in strips of its first axis where it is large.

    `trees` are the tree, and the originals that it keeps, if it keeps those of this array.
    """
    tree, originals = trees
    if name not in hf.tensors:
        yield f"{name} is not in {hf.path}"
        return
    spec, axes = hf.tensors[name], pair.target.pattern
    kept = [axis for axis in _stored(pair, index).axes if axis not in index]
    known = {axis: size for axis, size in pair.counts.items() if axis in axes.axes}
    array = tree.tensors.get(pair.source.key.render(index))
    if array is None or array.dtype != computed.type_there(pair, spec.dtype):
        yield f"{name} is {spec.dtype}, and {pair.source.key.render(index)} is {array.dtype if array else 'not there'}"
        return
    if len(spec.shape) != len(axes.groups):
        yield f"{name} has the shape {spec.shape}, which is not of the form '{axes.text}'"
        return
    for strip in _strips(pair, spec):
        spans = [strip.get(token, range(size)) for token, size in zip(axes.tokens, spec.shape, strict=True)]
        block = hf.read(name, tuple(slice(span.start, span.stop) for span in spans))
        try:
            one = rearrange(block, f"{axes.text} -> {' '.join([*_cut(pair), *kept])}", **known)
        except EinopsError:
            yield f"{name} has the shape {spec.shape}, which is not of the form '{axes.text}' with {known}"
            return
        one, other = one[tuple(index[axis] for axis in _cut(pair))], _other(tree, pair, index, strip)
        if pair.turns and other is not None:
            one, other = _own_rows(pair, kept, index, one, other)
        original = _other(originals, pair, index, strip) if originals else None
        if other is None or not _alike(pair, kept, spec.dtype, one, other, original):
            yield f"{name} differs from {pair.source.key.render({'l': 0, **index})}"
            return
        progress(one.nbytes)


def _own_rows(
    pair: Pair, axes: list[str], index: Mapping[str, int], hf: NDArray[Any], tree: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """What is one tensor on either side, of both: the other side has the rows of all in one, or does not."""
    assert pair.turns
    own = rows_of(hf if _is_one(pair) else tree, pair.turns, index[TENSOR], axes.index(ROWS))
    if own is None or not _is_one(pair):
        return hf, own
    stored = " ".join(token for token in _stored(pair, index).tokens if token not in index)
    return rearrange(own, f"{' '.join(axes)} -> {stored}"), tree


def _alike(pair: Pair, axes: list[str], code: str, hf: NDArray[Any], tree: NDArray[Any], original: NDArray[Any] | None) -> bool:
    """Whether both hold the same, bit for bit, or by the rule that MaxText computes by, unless the tree keeps an original."""
    if not pair.computed or hf.shape != tree.shape:
        return np.array_equal(hf, tree)
    if not RULES[pair.computed].axis:
        return computed.same_numbers(hf, tree)
    if original is not None:
        return np.array_equal(hf, original)
    return computed.agree(hf, tree, code, pair, hf.shape[axes.index(RULES[pair.computed].axis)])


class _Part(NamedTuple):
    """A part of MaxText's array, and the dimensions that only say which."""

    name: str
    slices: tuple[slice, ...]
    dropped: tuple[int, ...]


def _located(tree: Reader, pair: Pair, index: Mapping[str, int], strips: Mapping[str, range]) -> _Part | None:
    """The part of MaxText's array at this index, if there is one."""
    name, groups = pair.source.key.render(index), _stored(pair, index).groups
    if name not in tree.tensors or len(tree.tensors[name].shape) != len(groups):
        return None
    slices, dropped = [], []
    for at, (axes, size) in enumerate(zip(groups, tree.tensors[name].shape, strict=True)):
        if axes[0] in index:
            if index[axes[0]] >= size:
                return None
            slices.append(slice(index[axes[0]], index[axes[0]] + 1))
            dropped.append(at)
        else:
            span = strips.get(axes[0], range(size))
            slices.append(slice(span.start, span.stop))
    return _Part(name, tuple(slices), tuple(dropped))


def _other(tree: Reader, pair: Pair, index: Mapping[str, int], strips: Mapping[str, range]) -> NDArray[np.generic] | None:
    """What is at this index in the array, or None."""
    part = _located(tree, pair, index, strips)
    return None if part is None else tree.read(part.name, part.slices).squeeze(part.dropped)
