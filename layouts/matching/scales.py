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

import numpy as np
from numpy.typing import NDArray

from layouts.disk.gather import gathered
from layouts.disk.places import is_remote
from layouts.language.layout import Placed
from layouts.language.parts import PARTS
from layouts.language.slots import Index
from layouts.reader import Reader
from layouts.tensors import numpy_dtype

_MOST, _AFAR = 1 << 14, 64
"""Pairs of a kind that are looked at, on a disk and in a store: no store is asked a thousand times for a plan."""
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E8M0", "F8_E4M3", "F8_E5M2")
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

    def pairs(self, reader: Reader, numbers: range) -> NDArray[np.float64]:
        """(2, ...): gate and up of the names of these numbers, one behind the other."""
        if "g" in self.placed.key.slots:
            return np.stack([self._values(reader, self._names({**self.index, "g": g}, numbers)).reshape(-1) for g in (0, 1)])
        found = self._values(reader, self._names(self.index, numbers))
        found = found.reshape(len(numbers), *self.placed.pattern.split(self.sizes))
        return np.moveaxis(found, 1 + self.placed.pattern.axes.index("g"), 0).reshape(2, -1)

    def _names(self, index: Index, numbers: range) -> list[str]:
        names = self.placed.key.names(index, {axis: range(self.sizes[axis]) for axis in self.named})
        return list(itertools.islice(names, numbers.start, numbers.stop, numbers.step))

    def _values(self, reader: Reader, names: Sequence[str]) -> NDArray[np.float64]:
        """What these tensors hold, one behind the other; they are read together where they lie in files as they are."""
        spec, extents = reader.tensors[names[0]], reader.extents(names)
        if extents is not None:
            data = np.empty((len(names), spec.nbytes), np.uint8)
            for file, places, starts in extents:
                data[places] = gathered(file, starts, spec.nbytes)
        else:
            whole = tuple(slice(0, size) for size in spec.shape)
            data = np.concatenate([np.asarray(reader.read(name, whole), order="C").reshape(-1) for name in names])
        return data.reshape(-1).view(numpy_dtype(self.dtype)).astype(np.float64)


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
    gate, up = np.concatenate([each.pairs(reader, numbers) for each, numbers in _every(step, held)], axis=1)
    with np.errstate(all="ignore"):
        differ = ~((gate == up) | (np.isnan(gate) & np.isnan(up)))
        ratios = np.maximum(gate / up, up / gate)[differ]
    pairs = f"{gate.size:,} pairs" + (f" (one in {step} was looked at)" if step > 1 else "")
    if not ratios.size:
        return f"{word} of gate and up: none of {pairs} differs"
    sound = np.isfinite(ratios) & (ratios > 0)
    odd = ratios.size - int(sound.sum())
    apart = [f"by a factor of up to {ratios[sound].max():.4g}"] if odd < ratios.size else []
    apart += [f"{odd:,} of them zero, negative, infinite or no number on one side"] if odd else []
    told = f"{ratios.size:,} of {pairs} differ, {', '.join(apart)}; kernels with one for both need them equal"
    return f"{word} of gate and up: {told}"


def _every(step: int, held: Iterable[Scales]) -> Iterator[tuple[Scales, range]]:
    """One number of so many, where those of all are counted one behind the other."""
    before = 0
    for each in held:
        if numbers := range(-before % step, each.count, step):
            yield each, numbers
        before += each.count
