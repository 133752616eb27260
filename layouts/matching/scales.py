"""One scale for gate and another for up: how many pairs differ, and how far.

In: an open checkpoint, and where such scales are. Out: a line for each kind. It reads these numbers alone, and changes none.

A kernel that has one number for gate and up together (NVFP4's second level, FP8 with a scale for a tensor) needs them to be
equal. In published files many are not, and nothing but the numbers tells it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.places import is_remote
from layouts.language.layout import Placed
from layouts.language.parts import PARTS
from layouts.language.template import Index
from layouts.reader import Reader
from layouts.tensors import numpy_dtype

_MOST, _AFAR = 1 << 14, 64
"""Pairs of a kind that are looked at, on a disk and in a store: no store is asked a thousand times for a plan."""
_FLOATS = ("F64", "F32", "F16", "BF16")
_WORDS = {part.name: part.word for part in PARTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """One part of the `wi` of a block, as `Group` has it; `dims` are those of a companion."""

    part: str
    dims: str
    dtype: str
    placed: Placed
    index: Index
    sizes: Mapping[str, int]

    @property
    def are_pairs(self) -> bool:
        """Whether it is one number for gate and one for up, of each expert."""
        return bool(self.part) and self.dtype in _FLOATS and self.dims in ("", "one") and self.sizes.get("g") == 2

    @property
    def named(self) -> list[str]:
        """The axes that names hold, but for gate and up."""
        return [slot for slot in self.placed.key.slots if slot in self.sizes and slot != "g"]

    @property
    def count(self) -> int:
        """How many names, or pairs of names, there are."""
        return math.prod(self.sizes[axis] for axis in self.named)

    def pairs(self, reader: Reader, number: int) -> NDArray[np.float64]:
        """(2, ...): gate and up of the names of this number."""
        at = {axis: int(i) for axis, i in zip(self.named, np.unravel_index(number, self._shape), strict=True)}
        if "g" in self.placed.key.slots:
            names = [self.placed.key.render({**self.index, **at, "g": g}) for g in (0, 1)]
            return np.stack([self._read(reader, name).reshape(-1) for name in names])
        found = self._read(reader, self.placed.key.render({**self.index, **at}))
        found = found.reshape(self.placed.pattern.split(self.sizes))
        return np.moveaxis(found, self.placed.pattern.axes.index("g"), 0).reshape(2, -1)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(self.sizes[axis] for axis in self.named)

    def _read(self, reader: Reader, name: str) -> NDArray[np.float64]:
        whole = tuple(slice(0, size) for size in reader.tensors[name].shape)
        found: NDArray[Any] = np.ascontiguousarray(reader.read(name, whole))
        return found.view(numpy_dtype(self.dtype)).astype(np.float64)


def notes(reader: Reader, found: Iterable[Scales]) -> tuple[str, ...]:
    """What a plan should say of the scales of gate and up, a line for each kind.

    Raises:
        InputError, OSError: they cannot be read.
    """
    kinds: dict[str, list[Scales]] = {}
    for each in found:
        if each.are_pairs:
            kinds.setdefault(each.part, []).append(each)
    most = _AFAR if is_remote(reader.path) else _MOST
    return tuple(_line(_WORDS[part], reader, held, most) for part, held in kinds.items())


def _line(word: str, reader: Reader, held: Sequence[Scales], most: int) -> str:
    total = sum(each.count for each in held)
    step = -(-total // most)
    chosen = itertools.islice(_numbered(held), 0, None, step)
    gate, up = np.concatenate([each.pairs(reader, number) for each, number in chosen], axis=1)
    with np.errstate(all="ignore"):
        differ = ~((gate == up) | (np.isnan(gate) & np.isnan(up)))
        ratios = np.maximum(gate / up, up / gate)[differ]
    pairs = f"{gate.size:,} pairs" + (f" (one in {step} was looked at)" if step > 1 else "")
    if not ratios.size:
        return f"{word} of gate and up: none of {pairs} differs"
    sound = np.isfinite(ratios) & (ratios > 0)
    most_apart = f"by a factor of up to {ratios.max():.4g}" if sound.all() else "some of them zero, negative or no number"
    return f"{word} of gate and up: {differ.sum():,} of {pairs} differ, {most_apart}; kernels with one for both need them equal"


def _numbered(held: Iterable[Scales]) -> Iterator[tuple[Scales, int]]:
    for each in held:
        yield from ((each, number) for number in range(each.count))
