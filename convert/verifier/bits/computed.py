"""Whether two tensors are each other's by a rule that MaxText computes by: Mixtral's queries over the root of the head width.

In: bits of both, in one shape, and the size whose root it is; a tree that has ones. Out: whether they agree. It never uses the
code that converts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.planning.across.pairs import Pair, names_of
from layouts.language.pattern import strips
from layouts.reader import Reader
from layouts.tables.maxtext import ONES, RULES, Rule
from layouts.tensors import numpy_dtype

_LOSS = ", which makes one of some neighbours"
_STRIP = 1 << 20
"""Elements that are compared at a time: they are computed in float64."""


def agree(hf: NDArray[Any], tree: NDArray[Any], code: str, pair: Pair, size: int) -> bool:
    """Whether the tree's values are those of Hugging Face by the pair's rule, for an axis of `size`, or the other way.

    Both are rounded once to float32 and once to the type `code`, as they are stored. Either may have been made of the other.
    """
    dtype, root = numpy_dtype(code), math.sqrt(size)

    def times(bits: NDArray[Any], factor: float) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            exact = np.ascontiguousarray(bits).view(dtype).astype(np.float64) * float(np.float32(factor))
            return exact.astype(np.float32).astype(dtype).view(bits.dtype)

    there, back = (root, 1 / root) if RULES[pair.computed].times else (1 / root, root)
    return np.array_equal(times(hf, there), tree) or np.array_equal(hf, times(tree, back))


def is_ones(pair: Pair) -> bool:
    """Whether MaxText alone has it, and it is all ones."""
    return bool(pair.computed) and RULES[pair.computed].ones


def type_there(pair: Pair, code: str) -> str:
    """The element type that MaxText has of one in Hugging Face."""
    types = RULES[pair.computed].types if pair.computed else None
    return types[1] if types and code == types[0] else code


def same_numbers(hf: NDArray[Any], tree: NDArray[Any]) -> bool:
    """Whether float32 holds the same numbers as int64, each of them an integer, and zeros none below it; both as bits."""
    numbers = np.ascontiguousarray(tree).view(np.float32).astype(np.float64)
    whole = np.isfinite(numbers) & (np.abs(numbers) < 2.0**63) & ~(np.signbit(numbers) & (numbers == 0))
    return bool(whole.all()) and np.array_equal(numbers.astype(np.int64), hf.view(np.int64)) and bool((numbers % 1 == 0).all())


def not_ones(hf: Reader, tree: Reader, pair: Pair) -> Iterator[str]:
    """What of this kind is not there, not all ones or of another shape than what it is named after in Hugging Face."""
    if not is_ones(pair):
        return
    key, (axis,) = pair.target.key, pair.target.pattern.axes
    like = hf.tensors.get(key.render(dict.fromkeys(key.slots, 0)).removesuffix(ONES))
    for name in names_of(pair):
        spec = tree.tensors.get(name)
        if spec is None:
            yield f"{name} is not in {tree.path}"
            continue
        sizes = {**pair.counts, axis: like.shape[-1]} if like and like.shape else {}
        if sizes and spec.shape != (wanted := tuple(sizes[each] for each in pair.source.pattern.axes)):
            yield f"{name} is {spec.shape}, and should be {wanted}"
        elif any((tree.read(name, cut).view(numpy_dtype(spec.dtype)) != 1).any() for cut in strips(spec.shape, _STRIP)):
            yield f"{name} is not all ones"


def fitting(tree: Reader, kept: Reader, pairs: Iterable[Pair]) -> frozenset[str]:
    """The computed arrays of a tree all of whose values are, by their rule, those of the originals that it keeps."""
    found = set[str]()
    for pair in (pair for pair in pairs if pair.computed and RULES[pair.computed].axis):
        for name in (name for name in names_of(pair) if name in kept.tensors):
            spec = kept.tensors[name]
            size = {**pair.counts, **pair.source.pattern.sizes(spec.shape, pair.counts)}[RULES[pair.computed].axis]
            cuts = strips(spec.shape, _STRIP)
            if all(agree(kept.read(name, cut), tree.read(name, cut), spec.dtype, pair, size) for cut in cuts):
                found.add(name)
    return frozenset(found)


def words(pairs: Iterable[Pair], fitting: Collection[str]) -> str:
    """What a level says of such tensors, of which the originals of `fitting` were compared; nothing if there are none."""
    arrays: dict[str, set[str]] = {}
    for pair in pairs:
        if pair.computed:
            arrays.setdefault(pair.computed, set()).update(names_of(pair))
    return "".join(
        f"; {RULES[name].said} ({name}) {_how(RULES[name], len(every.intersection(fitting)), len(every))}"
        for name, every in sorted(arrays.items())
    )


def _how(rule: Rule, kept: int, total: int) -> str:
    if not rule.axis:
        return "was compared number by number" if rule.types else "were looked at"
    if kept == total:
        return "were compared by that rule, and with the originals that the tree keeps, bit for bit"
    some = f", {kept} of {total} with the originals that the tree keeps, the rest by that rule alone"
    return f"were compared by that rule{some if kept else ''}{_LOSS}"
