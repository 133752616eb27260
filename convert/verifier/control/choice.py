"""Which bit to flip: one that every level can see that does what it says.

In: a MoE layer, or a checkpoint. Out: `Flip`, and which expert it is of. It never compares.

A level that allows rounding cannot see the last bit of one weight, and should not. So the bit is one of a weight that is used:
a row of `wo` whose neuron gate and up bring to life, of an expert that the router sends tokens to, and the bit that changes the
weight most while the sums stay finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import Block, Kind, expert, located, part
from convert.verifier.content.lora_blocks import LoraBlock
from convert.verifier.control.altered import Flip
from layouts.reader import Reader
from layouts.tensors import itemsize, numpy_dtype

GROWS = 1024
"""How many times as large as the largest weight of its row the altered one may be."""


def of_expert(block: Block, e: int, rows: NDArray[Any] | None) -> tuple[Flip, bool]:
    """A bit of expert `e`, and whether outputs depend on it; `rows` of `wo` are those that one-hot tokens read, if any do."""
    kind: Kind = ("wo", "")
    if rows is None or kind not in block.groups or ("wi", "") not in block.groups:
        kind = min(block.groups)
        name = located(block, kind, {"e": e, "g": 0}, range(e, e + 1))
        return Flip(name=name.name, at=tuple(part.start for part in name.slices), bit=0), False
    gate, up = (_values(each[:, rows], block, "wi") for each in expert(block, ("wi", ""), e))
    with np.errstate(all="ignore"):  # of the largest numbers, the product is none
        products = np.abs(gate).max(axis=0) * np.abs(up).max(axis=0)
    n = int(np.argmax(products))
    alive = bool(products[n] > 0)
    k, bit, grows = _loudest(part(block, kind, e)[rows[n]], block)
    return Flip(name=_name(block, e), at=_stored_at(block, e, {"n": int(rows[n]), "k": k}), bit=bit), alive and grows


def _values(bits: NDArray[Any], block: Block, role: str) -> NDArray[Any]:
    """As float32, what is no number as zero."""
    with np.errstate(all="ignore"):
        values = np.ascontiguousarray(bits).view(numpy_dtype(block.groups[role, ""].dtype)).astype(np.float32)
    return np.where(np.isfinite(values), values, 0)


def _loudest(row: NDArray[Any], block: Block) -> tuple[int, int, bool]:
    """The element of a row of `wo` and the bit that change it most without making it too large, and whether there is one."""
    width = 8 * row.dtype.itemsize
    flipped = np.ascontiguousarray(row)[None] ^ (1 << np.arange(width, dtype=row.dtype))[:, None].astype(row.dtype)
    dtype = numpy_dtype(block.groups["wo", ""].dtype)
    with np.errstate(all="ignore"):
        new, old = (each.view(dtype).astype(np.float32) for each in (flipped, np.ascontiguousarray(row)))
        change = np.abs(new - old)
        largest = np.abs(np.where(np.isfinite(old), old, 0)).max()
        change[~np.isfinite(change) | (np.abs(new) > GROWS * largest)] = -1
    bit, k = np.unravel_index(np.argmax(change), change.shape)
    return int(k), int(bit), bool(change[bit, k] > largest)


def _name(block: Block, e: int) -> str:
    return located(block, ("wo", ""), {"e": e}, range(e, e + 1)).name


def _stored_at(block: Block, e: int, logical: dict[str, int]) -> tuple[int, ...]:
    """Where an element of an expert's `wo` is in its stored tensor."""
    found = located(block, ("wo", ""), {"e": e}, range(e, e + 1))
    sizes = block.groups["wo", ""].sizes
    inner, index = sizes["n"], {"e": 0, "k": logical["k"]}
    index["c"], index["n"] = divmod(logical["n"], inner)
    index["s"], index["c"] = divmod(index["c"], sizes.get("c", 1))
    dims = iter(found.dims)
    at = []
    for position, span in enumerate(found.slices):
        offset = 0
        for axis in () if position in found.dropped else next(dims):
            here = index[axis.name]
            offset = offset * axis.stored + (axis.size - 1 - here if axis.reverse else here)
        at.append(span.start + offset)
    return tuple(at)


def of_lora(loras: Iterable[LoraBlock]) -> Flip | None:
    """A bit of the value of B that weighs most in B @ A of the first expert for which that is not zero."""
    for block in loras:
        for at in itertools.product(*map(range, block.points.values())):
            point = dict(zip(block.points, at, strict=True))
            a, b = (_numbers(block, number, point) for number in (0, 1))
            weighs = np.abs(a).max(axis=0, initial=0)[:, None] * np.abs(b)
            if weighs.any():
                r, n = np.unravel_index(np.argmax(weighs), weighs.shape)
                index, width = {**point, "r": int(r), "n": int(n)}, itemsize(block.reader.tensors[block.names[1]].dtype)
                place = tuple(index[axis] for axis in block.at.words[1])
                return Flip(name=block.names[1], at=place, bit=32 if width > 4 else 0)  # of float64 the last is rounding
    return None


def _numbers(block: LoraBlock, number: int, point: dict[str, int]) -> NDArray[Any]:
    """A (k, r) or B (r, columns) in float64, what is no number as zero."""
    values = block.read(number, point).view(numpy_dtype(block.reader.tensors[block.names[number]].dtype)).astype(np.float64)
    return np.where(np.isfinite(values), values, 0)


def of_other(reader: Reader, names: list[str]) -> Flip | None:
    """The last bit of the first element of the smallest of these tensors."""
    held = [reader.tensors[name] for name in names if reader.tensors[name].nbytes]
    if not held:
        return None
    least = min(held, key=lambda spec: (spec.nbytes, spec.name))
    return Flip(name=least.name, at=(0,) * len(least.shape), bit=0)


def told(reader: Reader, flip: Flip) -> str:
    """In words."""
    spec = reader.tensors[flip.name]
    width = 8 * itemsize(spec.dtype)
    return f"bit {flip.bit} (of {width}, {spec.dtype}) of {flip.name}{list(flip.at)} in {reader.path}, flipped in memory"
