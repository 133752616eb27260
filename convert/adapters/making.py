"""Make the tensors of one block: read, unpack, follow the recipes, pack.

In: a reader, a block, recipes. Out: arrays of bits by name. It never writes, and computes nothing but an exact power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.adapters.recipes import Recipe, Seen
from convert.errors import PlanError
from layouts.adapters.forms import DOWN, GATE_UP, SIDES, Form
from layouts.adapters.neutral import Bits, Pair, joined, padded, parted, repacked
from layouts.adapters.units import Block, read_pair
from layouts.reader import Reader
from layouts.tensors import TensorSpec, numpy_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """One block of the output: `path` is its own, and its recipes."""

    block: Block
    path: str
    recipes: tuple[Recipe, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """From one form to another; `turns` says for either whether gate and up take turns in fused rows."""

    source: Form
    target: Form
    turns: bool


def look_at(reader: Reader, block: Block, way: Way, hint: Mapping[str, Any]) -> Seen:
    """Look at the bits that decide how gate and up become one, or two: reads A, or B, of one block.

    A `hint` is what our own record says of how they became one.
    """
    units = block.units
    if way.target.fused and {"gate", "up"} <= units.keys() and units["gate"].rank == units["up"].rank:
        one, other = (read_pair(reader, way.source, units[name]).a for name in ("gate", "up"))
        alike = [scale.rank for scale in units["gate"].scales] == [scale.rank for scale in units["up"].scales]
        return Seen(shared=alike and np.array_equal(one, other))
    if way.target.fused or GATE_UP not in units or hint.get("how") in ("shared A", "one alone"):
        return Seen()
    pair, rank = read_pair(reader, way.source, units[GATE_UP]), units[GATE_UP].rank
    if not pair.b.any() and hint.get("how") != "block diagonal":
        return Seen()  # not trained: every half would be as good as any other
    gate, up = parted(pair.b, interleaved=way.turns)
    stated = hint.get("rank")
    halves = [stated] if type(stated) is int and 0 < stated <= rank // 2 else [rank // 2] if rank % 2 == 0 else []
    for half in halves:
        blocks = (gate[:, :, half:], up[:, :, :half], up[:, :, 2 * half :], pair.a[:, 2 * half :])
        if not any(each.any() for each in blocks):
            return Seen(half=half)
    return Seen()


def specs(making: Making, form: Form) -> Iterator[TensorSpec]:
    """The tensors of one block of the output, by its recipes alone."""
    for recipe, name, side, e in _each(making, form):
        real, pattern = form.pattern(side)
        rank = recipe.scales[e or 0].rank
        sizes = {"e": len(recipe.scales), "r": rank, "i": recipe.i, "o": recipe.o}
        yield TensorSpec(name=name, dtype=recipe.dtypes[real], shape=pattern.shape(sizes))


def _each(making: Making, form: Form) -> Iterator[tuple[Recipe, str, str, int | None]]:
    """Each tensor: its recipe, name, the side that the file calls it, and the expert, if it is of one."""
    outer = next((recipe.unit for recipe in making.recipes if recipe.unit == DOWN), GATE_UP)
    for recipe in making.recipes:
        word = int(recipe.unit == outer) if form.wrapped else form.units.index(recipe.unit)
        for number, side in enumerate(SIDES):
            for e in range(len(recipe.scales)) if form.per_expert else [None]:
                at: dict[str, int | str] = {"path": making.path, "p": word, "s": number, "e": e or 0}
                yield recipe, form.template.render(at), side, e


def make(reader: Reader, making: Making, way: Way) -> dict[str, Bits]:
    """All tensors of one block of the output.

    Raises:
        PlanError: a power of two would lose bits.
        InputError: data of the input cannot be read.
    """
    pairs = {name: read_pair(reader, way.source, unit) for name, unit in making.block.units.items()}
    made = {recipe.unit: _followed(recipe, pairs, way, making.path) for recipe in making.recipes}
    found: dict[str, Bits] = {}
    for recipe, name, side, e in _each(making, way.target):
        real, pattern = way.target.pattern(side)
        array = made[recipe.unit].a if real == "A" else made[recipe.unit].b
        if e is not None:
            rank = recipe.scales[e].rank
            array = array[e][:rank] if real == "A" else array[e][:, :rank]
        found[name] = repacked(array, real, pattern)
    return found


def _followed(recipe: Recipe, pairs: Mapping[str, Pair], way: Way, where: str) -> Pair:
    sources = [_shifted(pairs[name], recipe, name, where) for name in recipe.sources]
    first = sources[0]
    a, b = first.a, first.b
    if recipe.how == "shared A":
        b = joined(first.b, sources[1].b, interleaved=way.turns)
    elif recipe.how == "block diagonal":
        one, other = first.a.shape[1], sources[1].a.shape[1]
        a = np.concatenate((first.a, sources[1].a), axis=1)
        right = np.pad(sources[1].b, ((0, 0), (0, 0), (one, 0)))
        b = joined(padded(first.b, 2, one + other), right, interleaved=way.turns)
    elif recipe.how == "one alone":
        none = np.zeros_like(first.b)
        both = (first.b, none) if recipe.sources == ("gate",) else (none, first.b)
        b = joined(*both, interleaved=way.turns)
    elif recipe.how in ("halves", "rows"):
        number = ("gate", "up").index(recipe.unit)
        b = parted(b, interleaved=way.turns)[number]
        if recipe.how == "halves":
            span = slice(number * recipe.rank, (number + 1) * recipe.rank)
            a, b = a[:, span], b[:, :, span]
    return Pair(a=padded(a, 1, recipe.rank), b=padded(b, 2, recipe.rank))


def _shifted(pair: Pair, recipe: Recipe, name: str, where: str) -> Pair:
    """B times a power of two for each expert, if that keeps every bit."""
    powers = recipe.shifts[name]
    if not any(powers):
        return pair
    b, kind = pair.b.copy(), numpy_dtype(recipe.dtypes["B"])
    for e, power in enumerate(powers):
        if power:
            b[e] = _times(b[e], kind, power, f"{where}.experts: {name} of expert {e}")
    return Pair(a=pair.a, b=b)


def _times(bits: Bits, kind: np.dtype[Any], power: int, where: str) -> Bits:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact = np.ldexp(bits.view(kind).astype(np.float64), power)
        found: Bits = exact.astype(kind)
        if not np.array_equal(found.astype(np.float64), exact) or not np.isfinite(exact).all():
            raise PlanError(f"{where}: B times 2**{power}, which makes two scales one, would round; keep them apart")
    return found.view(bits.dtype)
