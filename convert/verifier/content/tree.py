"""What a MaxText tree holds, by the names and axes that the same model has in Hugging Face.

In: an open tree. Out: units of reading, or an error that says why the tables do not know its counterpart. It never hashes.

The rows of `layouts.tables` say which part of which array is which tensor; the part is read and einops turns it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from einops import rearrange
from numpy.typing import NDArray

from convert.options import Verification
from convert.planning.across.pairs import Pair, Sides, names_of, pairs_of, there, trees_of
from convert.planning.across.plan import config_of, fused_in, stacked_along
from convert.planning.across.which import named_in, tree_in
from convert.verifier.bits.across import group_of
from convert.verifier.bits.logical import Block
from convert.verifier.bits.order import STRIP
from convert.verifier.bits.stored import stretches
from convert.verifier.content.hashing import Logical, Slices, Unit, rows_of
from convert.verifier.content.tensors import expert_units
from layouts.errors import InputError, PlanError
from layouts.language.layout import ROLES
from layouts.language.parts import PARTS
from layouts.language.sections import ROWS, TENSOR
from layouts.matching.lookup import find_family
from layouts.matching.origin import origin_of
from layouts.reader import Reader
from layouts.tables.maxtext import LAYERS, ROOT
from layouts.tensors import TensorSpec, itemsize
from layouts.windows import lengths


def model_units(tree: Reader, options: Verification) -> list[Unit]:
    """All that is below `ROOT`, as Hugging Face has it.

    Raises:
        InputError, PlanError: the tables have no counterpart for the tree, or not for all of it.
    """
    config, named = config_of(tree), options.family or origin_of(tree).family
    found = find_family(config, list(tree.tensors), where=tree.path, format="hf", override=named)
    rows, scan = tree_in(tree, named_in(tree, trees_of(found, tree.path)))
    where = stacked_along(tree, options.scan_axis)
    stored, real = fused_in(tree, where, options.source_layout)
    sides = Sides(family=found, tree=where, hf=found.native[0], maxtext=stored, scan=scan, to_maxtext=False, real=real)
    wanted = there(pairs_of(rows, sides, config), tree.tensors)
    if rules := sorted({pair.computed for pair in wanted if pair.computed}):
        raise PlanError(f"MaxText holds other values than Hugging Face does ({', '.join(rules)})")
    if not (pairs := [pair for pair in wanted if _is_there(tree, pair)]):
        raise PlanError(f"nothing of the model is below {ROOT.rstrip('.')}, nor below one other place")
    known = {name for pair in pairs for name in names_of(pair)}
    if lonely := sorted({n for n in tree.tensors if n.startswith(ROOT)} - known | known - tree.tensors.keys()):
        raise PlanError(f"{lonely[0]} {'is missing' if lonely[0] in known else 'has no place in Hugging Face'}")
    return [unit for pair in pairs for unit in (_experts if pair.role in ROLES else _rows)(tree, sides, pair)]


def _is_there(tree: Reader, pair: Pair) -> bool:
    """Whether the tree has a kind of tensor, in the sizes that `config.json` says."""
    key = pair.source.key
    spec = tree.tensors.get(key.render(dict.fromkeys(key.slots, 0)))
    if spec is None:
        return False
    _sizes(tree, pair, spec)
    return True


def _layers(pair: Pair) -> Iterator[dict[str, int]]:
    """Where the layers of a stack are: each step, and each layer in it; what stands outside of them is one."""
    axes = [axis for axis in LAYERS if axis in pair.counts]
    for point in itertools.product(*(range(pair.counts[axis]) for axis in axes)):
        yield dict(zip(axes, point, strict=True))


def _sizes(tree: Reader, pair: Pair, spec: TensorSpec) -> dict[str, int]:
    """Of all axes of an array; the table has to be right about all of them, or a part would be left out."""
    try:
        sizes = {**pair.counts, **pair.source.pattern.sizes(spec.shape, {**pair.counts, **pair.real})}
    except ValueError as error:
        raise InputError(f"{tree.path}: {spec.name}: {error}") from None
    if pair.turns and sizes[ROWS] != pair.turns.total:
        raise InputError(f"{tree.path}: {spec.name} has {sizes[ROWS]} rows, and {pair.turns.total} by config.json")
    return sizes


def _experts(tree: Reader, sides: Sides, pair: Pair) -> Iterator[Unit]:
    """One kind of expert tensor, under the places that the layers have in Hugging Face."""
    key, pattern = pair.source.key, pair.source.pattern
    place = sides.hf[pair.role].place(sides.family.experts).key
    number = next(number for number, part in enumerate(PARTS) if part.name == pair.part)
    for at in _layers(pair):
        name = pair.target.key.render({**at, "e": 0, "g": 0, "part": number})
        index = place.parse(name)
        if index is None:
            raise PlanError(f"{name} is not where family {sides.family.name} keeps its experts")
        scan = {axis: i for axis, i in at.items() if axis in pattern.axes}
        inner = {axis: i for axis, i in at.items() if axis not in scan}
        spec = tree.tensors[key.render({**inner, "g": 0})]
        group = group_of(sides, pair, inner, (spec.name,), spec.dtype, _sizes(tree, pair, spec))
        block = Block(reader=tree, groups={(pair.role, pair.part): group}, scan=scan, label=name)
        yield from expert_units([index.get("path", ""), index.get("l")], block)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One tensor of Hugging Face in an array of a tree: the axes that are kept of the array, and their sizes."""

    tree: Reader
    pair: Pair
    index: Mapping[str, int]
    sizes: Mapping[str, int]

    def array(self, strip: Mapping[str, range]) -> str:
        """The name of the array that has a strip."""
        at = {axis: span.start for axis, span in strip.items()}
        return self.pair.source.key.render({**dict.fromkeys(self.pair.source.key.slots, 0), **self.index, **at})

    def slices(self, strip: Mapping[str, range]) -> Slices:
        """Its part of the array; of a strip that part alone."""
        spans = [
            range(self.index[axis], self.index[axis] + 1) if axis in self.index else strip.get(axis, range(self.sizes[axis]))
            for axis in self.pair.source.pattern.axes
        ]
        return tuple(slice(span.start, span.stop) for span in spans)

    def strips(self) -> Iterator[dict[str, range]]:
        """Parts along its outermost axis in Hugging Face, which follow one another there."""
        axes = self.pair.target.pattern.axes
        if not axes:
            yield {}
            return
        if self.pair.turns:
            yield from ({ROWS: rows} for rows in stretches(self.pair.turns, self.index[TENSOR]))
            return
        size = self.sizes[axes[0]]
        step = max(1, STRIP * size // max(1, math.prod(self.sizes[axis] for axis in axes)))
        if axes[0] in self.pair.source.key.slots:
            step = 1  # each is an array of its own
        for start in range(0, size, step):
            yield {axes[0]: range(start, min(start + step, size))}

    def read(self) -> Iterator[Logical]:
        """As Hugging Face has it."""
        pattern = self.pair.target.pattern
        name, dtype = self.pair.target.key.render(self.index), self.tree.tensors[self.array({})].dtype
        yield Logical(name=name, dtype=dtype, shape=pattern.shape(self.sizes), pieces=self._pieces())

    def _pieces(self) -> Iterator[NDArray[Any]]:
        axes = self.pair.source.pattern.axes
        dropped = tuple(at for at, axis in enumerate(axes) if axis in self.index)
        named = [axis for axis in self.pair.source.key.slots if axis not in self.index]
        kept = " ".join([*named, *(axis for axis in axes if axis not in self.index)])
        for strip in self.strips():
            data = self.tree.read(self.array(strip), self.slices(strip)).squeeze(dropped)
            data = data.reshape((1,) * len(named) + data.shape)
            yield from rows_of(rearrange(data, f"{kept} -> {self.pair.target.pattern.text}"))


def _rows_in(pair: Pair, index: Mapping[str, int]) -> dict[str, int]:
    """How many rows a tensor has whose array holds those of others, too."""
    return {ROWS: pair.turns.size(index[TENSOR])} if pair.turns else {}


def _rows(tree: Reader, _: Sides, pair: Pair) -> Iterator[Unit]:
    """One kind of any other tensor."""
    tensors = [{TENSOR: tensor} for tensor in range(len(pair.turns.parts))] if pair.turns else [{}]
    for layer, tensor in itertools.product(_layers(pair), tensors):
        at = layer | tensor
        spec = tree.tensors[pair.source.key.render({**dict.fromkeys(pair.source.key.slots, 0), **at})]
        row = _Row(tree=tree, pair=pair, index=at, sizes=_sizes(tree, pair, spec) | _rows_in(pair, at))
        first = row.slices(next(row.strips(), {}))
        nbytes = math.prod(lengths(first)) * itemsize(spec.dtype)
        yield Unit(array=spec.name, slices=first, nbytes=nbytes, read=partial(_Row.read, row))
