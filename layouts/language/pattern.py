"""The axes that a tensor keeps in its shape: einops notation, and three words more.

In: a pattern's text, sizes, a block. Out: shapes and slices. It never holds data.

    e k (g n)          rank 3; the last dimension is `g` (outer) times `n`
    e ... k n          `...` stands for dimensions that only come along (MaxText's scan axes)
    e k (s=8 g n%128)  `s=8` is a fixed size; `n%128` is stored with zeros behind it, up to a multiple of 128
    e k (c g n=64%128) `n` is padded to a multiple of 128, then cut into chunks of 64
    e (-g n) k         `-g` is stored in reverse: up first

Every axis of the logical weight `W[l, e, k, g, n]` is stored either in a tensor's name or in its shape. Where `n` is cut into
tensor-parallel shards (`s`) and chunks (`c`), the logical `n` is `s`, `c`, `n` in this order, whatever their order in
memory. Of what is padded before it is cut into chunks, the logical `c` is 1, and `n` is what a shard has: no whole chunks.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from layouts.language.padding import padded

Box = Mapping[str, range]
"""A block of a tensor: a range of step 1 for every axis of its pattern."""

_WORD = re.compile(r"(?P<minus>-)?(?P<axis>[a-z]\w*)(?:=(?P<size>[1-9]\d*))?(?:%(?P<multiple>[1-9]\d*|maxtext))?")
_TOKEN = re.compile(rf"\(\s*(?:{re.sub('[?]P<[a-z]+>', '?:', _WORD.pattern)}\s*)+\)|\.\.\.|[^\s()]+")
"""One stored dimension of a pattern: `(g n)`, `...` or `k`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A block as it lies in a stored tensor: a slice per stored dimension, and the block inside what these slices give."""

    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    inside: tuple[slice, ...]


@dataclass(frozen=True)
class Pattern:
    """An axis pattern. Sizes are logical: what an axis has without its padding.

    Raises:
        ValueError: the text is not a pattern, or an axis is used twice.
    """

    text: str

    def __post_init__(self) -> None:
        rest = _TOKEN.sub("", self.text).strip()
        if rest or any(axis != "..." and not _WORD.fullmatch(word) for axis, word in self._words):
            raise ValueError(f"{self.text!r} is not an axis pattern")
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"{self.text!r}: an axis is used twice")
        both, words = self._given.keys() & self.padding, [word for _, word in self._words]
        if both and not (both == {"n"} and "c" in words[: self.axes.index("n")]):
            raise ValueError(f"{self.text!r}: only n can be padded and cut, into the chunks c before it")

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """The text of each stored dimension, outermost first."""
        return tuple(_TOKEN.findall(self.text))

    @cached_property
    def _words(self) -> list[tuple[str, str]]:
        """Axis and word, in storage order."""
        words = " ".join(token.strip("()") for token in self.tokens).split()
        return [(match["axis"] if (match := _WORD.match(word)) else word, word) for word in words]

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """One tuple of axes per stored dimension, outermost first."""
        axes = iter(self.axes)
        return tuple(tuple(itertools.islice(axes, len(token.strip("()").split()))) for token in self.tokens)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes in storage order: the shape of the tensor once every composed dimension is split."""
        return tuple(axis for axis, _ in self._words)

    @cached_property
    def fixed(self) -> Mapping[str, int]:
        """Axes whose size the pattern gives."""
        return {a: size for a, size in self._given.items() if a not in self.padding}

    @cached_property
    def width(self) -> int:
        """The columns of a chunk, if `n` is padded before it is cut into chunks; else 0."""
        return self._given["n"] if "n" in self._given.keys() & self.padding.keys() else 0

    @cached_property
    def _given(self) -> Mapping[str, int]:
        return {a: int(m["size"]) for a, word in self._words if (m := _WORD.match(word)) and m["size"]}

    @cached_property
    def reversed(self) -> frozenset[str]:
        """Axes that are stored last to first."""
        return frozenset(axis for axis, word in self._words if word.startswith("-"))

    @cached_property
    def padding(self) -> Mapping[str, str]:
        """Axes that are stored with zeros behind them, and to what."""
        return {a: m["multiple"] for a, word in self._words if (m := _WORD.match(word)) and m["multiple"]}

    def expand(self, rank: int) -> Pattern:
        """Replace `...` by as many axes as a tensor of this rank needs.

        Raises:
            ValueError: the rank does not fit.
        """
        if "..." not in self.axes:
            return self
        extra = rank - len(self.groups) + 1
        if extra < 0:
            raise ValueError(f"a tensor of rank {rank} is not of the form '{self.text}'")
        text = self.text.replace("...", " ".join(f"l{i}" for i in range(extra)))
        return Pattern(" ".join(text.split()))

    def stored(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The size of each axis in memory: with its padding.

        Raises:
            ValueError: padding does not come out even for this number of shards, or for chunks of this size.
        """
        stored = {axis: padded(self.padding.get(axis), sizes[axis], sizes.get("s", 1)) for axis in self.axes}
        if self.width and stored["n"] % self.width:
            raise ValueError(f"n is padded to {stored['n']}; take --align={self.width} or a multiple of it")
        return stored | ({"c": stored["n"] // self.width, "n": self.width} if self.width else {})

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape for these axis sizes."""
        stored = self.stored(sizes)
        return tuple(math.prod(stored[axis] for axis in group) for group in self.groups)

    def split(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape with every composed dimension split: one entry per axis."""
        return tuple(self.stored(sizes).values())

    def sizes(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """Axis sizes read off a stored shape; `known` has all padded axes, and all but one of each composed dimension.

        Raises:
            ValueError: rank or sizes do not fit the pattern.
        """
        if len(shape) != len(self.groups):
            raise ValueError(f"shape {tuple(shape)} is not of the form '{self.text}'")
        told = {**known, **self.fixed, **({"c": 1} if self.width else {})}
        found = {axis: size for axis, size in told.items() if axis in self.axes}
        if unknown := self.padding.keys() - found.keys():
            raise ValueError(f"'{self.text}' is padded, and nothing says how many {', '.join(sorted(unknown))} are real")
        for group, size in zip(self.groups, shape, strict=True):
            free = [axis for axis in group if axis not in found]
            held = (padded(self.padding.get(axis), found[axis], found.get("s", 1)) for axis in group if axis in found)
            rest = math.prod(held)
            if len(free) > 1 or (free and not rest):
                raise ValueError(f"'{self.text}' leaves {free} open")
            if size % rest if free else size != rest:
                raise ValueError(f"shape {tuple(shape)} is not of the form '{self.text}' with {dict(found)}")
            found.update((axis, size // rest) for axis in free)
        self.stored(found)
        return found

    def whole(self, sizes: Mapping[str, int]) -> dict[str, range]:
        """The box that is the whole tensor, padding and all."""
        return {axis: range(size) for axis, size in self.stored(sizes).items()}

    def window(self, sizes: Mapping[str, int], box: Box) -> Window:
        """Find `box` in the stored tensor: slices that cover it, as tightly as slices of stored dimensions can.

        Reading `array[w.slices].reshape(w.shape)[w.inside]` gives the box with one dimension per axis, without a copy when
        the array is in memory.
        """
        stored = self.stored(sizes)
        slices: list[slice] = []
        covers: list[tuple[range, range]] = []
        for group in self.groups:
            cover = _cover(group, stored, box)
            start = 0
            for axis in group:
                start = start * stored[axis] + cover[axis].start
            slices.append(slice(start, start + math.prod(map(len, cover.values()))))
            covers.extend((cover[axis], box[axis]) for axis in group)
        return Window(
            slices=tuple(slices),
            shape=tuple(len(cover) for cover, _ in covers),
            inside=tuple(slice(span.start - cover.start, span.stop - cover.start) for cover, span in covers),
        )

    def strips(self, sizes: Mapping[str, int], limit: int, rows: range | None = None) -> Iterator[dict[str, range]]:
        """Cut the tensor into boxes that lie in one piece each, in storage order, of at most `limit` elements.

        With `rows`, only this part of the first axis.
        """
        shape = self.split(sizes)
        if not shape:
            yield {}
            return
        spans = [range(shape[0]) if rows is None else rows, *map(range, shape[1:])]
        depth = next((i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= limit), len(shape) - 1)
        step = max(1, limit // max(1, math.prod(shape[depth + 1 :])))
        inner = dict(zip(self.axes[depth + 1 :], spans[depth + 1 :], strict=True))
        for outer in itertools.product(*spans[:depth]):
            fixed = {axis: range(i, i + 1) for axis, i in zip(self.axes, outer, strict=False)}
            for start in range(spans[depth].start, spans[depth].stop, step):
                yield {**fixed, self.axes[depth]: range(start, min(start + step, spans[depth].stop)), **inner}


def strips(shape: Sequence[int], limit: int, rows: range | None = None) -> Iterator[tuple[slice, ...]]:
    """A tensor that is read as it is, in storage order, in parts of at most `limit` elements; of `rows` only, if given."""
    if rows is None and 0 < math.prod(shape) <= limit:
        yield tuple(slice(0, size) for size in shape)
        return
    pattern = identity(len(shape))
    for box in pattern.strips(dict(zip(pattern.axes, shape, strict=True)), limit, rows):
        yield tuple(slice(span.start, span.stop) for span in box.values())


@cache
def identity(rank: int) -> Pattern:
    """The pattern of a tensor that is copied as it is: one axis per dimension."""
    return Pattern(" ".join(f"d{i}" for i in range(rank)))


def _cover(group: Sequence[str], sizes: Mapping[str, int], box: Box) -> dict[str, range]:
    """The smallest run of a composed dimension that holds the box: from the first real range inwards, all of it."""
    cover: dict[str, range] = {}
    inner = False
    for axis in group:
        cover[axis] = range(sizes[axis]) if inner else box[axis]
        inner = inner or len(box[axis]) > 1
    return cover
