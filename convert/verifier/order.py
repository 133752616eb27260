"""In which order two checkpoints are compared: chunks that hold many experts of many layers should be decoded once.

Where no chunk reaches across experts, it is layer by layer. Else Orbax arrays are read through windows (see
`layouts.orbax_windows`), and what lies in one is compared before the next one is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from convert.verifier.logical import Block, Sides, Slab, located
from layouts.checkpoint import Reader, itemsize
from layouts.describe import identity

if TYPE_CHECKING:
    from layouts.orbax_windows import Windows

_Item = TypeVar("_Item")
Place = tuple[str, tuple[int, ...]]
"""An array and the number of one of its windows."""
PART = 8
"""The windows of a checkpoint get one in so many parts of the memory."""
STRIP = 4 << 20
"""Elements of a tensor compared at a time."""
STREAM = 16 << 20
"""Bytes of a chunk above which it is decoded piece by piece, and of blocks that go back to the system when they are freed."""
NOWHERE: Place = ("", ())


def hold(reader: Reader, units: Mapping[str, Sequence[int]], beside: int, memory: int) -> None:
    """Read these arrays through windows where chunks reach across `units`, of which so many are read `beside` one another.

    `units` are the lengths of what is read of each array in turn.
    """
    if reader.format != "orbax":
        return
    from convert.malloc import keep_below
    from layouts.orbax import OrbaxReader, ReadLimits
    from layouts.orbax_windows import Windows, window_shape

    assert isinstance(reader, OrbaxReader)
    limit, shapes, streams = memory // PART, {}, 1
    for name, unit in units.items():
        spec, chunk = reader.tensors[name], reader.chunks[name]
        room = limit // beside // itemsize(spec.dtype)
        if found := window_shape(spec.shape, chunk, unit, unit, room):
            shapes[name] = found
            streams = max(streams, math.prod(-(-length // step) for length, step in zip(found, chunk, strict=True)))
    keep_below(STREAM)
    reader.close()
    reader.limits = ReadLimits(cache=limit // PART, stream=STREAM, streams=streams * beside)
    reader.windows = Windows(shapes=shapes, limit=limit)


def hold_experts(pairs: Sequence[Sides], memory: int, others: Iterable[tuple[Reader, Iterable[str]]] = ()) -> None:
    """The same for who reads expert after expert of two checkpoints side by side, and of each some `others` in strips."""
    units: dict[int, dict[str, Sequence[int]]] = {}
    readers: dict[int, Reader] = {}
    beside = 1
    for block in itertools.chain.from_iterable(pairs):
        slabs = _slabs(block)
        beside = max(beside, len(slabs))
        readers[id(block.reader)] = block.reader
        units.setdefault(id(block.reader), {}).update({slab.name: slab.lengths for slab in slabs})
    for reader, names in others:
        readers[id(reader)] = reader
        units.setdefault(id(reader), {}).update({name: _strip(reader.tensors[name].shape) for name in names})
    for key, reader in readers.items():
        hold(reader, units[key], beside, memory)
    _align(pairs)


def _slabs(block: Block) -> list[Slab]:
    """Where the first expert of a layer is, in each array that has a part of it."""
    found = [located(block, kind, {"e": 0, "g": g}, range(1)) for kind in block.groups for g in (0, 1)]
    return list({slab.name: slab for slab in found}.values())


def _strip(shape: Sequence[int]) -> list[int]:
    pattern = identity(len(shape))
    first = next(iter(pattern.strips(dict(zip(pattern.axes, shape, strict=True)), STRIP)))
    return [len(span) for span in first.values()]


def _align(pairs: Iterable[Sides]) -> None:
    """Make windows of arrays that are read side by side hold the same experts and layers: those of the smallest one."""
    done: set[str] = set()
    for sides in pairs:
        if (first := _slabs(sides[0])[0].name) in done:
            continue
        done.add(first)
        held = [
            (windows.shapes, slab.name, [slab.axes.index(axis) for axis in ("e", *block.scan) if axis in slab.axes])
            for block in sides
            if (windows := windows_of(block.reader))
            for slab in _slabs(block)
            if slab.name in windows.shapes
        ]
        least = [
            min(lengths) for lengths in zip(*([shapes[name][at] for at in axes] for shapes, name, axes in held), strict=False)
        ]
        for shapes, name, axes in held:
            shape = list(shapes[name])
            for at, length in zip(axes, least, strict=False):
                shape[at] = length
            shapes[name] = tuple(shape)


def windows_of(reader: Reader) -> Windows | None:
    """Those of an Orbax checkpoint."""
    return getattr(reader, "windows", None)


def place_of(reader: Reader, name: str, slices: tuple[slice, ...]) -> Place:
    """Where a block is read; nowhere in particular without windows."""
    windows = windows_of(reader)
    number = windows.number(name, slices) if windows else ()
    return (name, number) if number else NOWHERE


def expert_place(block: Block, e: int) -> Place:
    """Where an expert of a layer is read."""
    slab = located(block, ("wi", ""), {"e": e, "g": 0}, range(e, e + 1))
    return place_of(block.reader, slab.name, slab.slices)


def experts_held(block: Block) -> int:
    """How many experts of a layer a window holds; all of them where there is none."""
    slab, windows = located(block, ("wi", ""), {"e": 0, "g": 0}, range(1)), windows_of(block.reader)
    shape = windows.shapes.get(slab.name) if windows else None
    return shape[slab.axes.index("e")] if shape else block.experts


def by_place(items: Iterable[tuple[_Item, Sequence[Place]]]) -> list[_Item]:
    """Things in the order of the windows in which they are read on either side; else as they stand."""
    return [item for item, _ in sorted(items, key=lambda entry: tuple(entry[1]))]
