"""Read expert weights back in their logical axes, independently of the code that fuses.

In: descriptions of checkpoints. Out: layers, and the bits of each expert. It never uses the code that fuses: where that copies
views by its own arithmetic, this takes whole stored slabs apart. Of two implementations of one table a mistake in one shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.stored import ORDER, Axis, Cut, arranged, dimensions
from layouts.disk.pread import Empty
from layouts.matching.describe import Description
from layouts.matching.group import Group
from layouts.reader import Reader, is_chunked
from layouts.windows import lengths

PROJECTIONS: Mapping[str, tuple[str, ...]] = {"wi": ("gate (wi_0)", "up (wi_1)"), "wo": ("down (wo)",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """All layers and experts if None; `tokens` multiplies random ones; gradients run `always`, or where outputs agree."""

    layers: frozenset[int] | None = None
    experts: frozenset[int] | None = None
    tokens: int = 1
    always: bool = False

    def holds(self, block: Block) -> bool:
        """Whether a MoE layer is compared; those of a stack count by their place in it."""
        return self.layers is None or block.number in self.layers

    @property
    def is_narrow(self) -> bool:
        """Whether it leaves out anything."""
        return self.layers is not None or self.experts is not None

    def of(self, experts: range) -> list[int]:
        """The experts of these that are compared."""
        return [e for e in experts if self.experts is None or e in self.experts]


Kind = tuple[str, str]
"""Role and part: `("wi", "")` is the weight, `("wi", "bias")` its bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One MoE layer of a checkpoint: the groups of its roles and, in scanned trees, which layer of the stack."""

    reader: Reader
    groups: Mapping[Kind, Group]
    scan: Mapping[str, int]
    label: str

    @property
    def experts(self) -> int:
        """E: those that have a down projection."""
        return min(self._counts)

    @property
    def stored(self) -> int:
        """The same with those that are the identity and have rows of gate and up all the same (LongCat)."""
        return max(self._counts)

    @property
    def _counts(self) -> list[int]:
        return [group.sizes["e"] for group in self.groups.values() if "e" in group.sizes]

    @property
    def number(self) -> int:
        """By which a layer is chosen; in a stack of layers its place in it."""
        index = next(iter(self.groups.values())).index
        return int(index["l"]) if "l" in index else next(iter(self.scan.values()), 0)


Sides = tuple[Block, Block]
"""A layer of one checkpoint and the same of another."""


def blocks(reader: Reader, description: Description) -> dict[str, Block]:
    """Every MoE layer by a key that does not depend on the layout: where it is, and its place in a stack of layers."""
    found: dict[tuple[Any, Any, Any], dict[Kind, Group]] = {}
    for group in description.groups:
        place = (group.index.get("path", ""), group.index.get("l"), group.index.get("kind"))
        found.setdefault(place, {})[group.role, group.part] = group
    several = len({path for path, _, _ in found}) > 1
    made: dict[str, Block] = {}
    for (path, layer, kind), groups in found.items():
        shown = str(path) if layer is None else f"{path} layer {layer}" if several else f"layer {layer}"
        shown += "" if kind is None else f" kind {kind}"
        index = {"path": path, "l": layer} | ({} if kind is None else {"kind": kind})
        made |= {key_of(index, block.scan): block for block in _unstack(reader, shown, groups)}
    return made


def key_of(index: Mapping[str, Any], scan: Mapping[str, int]) -> str:
    """Where a MoE layer is, of which kind if it has several, and its place in a stack of layers."""
    kind = f" {index['kind']}" if "kind" in index else ""
    return f"{index.get('path', '')} {index.get('l')}{kind} {sorted(scan.items())}"


def _unstack(reader: Reader, place: str, groups: Mapping[Kind, Group]) -> Iterator[Block]:
    sizes = dict(item for group in groups.values() for item in group.sizes.items())
    scan = {axis: size for axis, size in sizes.items() if axis not in ("e", "k", "g", "n", "s", "c", "d", "u")}
    for point in itertools.product(*map(range, scan.values())):
        label = " ".join([place, *(f"scanned {position}" for position in point)])
        yield Block(reader=reader, groups=groups, scan=dict(zip(scan, point, strict=True)), label=label)


def pair(a: Mapping[str, Block], b: Mapping[str, Block]) -> Iterator[tuple[Block, Block]]:
    """The MoE layers that can be compared weight by weight, side by side; `unlike` names the others."""
    yield from ((block, b[key]) for key, block in a.items() if key in b and not _difference(block, b[key]))


def unlike(a: Mapping[str, Block], b: Mapping[str, Block]) -> list[str]:
    """The MoE layers that only one checkpoint has, or that differ in E, K, N or element type, in words."""
    lonely = [(a.get(key) or b[key]).label for key in sorted(a.keys() ^ b.keys())]
    found = [f"{label}: only one of the two has this MoE layer" for label in lonely]
    differences = (_difference(block, b[key]) for key, block in a.items() if key in b)
    return found + [difference for difference in differences if difference]


def _difference(a: Block, b: Block) -> str | None:
    for kind in sorted(a.groups.keys() ^ b.groups.keys()):
        return f"{a.label}: only one of the two has {'_'.join(filter(None, kind))}"
    for (role, part), group in sorted(a.groups.items()):
        one, other = ((g.dtype, *(g.total(axis) for axis in "ekn" if axis in g.sizes)) for g in (group, b.groups[role, part]))
        if one != other:
            axes = ", ".join(axis.upper() for axis in "ekn" if axis in group.sizes)
            what = "_".join(filter(None, (role, part)))
            return f"{a.label}: {what} is {one[0]} with ({axes}) {one[1:]} in one, {other[0]} {other[1:]} in the other"
    return None


def name_at(block: Block, kind: Kind, at: Mapping[str, int]) -> str:
    """How the tensor that holds this projection of this expert is called."""
    return block.groups[kind].placed.key.render({**block.groups[kind].index, **at})


def expert(block: Block, kind: Kind, e: int) -> NDArray[Any]:
    """The bits of one expert in its logical axes: `wi` (2, K, N) gate first, `wo` (N, K); companions without what they lack.

    Raises:
        ValueError: there is something in the padding.
    """
    found = projections(block, kind, e)
    return np.stack(found) if kind[0] == "wi" else found[0]


def projections(block: Block, kind: Kind, e: int, empty: Empty = np.empty, cut: Cut | None = None) -> Sequence[NDArray[Any]]:
    """The same as views of what was read into memory that `empty` gives: gate and up (K, N), or down (N, K); or a part of it.

    Raises:
        ValueError: there is something in the padding.
    """
    if "g" in block.groups[kind].placed.key.slots:
        return [part(block, kind, e, g, empty, cut) for g in (0, 1)]
    found = part(block, kind, e, empty=empty, cut=cut)
    return list(found) if kind[0] == "wi" and "g" in block.groups[kind].sizes else [found]  # one for both, too


def part(block: Block, kind: Kind, e: int, g: int = 0, empty: Empty = np.empty, cut: Cut | None = None) -> NDArray[Any]:
    """The same of one stored tensor: what it holds of an expert, without `g` where gate and up are in tensors of their own.

    Raises:
        ValueError: there is something in the padding.
    """
    data, dims = slab(block, kind, {"e": e, "g": g}, range(e, e + 1), empty, cut)
    found = turned(block, kind, data, dims)
    return found[0] if any(dimension[0].name == "e" for dimension in dims) else found


def turned(block: Block, kind: Kind, data: NDArray[Any], dims: Sequence[Sequence[Axis]]) -> NDArray[Any]:
    """Stored bits in logical axes, behind that of experts if they have one; see `part`."""
    held = sum(axis.name in "du" for dimension in dims for axis in dimension)
    ones = block.groups[kind].dims.split().count("one") - held  # of size 1, and not stored
    return arranged(data, dims, ("e", *ORDER[kind[0]]))[(..., *[None] * ones)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """Where some experts of one layer are: slices of a stored tensor, and the axes of each dimension that is kept."""

    name: str
    slices: tuple[slice, ...]
    dropped: tuple[int, ...]
    dims: list[list[Axis]]
    axes: tuple[str, ...]

    @property
    def lengths(self) -> list[int]:
        """Of the slices."""
        return lengths(self.slices)


def cuttable(block: Block, kind: Kind) -> frozenset[str]:
    """The axes along which a part of an expert can be read: those that are a dimension of their own, forwards."""
    group = block.groups[kind]
    stored = dimensions(group.placed.pattern.text, group.sizes)
    return frozenset(axes[0].name for axes in stored if len(axes) == 1 and not axes[0].reverse) & {"k", "n"}


def located(block: Block, kind: Kind, at: Mapping[str, int], experts: range, cut: Cut | None = None) -> Slab:
    """The part of a stored tensor that holds some experts, or a part of one, and one layer of the stack."""
    group = block.groups[kind]
    name = name_at(block, kind, at)
    slices, dropped, kept, axes = [], [], [], []
    stored = dimensions(group.placed.pattern.text, group.sizes)
    for position, (dimension, length) in enumerate(zip(stored, block.reader.tensors[name].shape, strict=True)):
        first, inner = dimension[0], dimension[1:]
        axes.append(first.name)
        if first.name in block.scan:
            dropped.append(position)
            slices.append(slice(block.scan[first.name], block.scan[first.name] + 1))
            continue
        if first.name == "e":
            rows = int(np.prod([axis.stored for axis in inner])) if inner else 1
            slices.append(slice(experts.start * rows, experts.stop * rows))
            dimension = [Axis(name="e", size=len(experts), stored=len(experts), reverse=False), *inner]
        elif cut and cut.axis == first.name and not inner:
            stop = length if cut.stop is None else cut.stop
            slices.append(slice(cut.start, stop))
            dimension = [replace(first, size=min(first.size, stop) - cut.start, stored=stop - cut.start)]
        else:
            slices.append(slice(0, length))
        kept.append(dimension)
    return Slab(name=name, slices=tuple(slices), dropped=tuple(dropped), dims=kept, axes=tuple(axes))


def slab(
    block: Block, kind: Kind, at: Mapping[str, int], experts: range, empty: Empty = np.empty, cut: Cut | None = None
) -> tuple[NDArray[Any], list[list[Axis]]]:
    """The stored tensor for some experts and one layer of the stack: its bits, and the axes of each of its dimensions."""
    found = located(block, kind, at, experts, cut)
    data = block.reader.read(found.name, found.slices, empty)
    if is_chunked(block.reader):  # or one expert would hold the window that it is read in
        window, data = data, empty(data.shape, data.dtype)
        data[...] = window
    return data.squeeze(found.dropped), found.dims
