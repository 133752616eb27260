"""Whether experts that follow one another are equal, all at once: a checkpoint may have 100,000 tensors of a few bytes.

In: a layer of two checkpoints, a run of experts. Out: that all are equal, bit for bit, or not. It never says where they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.alike import differing
from convert.verifier.bits.logical import Block, Kind, Sides, slab, turned
from convert.verifier.bits.stored import Axis, dimensions
from layouts.disk.gather import Part, gather
from layouts.disk.pread import Empty
from layouts.reader import Reader
from layouts.tensors import bits


def consecutive(experts: Sequence[int], most: int) -> Iterator[range]:
    """Runs of experts that follow one another, each of so many at the most."""
    start = end = None
    for e in experts:
        if start is None or e != end or e - start == most:
            if start is not None and end is not None:
                yield range(start, end)
            start = e
        end = e + 1
    if start is not None and end is not None:
        yield range(start, end)


def equal_in(sides: Sides, kind: Kind, experts: range, empty: Empty) -> int | None:
    """How many bytes the first side has of a kind of tensors of these experts, if the other has the same; else None.

    None as well where they cannot be read together, memory does not hold them, or something is wrong with one of them: that is
    for who looks at each.
    """
    if not all(has_own(block, kind) for block in sides):
        return None
    try:
        one, other = (_projections(block, kind, experts, empty) for block in sides)
        pairs = list(zip(one, other, strict=True))
    except (ValueError, MemoryError):  # something in a padding, or gate and up on one side and one for both on the other
        return None
    return None if any(x.shape != y.shape or differing(x, y) for x, y in pairs) else sum(x.nbytes for x, _ in pairs)


def has_own(block: Block, kind: Kind) -> bool:
    """Whether every expert has its own bits, and tensors that are one expert's are no stack of layers."""
    placed = block.groups[kind].placed
    return "e" in placed.pattern.axes or ("e" in placed.key.slots and not block.scan)


def _projections(block: Block, kind: Kind, experts: range, empty: Empty) -> Sequence[NDArray[Any]]:
    """Gate and up (E, K, N), or down (E, N, K), or what both have (E, ...).

    Raises:
        ValueError: there is something in the padding.
    """
    group = block.groups[kind]
    if "g" in group.placed.key.slots:
        return [stack(block, kind, experts, g, empty) for g in (0, 1)]
    found = stack(block, kind, experts, 0, empty)
    return list(found.swapaxes(0, 1)) if kind[0] == "wi" and "g" in group.sizes else [found]


def stack(block: Block, kind: Kind, experts: range, g: int, empty: Empty) -> NDArray[Any]:
    """What one tensor has of these experts, or one for each of them, in logical axes behind that of the experts.

    Raises:
        ValueError: there is something in the padding.
    """
    group = block.groups[kind]
    if "e" not in group.placed.key.slots:
        return turned(block, kind, *slab(block, kind, {"g": g}, experts, empty))
    count = len(experts)
    data = _read(block.reader, list(group.placed.key.names({**group.index, "g": g}, {"e": experts})), empty)
    each = Axis(name="e", size=count, stored=count, reverse=False)
    return turned(block, kind, data, [[each], *dimensions(group.placed.pattern.text, group.sizes)])


def _read(reader: Reader, names: Sequence[str], empty: Empty) -> NDArray[Any]:
    """Tensors of one shape, one behind the other: where they lie in files, neighbours are read together."""
    spec = reader.tensors[names[0]]
    out = empty((len(names), *spec.shape), bits(spec.dtype))
    if (extents := reader.extents(names)) is None:  # computed
        for at, name in enumerate(names):
            out[at] = reader.read(name, tuple(slice(0, size) for size in spec.shape))
    elif spec.nbytes:
        parts = (
            Part(each.file, start, spec.nbytes, at * spec.nbytes)
            for each in extents
            for start, at in zip(each.starts.tolist(), each.places.tolist(), strict=True)
        )
        gather(parts, out.reshape(-1).view(np.uint8).data)
    return out
