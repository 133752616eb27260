"""Read expert weights back in their logical axes, independently of the code that fuses.

Where `convert.blocks` copies views by its own arithmetic, this reads whole stored slabs of one expert and lets einops take
them apart: two implementations of the same table, so that a mistake in one shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from layouts.checkpoint import Reader
from layouts.describe import Description, Group

LOGICAL: Mapping[str, str] = {"wi": "g k n", "wo": "n k"}
"""Role -> the axes of one expert's logical weight: `wi` (2, K, N) with gate first, `wo` (N, K)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One MoE layer of a checkpoint: the groups of its roles and, in scanned trees, which layer of the stack."""

    reader: Reader
    groups: Mapping[str, Group]
    scan: Mapping[str, int]
    label: str

    @property
    def experts(self) -> int:
        """E."""
        return self.groups["wi"].sizes["e"]


def blocks(reader: Reader, description: Description) -> dict[str, Block]:
    """Every MoE layer by a label that does not depend on the layout: where it is, and its place in a stack of layers."""
    found: dict[str, dict[str, Group]] = {}
    for group in description.groups:
        place = " ".join(f"{'layer' if axis == 'l' else axis} {value}" for axis, value in group.index.items())
        found.setdefault(place, {})[group.role] = group
    return {block.label: block for place, groups in found.items() for block in _unstack(reader, place, groups)}


def _unstack(reader: Reader, place: str, groups: Mapping[str, Group]) -> Iterator[Block]:
    scan = {axis: size for axis, size in groups["wi"].sizes.items() if axis not in ("e", "k", "g", "n")}
    for point in itertools.product(*map(range, scan.values())):
        at = dict(zip(scan, point, strict=True))
        label = " ".join([place, *(f"scanned {position}" for position in point)])
        yield Block(reader=reader, groups=groups, scan=at, label=label)


def pair(a: Mapping[str, Block], b: Mapping[str, Block]) -> Iterator[tuple[Block, Block]]:
    """The MoE layers that can be compared weight by weight, side by side; `unlike` names the others."""
    yield from ((block, b[label]) for label, block in a.items() if label in b and not _difference(block, b[label]))


def unlike(a: Mapping[str, Block], b: Mapping[str, Block]) -> list[str]:
    """The MoE layers that only one checkpoint has, or that differ in E, K, N or element type, in words."""
    found = [f"{label}: only one of the two has this MoE layer" for label in sorted(a.keys() ^ b.keys())]
    differences = (_difference(block, b[label]) for label, block in a.items() if label in b)
    return found + [difference for difference in differences if difference]


def _difference(a: Block, b: Block) -> str | None:
    for role in LOGICAL:
        one, other = ((g.dtype, *(g.sizes[axis] for axis in "ekn")) for g in (a.groups[role], b.groups[role]))
        if one != other:
            return f"{a.label}: {role} is {one[0]} with (E, K, N) {one[1:]} in one, {other[0]} {other[1:]} in the other"
    return None


def expert(block: Block, role: str, e: int) -> NDArray[Any]:
    """The bits of one expert in its logical axes: `wi` (2, K, N) gate first, `wo` (N, K)."""
    key = block.groups[role].placed.key
    wanted = " ".join(axis for axis in LOGICAL[role].split() if axis not in key.slots)

    def read(g: int) -> NDArray[Any]:
        data, axes = _pinned(block, role, {"e": e, "g": g}, {**block.scan, "e": range(e, e + 1)})
        pinned = "e " if axes.startswith("e ") else ""
        out: NDArray[Any] = rearrange(data, f"{axes} -> {pinned}{wanted}", **({"g": 2} if "(g " in axes else {}))
        return out[0] if pinned else out

    return np.stack([read(0), read(1)]) if "g" in key.slots else read(0)


def operand(block: Block, role: str, experts: range) -> tuple[NDArray[Any], str]:
    """What a grouped GEMM over these experts takes, and its axes.

    A stacked tensor is given as it is stored, so that the GEMM reads it as a kernel does: `wi` (e, K, 2N) in `concat`.
    Tensors of single experts or of single projections are stacked to (e, 2, K, N) and (e, N, K).
    """
    group = block.groups[role]
    if "e" in group.placed.pattern.axes and "g" not in group.placed.key.slots:
        return _pinned(block, role, {}, {**block.scan, "e": experts})
    return np.stack([expert(block, role, e) for e in experts]), f"e {LOGICAL[role]}"


def _pinned(block: Block, role: str, at: Mapping[str, int], spans: Mapping[str, int | range]) -> tuple[NDArray[Any], str]:
    """Read a tensor with some dimensions cut to a range, or to one index and then left out; and the axes that remain."""
    placed, index = block.groups[role].placed, block.groups[role].index
    slices, dropped, axes = [], [], []
    for position, group in enumerate(placed.pattern.groups):
        span = spans.get(group[0])
        if isinstance(span, int):
            dropped.append(position)
            slices.append(slice(span, span + 1))
            continue
        slices.append(slice(span.start, span.stop) if isinstance(span, range) else slice(None))
        axes.append(f"({' '.join(group)})" if len(group) > 1 else group[0])
    name = placed.key.render({**index, **at})
    data = block.reader.read(name, tuple(slices)).copy(order="C")
    block.reader.release(name, tuple(slices))
    return data.squeeze(tuple(dropped)), " ".join(axes)
