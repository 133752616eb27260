"""LoRA of gate and up, in trees in memory: A stacked along the rank, B block diagonal with zeros, and the way back.

In: leaves that are A and B, the pattern of the fused weight beside them. Out: moves. It never computes a value.

The columns of the fused B lie as those of the fused weight do, padding and all. Its rank is that of gate and of up together, so
that alpha / rank stays what it was if alpha is doubled, too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from convert.errors import InputError, PlanError, UsageError
from convert.memory.relay import Relay, Side
from layouts.adapters.trees import APART, FUSED, Axes, axes, found
from layouts.language.layout import Layouts
from layouts.language.parts import CHUNKS
from layouts.language.pattern import Pattern
from layouts.language.template import Template
from layouts.tensors import TensorSpec

_WEIGHTS = (Template("{path}.wi_{g:0,1}"), Template("{path}.wi"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One move: the names of leaves, the names of what they become, and how; by no relay if they only keep places."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    relay: Relay | None


class Columns(NamedTuple):
    """How columns of fused weights lie, such as `(g n)`: here, if somebody says so, and as they shall be; None for apart."""

    before: str | None
    after: str | None


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


def adapters(
    specs: Mapping[str, TensorSpec], columns: Columns, weights: Iterable[Planned], said: Mapping[str, int]
) -> Iterator[Planned]:
    """What becomes of A and B of gate and up. `weights` are the moves of what stands beside, `said` has a padded `n`.

    Raises:
        PlanError: partners are missing, or nobody says where something is.
        InputError: shapes that do not fit one another, or the weights.
    """
    sizes = dict(filter(None, map(_sizes, weights)))
    for key, before in ((APART, None), (FUSED, columns.before)):
        for path, names in found(specs, key).items():
            if key is FUSED and before is None:
                raise PlanError(f"{names[0]} is fused, and nothing says in which layout; name it with --source-layout")
            if before != columns.after:
                yield from _block(path, names, specs, columns._replace(before=before), sizes.get(path, {}), said)


def _sizes(weight: Planned) -> tuple[str, dict[str, int]] | None:
    """Where a gate or a fused weight is, and its sizes: `e`, `k`, `n`, and those of its scan axes."""
    relay, names = weight.relay, (*weight.sources, *weight.targets)
    place = next((at for name in names for key in _WEIGHTS if (at := key.parse(name))), None)
    if place is None or relay is None:
        return None
    axes_in = relay.source.pattern.axes
    sizes = dict(relay.source.sizes)
    n = math.prod(sizes[axis] for axis in CHUNKS if axis in axes_in)
    return str(place["path"]), {**{axis: sizes[axis] for axis in axes_in if axis not in ("g", *CHUNKS)}, "n": n}


def _block(
    path: str,
    names: Sequence[str],
    specs: Mapping[str, TensorSpec],
    columns: Columns,
    weights: Mapping[str, int],
    said: Mapping[str, int],
) -> Iterator[Planned]:
    shapes, fused = [specs[name].shape for name in names], columns.before is not None
    if shapes[:2] != shapes[-2:]:
        raise InputError(
            f"{names[0]} and {names[1]} have shapes {shapes[:2]}, and those of up {shapes[2:]}; they must be alike"
        )
    layers = tuple(size for axis, size in sorted(weights.items()) if axis.startswith("l")) if weights else None
    known = {axis: size for axis, size in weights.items() if axis in ("e", "k") or (axis == "n" and not fused)}
    at = axes((names[0], names[1]), shapes[0], shapes[1], known, layers)
    n = _real(names[1], columns.before, {**said, **weights}, at.n) if columns.before else at.n
    one, other = (_sides(at, shapes, text, n, fused=fused) for text in columns)
    index: list[dict[str, int | str]] = [{"path": path, "g": g, "s": s} for g in range(2) for s in range(2)]
    key = FUSED if columns.after else APART
    new = list(dict.fromkeys(map(key.render, index)))
    if not columns.after and at.rank % 2:
        raise InputError(f"{names[0]} has rank {at.rank}, which is odd: it is not that of gate and up together; keep it fused")
    if one[1].pattern.shape(dict(one[1].sizes)) != shapes[1]:
        raise InputError(
            f"{names[1]} of shape {shapes[1]} has not the columns of '{one[1].pattern.text}' for {n} of gate and of up"
        )
    if fused and columns.after:
        yield Planned(sources=(names[1],), targets=(new[1],), relay=Relay(source=one[1], target=other[1]))
    else:
        yield Planned(sources=tuple(names[0::2]), targets=tuple(new[0::2]), relay=Relay(source=one[0], target=other[0]))
        yield Planned(
            sources=tuple(names[1::2]), targets=tuple(new[1::2]), relay=Relay(source=one[1], target=other[1], diagonal=True)
        )


def _real(name: str, columns: str, sizes: Mapping[str, int], stored: int) -> int:
    """How many columns of one projection are no padding."""
    if "n" in sizes:
        return sizes["n"]
    if Pattern(columns).padding:
        raise PlanError(f"{name}: nothing says how many of its {stored} columns are no padding")
    return stored // 2


def _sides(at: Axes, shapes: Sequence[tuple[int, ...]], cols: str | None, n: int, *, fused: bool) -> tuple[Side, Side]:
    """A and B on one side of the move: apart, or fused with such columns."""
    both = at.rank if fused else 2 * at.rank
    rank = both // 2
    a, b = at.a.text, at.b.text
    sizes = [dict(zip(pattern.axes, shape, strict=True)) for pattern, shape in zip((at.a, at.b), shapes, strict=False)]
    if cols is None:
        made = [{**sizes[0], "p": 2, "r": rank}, {**sizes[1], "g": 2, "r": rank, "n": n}]
        return _side("p", a, made[0]), _side("g", b, made[1])
    cut = _cut(Pattern(cols), n)
    made = [{**sizes[0], "p": 2, "r": rank}, {**sizes[1], "g": 2, "r": both, **cut}]
    return _side("", f"{a.removesuffix('r')}(p r)", made[0]), _side("", f"{b.removesuffix('n')}{cols}", made[1])


def _side(named: str, text: str, sizes: Mapping[str, int]) -> Side:
    pattern = Pattern(text)
    return Side(named=tuple(named), pattern=pattern, sizes=tuple((axis, sizes[axis]) for axis in (*named, *pattern.axes)))


def _cut(cols: Pattern, n: int) -> dict[str, int]:
    """The sizes of the axes into which columns are cut."""
    found = {axis: size for axis, size in cols.fixed.items() if axis in CHUNKS}
    free = next(axis for axis in ("c", "n") if axis in cols.axes)
    rest = math.prod(found.values())
    if n % rest:
        raise UsageError(f"{n} columns cannot be cut as '{cols.text}' says")
    return {**found, free: n // rest}
