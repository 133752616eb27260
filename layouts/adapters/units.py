"""One projection of one module of experts as it is stored, and the way into the neutral form.

In: an open adapter, tensors that `layouts.adapters.describe` has matched. Out: `Pair`. It never looks at a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layouts.adapters.forms import SIDES, Form
from layouts.adapters.neutral import Bits, Pair, stacked, unpacked
from layouts.adapters.settings import Scale
from layouts.reader import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One projection of one block: its tensors, sizes, and each expert's scale.

    `names` has, for what the file calls `lora_A` and `lora_B`, the stored names: one for each expert, or one for all.
    """

    names: tuple[tuple[str, ...], tuple[str, ...]]
    modules: tuple[str, ...]
    experts: int
    rank: int
    i: int
    o: int
    dtypes: Mapping[str, str]
    scales: tuple[Scale, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One module of experts: `path` is what stands before `.experts`."""

    path: str
    units: Mapping[str, Unit]


def read_pair(reader: Reader, form: Form, unit: Unit) -> Pair:
    """The neutral form of one projection."""
    real: dict[str, Bits] = {}
    for side, names in zip(SIDES, unit.names, strict=True):
        which, pattern = form.pattern(side)
        tensors = []
        for name, scale in zip(names, unit.scales, strict=False):
            shape = reader.tensors[name].shape
            stored = reader.read(name, tuple(slice(0, size) for size in shape))
            tensors.append(unpacked(stored, which, pattern, pattern.sizes(shape, {"r": scale.rank})))
        if form.per_expert:
            real[which] = stacked(tensors, 0 if which == "A" else 1)
        else:
            [array] = tensors
            real[which] = array.repeat(unit.experts, 0) if array.shape[0] < unit.experts else array
    return Pair(a=real["A"], b=real["B"])
