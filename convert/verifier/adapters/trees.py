"""Prove that two trees of MaxText change gate and up of every expert by the same B @ A, fused or apart.

In: two described trees. Out: level `delta`. It never writes.

A tree does not hold alpha: with twice the rank, the scale is the same with twice the alpha.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np

from convert.progress import Progress, begin
from convert.verifier.adapters.factors import Factors, difference, same
from convert.verifier.bits.order import hold
from convert.verifier.content.lora_blocks import GATE_UP, LoraBlock, lora_blocks
from convert.verifier.verdict import Level
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description
from layouts.reader import Reader
from layouts.tensors import numpy_dtype

_ROOM, _BESIDE = 32 << 20, 4
"""Bytes for products, which are compared strip by strip; tensors of a block that are read side by side."""


def compare_trees(
    readers: tuple[Reader, Reader], described: tuple[Description, Description], progress: Progress, memory: int
) -> Level:
    """Compare A and B of gate and up, expert by expert.

    Raises:
        UsageError: a chunk takes more than `memory`.
    """
    records = [record_of(reader) for reader in readers]
    mine, others = (lora_blocks(*side, records) for side in zip(readers, described, strict=True))
    differ = [f"{path}: only in the {'first' if path in mine else 'second'}" for path in sorted(mine.keys() ^ others.keys())]
    differ += [
        f"{path}: {mine[path].kind()} in one, {others[path].kind()} in the other"
        for path in mine.keys() & others.keys()
        if mine[path].kind() != others[path].kind()
    ]
    both = [path for path in mine if path in others and mine[path].kind() == others[path].kind()]
    for reader, blocks in zip(readers, (mine, others), strict=True):
        hold(reader, {name: unit for path in both for name, unit in blocks[path].units().items()}, _BESIDE, memory)
    begin(progress, "B @ A of experts", sum(_nbytes(mine[path]) for path in both))
    compared = moved = 0
    for path in both:
        for why in _compared(path, mine[path], others[path]):
            compared, moved = compared + 1, moved + (why is not None)
            differ += [why] if why else []
        progress(_nbytes(mine[path]))
    products = f", {moved} of them by their products in float64" if moved else ""
    return Level(
        name="delta",
        covered=f"{compared} projections of experts with LoRA in {len(both)} blocks, A and B to the bit{products}; alpha "
        "is not in a tree",
        compared=sum(_nbytes(mine[path]) for path in both),
        differences=tuple(differ),
    )


def _compared(path: str, one: LoraBlock, other: LoraBlock) -> Iterator[str | None]:
    """For each projection: None if the factors are the same numbers, nothing if their products are, else the difference."""
    for at in itertools.product(*map(range, one.points.values())):
        point = dict(zip(one.points, at, strict=True))
        where = ", ".join([path, *(f"{'expert' if axis == 'e' else 'layer'} {i}" for axis, i in point.items())])
        try:
            pairs = tuple(zip(_factors(one, point), _factors(other, point), strict=True))
        except ValueError as error:
            yield f"{where}: {error}"
            continue
        for word, (left, right) in zip(GATE_UP, pairs, strict=True):
            if same(left, right):
                yield None
            else:
                found = difference(_used(left), _used(right), _ROOM)
                yield f"{where}, {word}: {found}" if found else ""


def _factors(block: LoraBlock, point: Mapping[str, int]) -> tuple[Factors, Factors]:
    """A (r, k) and B (n, r) of gate and of up, of one expert of one layer, as numbers.

    Raises:
        ValueError: there is something in the padding.
    """
    types = [numpy_dtype(block.reader.tensors[name].dtype) for name in block.names[:2]]
    made = [
        Factors(**{side: bits.view(dtype).astype(np.float64).T for side, bits, dtype in zip("ab", pair, types, strict=True)})
        for pair in block.halves(point)
    ]
    return made[0], made[1]


def _used(factors: Factors) -> Factors:
    """Without ranks that are zeros."""
    used = factors.a.any(axis=1) & factors.b.any(axis=0)
    return Factors(a=factors.a[used], b=factors.b[:, used])


def _nbytes(block: LoraBlock) -> int:
    return sum(block.reader.tensors[name].nbytes for name in block.names)
