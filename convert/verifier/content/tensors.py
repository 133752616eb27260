"""The logical tensors of a checkpoint by its own description: experts slice by slice, all others as they are.

In: MoE layers, names. Out: units of reading. It never hashes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import Block, Kind, located, name_at, part
from convert.verifier.bits.order import STRIP
from convert.verifier.bits.together import consecutive, has_own, stack
from convert.verifier.content.hashing import Logical, Unit, rows_of
from layouts.errors import InputError
from layouts.language.pattern import strips
from layouts.reader import Reader, is_chunked
from layouts.tensors import itemsize
from layouts.windows import lengths

WORDS: Mapping[str, tuple[str, ...]] = {"wi": ("gate", "up"), "wo": ("down",)}
"""Role -> its projections, as they are called in the list."""

TOGETHER = 1 << 20
"""Bytes of small experts that are read at a time: a call for each of 100,000 tensors takes longer than to hash them."""


def place_in(block: Block) -> list[Any]:
    """Where a MoE layer is, whatever its layout: a path, its number, its kind if it has several, its place in a stack."""
    index = next(iter(block.groups.values())).index
    return [index.get("path", ""), index.get("l"), *([index["kind"]] if "kind" in index else []), *block.scan.values()]


def expert_units(place: list[Any], block: Block) -> Iterator[Unit]:
    """Every expert of a MoE layer that is called `place`, one stored tensor at a time."""
    for kind, group in sorted(block.groups.items()):
        halves = (0, 1) if "g" in group.placed.key.slots else (None,)
        first = located(block, kind, {"e": 0, "g": 0}, range(1))
        each = math.prod(first.lengths) * itemsize(group.dtype)
        together = has_own(block, kind) and not is_chunked(block.reader)
        for run in consecutive(range(group.sizes.get("e", block.experts)), max(1, TOGETHER // max(1, each)) if together else 1):
            for g in halves:
                found = located(block, kind, {"e": run.start, "g": g or 0}, run)
                apart = [name_at(block, kind, {"e": e, "g": g or 0}) for e in run[1:]] if "e" in group.placed.key.slots else []
                read = partial(_experts, place, block, kind, run, g)
                nbytes = each * len(run)
                yield Unit(array=found.name, slices=found.slices, nbytes=nbytes, read=read, others=tuple(apart))


def _experts(place: list[Any], block: Block, kind: Kind, run: range, g: int | None) -> Iterator[Logical]:
    """What one stored tensor has of each of these experts, or one for each: gate, up, both, or down."""
    arrays: Iterable[NDArray[Any]] = ()
    with suppress(ValueError):  # something in the padding: which of them has it, `_expert` says
        arrays = stack(block, kind, run, g or 0, np.empty) if len(run) > 1 else ()
    for e, array in itertools.zip_longest(run, arrays):
        yield from _expert(place, block, kind, e, g) if array is None else _logical(place, block, kind, e, g, array)


def _expert(place: list[Any], block: Block, kind: Kind, e: int, g: int | None) -> Iterator[Logical]:
    """The same of one."""
    try:
        array = part(block, kind, e, g or 0)
    except ValueError as error:
        what = f"{' and '.join(WORDS[kind[0]])} {kind[1]}".strip()
        raise InputError(f"{block.reader.path}: {block.label}, expert {e}, {what}: {error}; it is damaged") from None
    yield from _logical(place, block, kind, e, g, array)


def _logical(place: list[Any], block: Block, kind: Kind, e: int, g: int | None, array: NDArray[Any]) -> Iterator[Logical]:
    (role, name), group = kind, block.groups[kind]
    words = WORDS[role] if g is None else WORDS[role][g : g + 1]
    if role == "wi" and "g" not in group.sizes:
        words, array = (" and ".join(words),), array[np.newaxis]
    elif role == "wo" or g is not None:
        array = array[np.newaxis]
    for word, each in zip(words, array, strict=True):
        turned = each.swapaxes(0, 1) if {"out", "in"} <= set(group.dims.split()) else each
        yield Logical(name=[place, e, word, name], dtype=group.dtype, shape=turned.shape, pieces=rows_of(turned))


def other_units(reader: Reader, names: Iterable[str]) -> Iterator[Unit]:
    """Tensors under their own names, in strips."""
    for name in names:
        spec = reader.tensors[name]
        first = next(strips(spec.shape, STRIP), ()) if spec.nbytes else ()
        nbytes = math.prod(lengths(first)) * itemsize(spec.dtype)
        yield Unit(array=name, slices=first, nbytes=nbytes, read=partial(_other, reader, name))


def _other(reader: Reader, name: str) -> Iterator[Logical]:
    spec = reader.tensors[name]
    yield Logical(name=name, dtype=spec.dtype, shape=spec.shape, pieces=_strips(reader, name, spec.shape))


def _strips(reader: Reader, name: str, shape: tuple[int, ...]) -> Iterator[NDArray[Any]]:
    for slices in strips(shape, STRIP):
        yield from rows_of(reader.read(name, slices))
