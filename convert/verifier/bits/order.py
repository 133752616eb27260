"""In which order two checkpoints are compared: chunks that hold many experts of many layers should be decoded once.

In: layers and how their arrays are chunked. Out: an order, and windows. It never compares.

If no chunk reaches across experts, the order is layer by layer. Else Orbax arrays are read through windows (`layouts.windows`),
and everything in one window is compared before the next one is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from convert.errors import too_little
from convert.verifier.bits.logical import Block, Sides, Slab, located
from layouts.language.pattern import strips
from layouts.reader import Reader, ReadLimits, is_chunked
from layouts.tensors import itemsize
from layouts.windows import Windows, lengths, window_shape

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

    Raises:
        UsageError: a chunk takes more memory than there is, and cannot be streamed.
    """
    if not is_chunked(reader):
        return
    from layouts.orbax.malloc import keep_below

    limit, shapes, streams = memory // PART, {}, 1
    for name, unit in units.items():
        spec, cost = reader.tensors[name], reader.unit(name)
        if cost and cost.nbytes > memory and not cost.streams(STREAM):
            raise too_little(
                memory, f"{name} is stored in chunks of {cost.nbytes:,} bytes, which have to be decoded as a whole"
            )
        room = limit // beside // itemsize(spec.dtype)
        if cost and (found := window_shape(spec.shape, cost.shape, unit, unit, room)):
            shapes[name] = found
            streams = max(streams, math.prod(-(-length // step) for length, step in zip(found, cost.shape, strict=True)))
    keep_below(STREAM)
    limits = ReadLimits(cache=limit // PART, stream=STREAM, streams=streams * beside)
    reader.hold(limits, Windows(shapes=shapes, limit=limit))


def hold_experts(pairs: Sequence[Sides], readers: Iterable[tuple[Reader, Iterable[str]]], memory: int) -> None:
    """The same for who reads expert after expert of these layers side by side, and of each reader some others in strips."""
    stacks = [[(block, _slabs(block)) for block in sides if is_chunked(block.reader)] for sides in pairs]
    every = list(itertools.chain.from_iterable(stacks))
    beside = max((len(slabs) for _, slabs in every), default=1)
    for reader, others in readers:
        units = {slab.name: slab.lengths for block, slabs in every if block.reader is reader for slab in slabs}
        if is_chunked(reader):
            units |= {
                name: lengths(next(strips(reader.tensors[name].shape, STRIP))) for name in others if reader.tensors[name].nbytes
            }
        hold(reader, units, beside, memory)
    for stack in stacks:
        _align(stack)


def _slabs(block: Block) -> list[Slab]:
    """Where the first expert of a layer is, in each array that has a part of it."""
    found = [located(block, kind, {"e": 0, "g": g}, range(1)) for kind in block.groups for g in (0, 1)]
    return list({slab.name: slab for slab in found}.values())


def _align(stack: Iterable[tuple[Block, Sequence[Slab]]]) -> None:
    """Make windows of arrays that are read side by side hold the same experts and layers: those of the smallest one."""
    held = [
        (windows.shapes, slab.name, [slab.axes.index(axis) for axis in ("e", *block.scan) if axis in slab.axes])
        for block, slabs in stack
        if (windows := windows_of(block.reader))
        for slab in slabs
        if slab.name in windows.shapes
    ]
    least = [min(each) for each in zip(*([shapes[name][at] for at in axes] for shapes, name, axes in held), strict=False)]
    for shapes, name, axes in held:
        shape = list(shapes[name])
        for at, length in zip(axes, least, strict=False):
            shape[at] = length
        shapes[name] = tuple(shape)


def windows_of(reader: Reader) -> Windows | None:
    """Those of a checkpoint, if any of its arrays is read through one."""
    return reader.windows if reader.windows.shapes else None


def place_of(reader: Reader, name: str, slices: tuple[slice, ...]) -> Place:
    """Where a block is read; nowhere in particular without windows."""
    windows = windows_of(reader)
    number = windows.number(name, slices) if windows else ()
    return (name, number) if number else NOWHERE


def places_of(sides: Sides, e: int) -> list[Place]:
    """Where an expert of a layer is read, on either side."""
    return [_expert_place(block, e) for block in sides]


def _expert_place(block: Block, e: int) -> Place:
    if windows_of(block.reader) is None:
        return NOWHERE
    slab = located(block, ("wi", ""), {"e": e, "g": 0}, range(e, e + 1))
    return place_of(block.reader, slab.name, slab.slices)


def experts_held(block: Block) -> int:
    """How many experts of a layer a window holds; all of them where there is none."""
    if (windows := windows_of(block.reader)) is None:
        return block.experts
    slab = located(block, ("wi", ""), {"e": 0, "g": 0}, range(1))
    shape = windows.shapes.get(slab.name)
    return shape[slab.axes.index("e")] if shape else block.experts


def by_place(items: Iterable[_Item], places: Callable[[_Item], Sequence[Place]]) -> list[_Item]:
    """Things in the order of the windows in which they are read on either side; else as they stand."""
    return sorted(items, key=lambda item: tuple(places(item)))
