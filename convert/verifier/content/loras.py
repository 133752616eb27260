"""A and B of gate and up in a tree as logical tensors, whether they are fused or apart.

In: a described tree. Out: units of reading. It never hashes.

What all experts share is one tensor, which stands with the first of them. A block-diagonal B is that of gate and that of up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from convert.errors import InputError
from convert.verifier.content.hashing import Logical, Unit, rows_of
from convert.verifier.content.lora_blocks import GATE_UP, SIDES, LoraBlock, lora_blocks
from layouts.matching.describe import Description
from layouts.reader import Reader
from layouts.tensors import itemsize


def lora_units(reader: Reader, described: Description, records: Sequence[Mapping[str, Any]]) -> Iterator[Unit]:
    """Every expert of every layer at a time; `records` say how fused columns lie where this tree does not.

    Raises:
        InputError, PlanError: shapes that are no A and B, or nobody says how they lie.
    """
    for path, block in lora_blocks(reader, described, records).items():
        name = block.names[1]
        for at in itertools.product(*map(range, block.points.values())):
            point = dict(zip(block.points, at, strict=True))
            slices = block.slices(name, 1, point)
            nbytes = sum(math.prod(unit) * itemsize(reader.tensors[each].dtype) for each, unit in block.units().items())
            yield Unit(array=name, slices=slices, nbytes=nbytes, read=partial(_read, path, block, point))


def _read(path: str, block: LoraBlock, point: Mapping[str, int]) -> Iterator[Logical]:
    try:
        found = block.halves(point)
    except ValueError as error:
        raise InputError(f"{block.reader.path}: {path}, {dict(point)}: {error}; it is damaged") from None
    for word, pair in zip(GATE_UP, found, strict=True):
        for side, axes, array, name in zip(SIDES, block.at.words, pair, block.names, strict=False):
            if any(i for axis, i in point.items() if axis not in axes):
                continue
            place = [path, *(i for axis, i in point.items() if axis in axes), word, side]
            yield Logical(name=place, dtype=block.reader.tensors[name].dtype, shape=array.shape, pieces=rows_of(array))
