"""In which order tensors are made from Orbax arrays, and which parts of these stay decoded meanwhile. Pure.

In: targets, and how their sources are chunked. Out: an order, and windows. It never reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from convert.planning.targets import Piece, Target
from layouts.language.pattern import Box
from layouts.reader import Reader
from layouts.tensors import itemsize
from layouts.windows import Slices, Windows, lengths, window_shape


def plan_windows(targets: Iterable[Target], reader: Reader, strip: int, limit: int) -> Windows:
    """The windows, of `limit` bytes together, for targets that are made one after another in strips of `strip` bytes.

    There is room for two of each array that a target is made from, because some workers are still at the last one.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        width = itemsize(target.spec.dtype)
        units = _blocks(target, target.target.pattern.whole(target.sizes))
        reads = _blocks(target, next(iter(target.target.pattern.strips(target.sizes, max(1, strip // width)))))
        for name, unit in units.items():
            read = reads.get(name, unit)
            shape, cost, room = reader.tensors[name].shape, reader.unit(name), limit // width // (2 * len(units))
            if cost and (found := window_shape(shape, cost.shape, lengths(unit), lengths(read), room)):
                shapes[name] = found
    return Windows(shapes=shapes, limit=limit if shapes else 0)


def one_for_each_source(targets: Iterable[Target]) -> list[Target]:
    """A target for each array that is the first source of some: the others are made from it in the same way."""
    found: dict[str, Target] = {}
    for target in (target for target in targets if target.spec.nbytes):
        found.setdefault(_first_piece(target).source, target)
    return list(found.values())


def in_order(targets: Sequence[Target], reader: Reader) -> list[Target]:
    """Targets in the order of the windows that they are made from; those that need none are first, as they stand."""
    if not reader.windows.shapes:
        return list(targets)
    windows, order = reader.windows, {name: number for number, name in enumerate(reader.tensors)}

    def place(target: Target) -> tuple[int, tuple[int, ...]]:
        if not target.spec.nbytes:
            return -1, ()
        piece = _first_piece(target)
        slices = _slices(target, piece)
        number = windows.number(piece.source, slices)
        return (order[piece.source], number) if number else (-1, ())

    return sorted(targets, key=place)


def _first_piece(target: Target) -> Piece:
    return next(target.pieces(target.target.pattern.whole(target.sizes)))


def _slices(target: Target, piece: Piece) -> Slices:
    pattern, sizes = target.way.stored[piece.number]
    return pattern.window(sizes, piece.source_box).slices


def _blocks(target: Target, box: Box) -> dict[str, Slices]:
    """The blocks of the sources that a box of the target is made from."""
    found: dict[str, Slices] = {}
    for piece in target.pieces(box):
        slices = _slices(target, piece)
        have = found.get(piece.source, slices)
        found[piece.source] = tuple(
            slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(have, slices, strict=True)
        )
    return found
