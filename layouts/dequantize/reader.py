"""The checkpoint with its quantised tensors computed.

In: an open quantised checkpoint. Out: a reader of its bfloat16 form. It never writes.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.dequantize.compute import Block, Recipe, compute, is_turned, load
from layouts.dequantize.find import hidden, recipes
from layouts.dequantize.values import ROOM, Room
from layouts.disk.files import read_object
from layouts.disk.pread import Empty, Extent
from layouts.errors import PlanError
from layouts.quantisation import FILES, PARAMS, QUANTIZATION, without
from layouts.reader import Reader, ReadUnit, remarks_of
from layouts.side_files import SideFiles
from layouts.tensors import TensorSpec, bits
from layouts.through import Through

HELD = 32 << 20
"""Bytes of blocks that a thread holds, those that it read last: gate and up, which a strip of the output takes in turn."""
_MOST = HELD // 2
"""Bytes of each."""
_READ = 1 << 20
"""Bytes that are read at a time where nothing is held: they stay in the cache."""


class _Own(threading.local):
    """What one thread holds: blocks by matrix and rows, and memory to compute in."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[Any, ...], Block] = {}
        self.room = Room()


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizingReader(Through):
    """See `layouts.reader.Reader`; `quantized` says how the tensors of these names are computed."""

    tensors: Mapping[str, TensorSpec]
    quantized: Mapping[str, Recipe]
    _own: _Own = field(default_factory=_Own, repr=False, compare=False)

    @property
    def held(self) -> int:
        """Blocks, and memory to compute in."""
        return HELD + ROOM

    @property
    def scattered(self) -> Mapping[str, Recipe]:
        """What is computed."""
        return self.quantized

    @property
    def config(self) -> Mapping[str, Any]:
        """`config.json` of a model that is not quantised."""
        return without(self.inner.config)

    @property
    def record(self) -> None:
        """None: what we made ourselves is not read through this."""
        return

    @property
    def records(self) -> Mapping[str, Any]:
        """None."""
        return {}

    @property
    def side_files(self) -> SideFiles:
        """As they are, but for those that only say how the model was quantised."""
        found = self.inner.side_files
        gone = tuple(name for name in FILES if name in found.plain)
        kept = {name: size for name, size in found.plain.items() if name not in gone}
        return replace(found, plain=kept, never=(*found.never, *gone)) if gone else found

    @property
    def headers(self) -> Mapping[str, str]:
        """None: the files of what is computed are others."""
        return {}

    @property
    def computed(self) -> tuple[str, ...]:
        """What is computed, and what is left out with it, a line for each kind of name."""
        gone = hidden(self.inner, self.quantized) - {n for r in self.quantized.values() for n in (r.data, r.scale, r.second)}
        kinds = Counter((recipe.format.name, _folded(name)) for name, recipe in self.quantized.items())
        lines = [f"{kind}  {name}  x{count}" for (kind, name), count in sorted(kinds.items())]
        return (*lines, *(f"left out  {name}  x{count}" for name, count in sorted(Counter(map(_folded, gone)).items())))

    @property
    def remarks(self) -> tuple[str, ...]:
        """Also that a file which is carried over as it is says how the model was quantised."""
        told = remarks_of(self.inner)
        if PARAMS in self.side_files.plain and QUANTIZATION in read_object(self.path / PARAMS):
            told += (f"{PARAMS} is carried over as it is, and says how the model was quantised: take {QUANTIZATION!r} out",)
        return told

    def unit(self, name: str) -> ReadUnit | None:
        """As the quantised data is read."""
        return self.inner.unit(self._data(name))

    def where(self, name: str) -> str:
        """The place of the quantised data."""
        return self.inner.where(self._data(name))

    def extent(self, name: str) -> Extent | None:
        """None of what is computed: it may not be read past `read`."""
        return None if name in self.quantized else self.inner.extent(name)

    def _data(self, name: str) -> str:
        return self.quantized[name].data if name in self.quantized else name

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block as bits of bfloat16, computed; other tensors as they are stored."""
        if name not in self.quantized:
            return self.inner.read(name, slices, empty)
        recipe = self.quantized[name]
        spans = [range(*cut.indices(size)) for cut, size in zip(slices, recipe.shape, strict=True)]
        out = empty([len(span) for span in spans], bits("BF16"))
        if not out.size:
            return out
        into = out.swapaxes(-1, -2) if recipe.format.folded else out
        *lead, rows, columns = [*spans[:-2], spans[-1], spans[-2]] if recipe.format.folded else spans
        with np.errstate(all="ignore"):
            for point in itertools.product(*lead):
                place = into[tuple(at - span.start for at, span in zip(point, lead, strict=True))]
                turned = is_turned(place)
                step = max(1, int((_MOST if turned else _READ) / (recipe.weight * len(columns))))
                for start in range(0, len(rows), step):
                    part = rows[start : start + step]
                    read = self._kept if turned else partial(load, self.inner, empty=self._own.room.empty)
                    block = read(recipe, point, part, columns)
                    compute(block, columns, place[start : start + len(part)], self._own.room)
        return out

    def _kept(self, recipe: Recipe, point: Sequence[int], rows: range, columns: range) -> Block:
        """Some rows of a matrix, with the columns that come next: reading some of them passes over the rest anyway."""
        blocks, key = self._own.blocks, (recipe.name, *point, rows)
        block = blocks.pop(key, None)
        if block is None or columns.start < block.columns.start or columns.stop > block.columns.stop:
            more = int(_MOST / (recipe.weight * len(rows)))
            wide = range(columns.start, min(max(columns.stop, columns.start + more), recipe.columns))
            while blocks and sum(each.nbytes for each in blocks.values()) > HELD - _MOST:
                del blocks[next(iter(blocks))]
            block = load(self.inner, recipe, point, rows, wide)
        blocks[key] = block  # the last one used stands last
        return block


def dequantized(reader: Reader) -> DequantizingReader:
    """The checkpoint in bfloat16.

    Raises:
        PlanError: it is not quantised, not in a way that is known here, or it is one that this tool has fused already.
        InputError: data without scales, scales without data, or a grid that does not fit.
    """
    if reader.format == "orbax":
        raise PlanError(f"{reader.path}: scales of a tree are not computed; convert it with --to=hf, then dequantise that")
    if "layout" in (reader.record or {}):
        raise PlanError(f"{reader.path}: its experts are fused already; split it first, then dequantise")
    found = recipes(reader)
    gone, first = hidden(reader, found), {recipe.data: recipe for recipe in found.values()}
    tensors = {}
    for name, spec in reader.tensors.items():
        if name in first:
            tensors[first[name].name] = TensorSpec(name=first[name].name, dtype="BF16", shape=first[name].shape)
        elif name not in gone:
            tensors[name] = spec
    return DequantizingReader(inner=reader, tensors=tensors, quantized=found)


def _folded(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
