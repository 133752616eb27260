"""LoRA of gate and up in a tree: A stacked along the rank, B block diagonal with zeros, and the way back. Pure.

In: A and B by name, the weights beside them, how columns lie. Out: targets. It never reads data, and computes no value.

The columns of the fused B lie as those of the fused weight do, padding and all. Its rank is that of gate and of up together, so
that alpha / rank stays what it was if alpha is doubled, too. Which half of the rank it is, is the axis `half`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from convert.errors import ConvertError, InputError, PlanError
from convert.planning.targets import HALF, LORA, Target, Way, verbatim
from layouts.adapters.trees import Axes, axes, found
from layouts.language.cuts import cut
from layouts.language.layout import Layouts, Placed
from layouts.language.parts import CHUNKS
from layouts.language.pattern import Pattern
from layouts.matching.candidates import named, record_of
from layouts.matching.describe import Description
from layouts.reader import Reader
from layouts.tables.maxtext import LORA_APART, LORA_FUSED
from layouts.tensors import TensorSpec

NOT_DIAGONAL = (
    "zeros where the ranks of gate meet the columns of up, or the other way round, as block-diagonal LoRA has it, and does "
    "not: it has been trained since, or never was block diagonal; keep it fused"
)
"""What a B should hold beside its blocks, in words."""
_SIDES = ("a", "b")
Sizes = Mapping[str, int]


class Columns(NamedTuple):
    """How columns of fused weights lie, such as `(g n)`: here, if somebody says so, and as they shall be; None for apart."""

    before: str | None
    after: str | None


def adapted(
    reader: Reader, described: Description, said: str | None, experts: Iterable[Target], wanted: Layouts | None
) -> tuple[list[Target], tuple[str, ...]]:
    """A and B of gate and up of a tree, beside experts or alone, and what the plan should say of them.

    Columns are as the record has them, or a layout that is `said`.
    """
    if not described.loras:
        return [], ()
    specs, record = {name: reader.tensors[name] for name in described.loras}, record_of(reader)
    before = (named(said, described.family),) if said and "layout" not in record else ()
    try:
        made = list(loras(specs, columns_of(specs, record, before, wanted), sizes_of(experts), stated_in(record)))
    except ConvertError as error:
        raise type(error)(f"{reader.path}: {error}") from None
    what, times = ("of wi is", "twice") if wanted else ("is again", "half")
    told = f"LoRA of gate and up: the rank {what} {times}; a tree does not hold alpha, which has to be {times}, too"
    return made, (told,) if any(each.way.diagonal for each in made) else ()


def columns_of(
    loras: Collection[str], record: Mapping[str, Any] | None, before: Sequence[Layouts], after: Layouts | None
) -> Columns:
    """The columns, by a record or the layouts that were named.

    Raises:
        PlanError: a layout has no place for LoRA.
    """
    if not loras:
        return Columns(None, None)
    here = record["wi"] if record and "wi" in record else None
    there = (here["key"], here["pattern"]) if here else (before[0]["wi"].key, before[0]["wi"].pattern) if before else None
    return Columns(there and _columns(*there), None if after is None else _columns(after["wi"].key, after["wi"].pattern))


def _columns(key: str, pattern: str) -> str | None:
    if "{g" in key:
        return None
    *_, last = Pattern(pattern).tokens
    if ".wi" not in key or not {"g", "n"} <= set(Pattern(last).axes):
        raise PlanError(
            f"gate and up have LoRA (wi_0_lora_a), and {key} '{pattern}' has no place for it; take a layout whose leaf is wi, "
            "such as concat or per-shard"
        )
    return last


def sizes_of(targets: Iterable[Target]) -> dict[str, dict[str, int]]:
    """Where gates and ups are -> their sizes: `e`, `k`, all of `n`, and those of their scan axes."""
    made = {}
    for each in targets:
        if each.role == "wi" and not each.part and "path" in each.index:
            held, sizes = each.source.pattern.axes, each.source_sizes
            n = math.prod(sizes[axis] for axis in CHUNKS if axis in held)
            kept = {axis: sizes[axis] for axis in held if axis not in ("g", *CHUNKS)}
            made[str(each.index["path"])] = {**kept, "n": n}
    return made


def stated_in(record: Mapping[str, Any] | None) -> dict[str, int]:
    """All of `n` that is no padding, as a record has it that was made where only A and B are.

    Raises:
        InputError: the record is damaged.
    """
    try:
        entry = (record or {}).get("stored", {}).get("wi.", {})
        real = entry.get("unpadded", {}).get("n", 0)
        return {"n": int(real) * Pattern(entry["pattern"]).fixed.get("s", 1)} if real else {}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"the record of the layout is damaged: its entry of wi is {str(record)[:80]}") from None


def loras(specs: Mapping[str, TensorSpec], columns: Columns, weights: Mapping[str, Sizes], said: Sizes) -> Iterator[Target]:
    """What becomes of A and B of gate and up. `weights` are the sizes of what stands beside, `said` has a padded `n`.

    Raises:
        PlanError: partners are missing, or nobody says where something is.
        InputError: shapes that do not fit one another, or the weights.
    """
    for key, before in ((LORA_APART, None), (LORA_FUSED, columns.before)):
        for path, names in found(specs, key).items():
            if key is LORA_FUSED and before is None:
                raise PlanError(f"{names[0]} is fused, and nothing says in which layout; name it with --source-layout")
            if before == columns.after:
                yield from (verbatim(specs[name]) for name in names)
                continue
            tensors = [specs[name] for name in names]
            at = _axes(tensors, weights.get(path, {}), fused=key is LORA_FUSED)
            n = _real(names[1], before, {**said, **weights.get(path, {})}, at.n) if before else at.n
            yield from _block(path, tensors, at, n, columns._replace(before=before))


def _axes(tensors: Sequence[TensorSpec], weights: Sizes, *, fused: bool) -> Axes:
    """Where A and B have which axis, both of gate and of up alike."""
    (a, b), (other, last) = tensors[:2], tensors[-2:]
    if (a.shape, b.shape) != (other.shape, last.shape):
        raise InputError(
            f"{a.name} and {b.name} have shapes {[a.shape, b.shape]}, and those of up {[other.shape, last.shape]}; "
            "they must be alike"
        )
    if (a.dtype, b.dtype) != (other.dtype, last.dtype):
        raise PlanError(
            f"{a.name} and {b.name} are {a.dtype}, {b.dtype}, those of up {other.dtype}, {last.dtype}; they must be alike"
        )
    layers = tuple(size for axis, size in sorted(weights.items()) if axis.startswith("l")) if weights else None
    known = {axis: size for axis, size in weights.items() if axis in ("e", "k") or (axis == "n" and not fused)}
    return axes((a.name, b.name), a.shape, b.shape, known, layers)


def _block(path: str, tensors: Sequence[TensorSpec], at: Axes, n: int, columns: Columns) -> Iterator[Target]:
    """A and B of one block, from one side to the other."""
    a, b = tensors[:2]
    if columns.before and columns.after:
        yield verbatim(a)
    if not columns.after and at.rank % 2:
        raise InputError(f"{a.name} has rank {at.rank}, which is odd: it is not that of gate and up together; keep it fused")
    for number, spec in enumerate((a, b)):
        if number == 0 and columns.before and columns.after:
            continue
        pattern = (at.a, at.b)[number]
        kept = dict(zip(pattern.axes, spec.shape, strict=True))
        one, other = (_side(pattern.text, number, columns, cols, n, kept, at.rank) for cols in columns)
        (source, sizes), (target, wanted) = one, other
        if columns.before and source.pattern.shape(sizes) != spec.shape:
            raise InputError(
                f"{spec.name} of shape {spec.shape} has not the columns of '{source.pattern.text}' for {n} of gate and of up"
            )
        way = Way(role=LORA, part=_SIDES[number], sizes=wanted, source_sizes=sizes, source=source, target=target)
        places: list[dict[str, int | str]] = [{"path": path, "g": g} for g in range(2)]
        for index in [{"path": path}] if columns.after else places:
            made = replace(spec, name=target.key.render(index), shape=target.pattern.shape(wanted))
            yield Target(spec=made, index=index, way=way)


def _side(
    text: str, number: int, columns: Columns, cols: str | None, n: int, kept: Sizes, rank: int
) -> tuple[Placed, dict[str, int]]:
    """A, or B, apart or fused with such columns, and its sizes."""
    diagonal, half = None in columns, rank // 2 if columns.before else rank
    key = (LORA_FUSED if cols else LORA_APART).bind("s", number)
    sizes = {**kept, "g": 2, "r": half if diagonal else rank}
    if cols is None:
        return Placed(key, Pattern(text)), {**sizes, **({"n": n} if number else {})}
    if number == 0:
        return Placed(key, Pattern(f"{text.removesuffix('r')}(g r)")), sizes
    try:
        sizes = {**sizes, **cut({"n": n}, Pattern(cols))}
    except ValueError as error:
        raise PlanError(f"gate and up have LoRA, whose columns do not fit into '{cols}': {error}") from None
    words = [f"({HALF} r)" if word == "r" and diagonal else word for word in text.split()]
    return Placed(key, Pattern(" ".join([*words[:-1], cols]))), {**sizes, **({HALF: 2} if diagonal else {})}


def _real(name: str, columns: str, sizes: Sizes, stored: int) -> int:
    """How many columns of one projection are no padding."""
    if "n" in sizes:
        return sizes["n"]
    if Pattern(columns).padding:
        raise PlanError(f"{name}: nothing says how many of its {stored} columns are no padding")
    return stored // 2
