"""The language of the tables: a layout is a key template and an axis pattern.

Every axis of the logical weight `W[l, e, k, g, n]` is stored either in a tensor's NAME or in its SHAPE. A `Template` says
which axes the name holds, a `Pattern` (einops notation) which axes the shape holds and in what order. Both only re-arrange,
so both can be read in either direction: a template parses and renders, a pattern splits and merges.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

Index = Mapping[str, int | str]
"""Where a name puts its tensor: `{"l": 3, "e": 17, "g": 0}`; a path slot holds text."""
Box = Mapping[str, range]
"""A block of a tensor: a range of step 1 for every axis of its pattern."""

_SLOT = re.compile(r"\{([a-z]+)(?::([^{}]+))?\}")
_INTEGER = r"(0|[1-9][0-9]{0,8})"
"""Nine digits at most: no checkpoint has more of anything, and int() refuses what is much longer."""
_PATH = r"(.+)"
_TOKEN = re.compile(r"\(\s*\w+(?:\s+\w+)*\s*\)|\.\.\.|\w+")
"""One stored dimension of a pattern: `(g n)`, `...` or `k`."""


@dataclass(frozen=True)
class Template:
    """A tensor name with slots: `{e}` an index, `{g:gate,up}` a choice (its place is the index), `{path}` any text.

    Names match in full and indices are digits without leading zeros, so that `parse` and `render` are exact inverses.

    Raises:
        ValueError: a slot is misspelt, used twice or not set off from the next, or a choice has too few words.
    """

    text: str
    literal: bool = False
    """Whether braces are only braces: a table is ours, but checkpoints choose their names themselves."""

    def __post_init__(self) -> None:
        if self.literal:
            return
        if len(set(self.slots)) != len(self.slots):
            raise ValueError(f"{self.text!r}: a slot is used twice")
        if any(len(set(words)) < max(2, len(words)) for words in self._choices.values()):
            raise ValueError(f"{self.text!r}: a choice needs two words or more, all different")
        if any(brace in literal for literal in self._literals for brace in "{}") or "" in self._literals[1:-1]:
            raise ValueError(f"{self.text!r}: slots are written {{e}} or {{g:gate,up}}, with text between any two")

    @cached_property
    def _parts(self) -> list[str]:
        """Literal, slot, choices, literal, slot, choices, ..., literal."""
        return [self.text] if self.literal else _SLOT.split(self.text)

    @cached_property
    def _literals(self) -> list[str]:
        return self._parts[::3]

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The axes stored in the name, in order of appearance."""
        return tuple(self._parts[1::3])

    @cached_property
    def _choices(self) -> dict[str, tuple[str, ...]]:
        pairs = zip(self.slots, self._parts[2::3], strict=True)
        return {slot: tuple(words.split(",")) for slot, words in pairs if words}

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        def slot(name: str) -> str:
            if words := self._choices.get(name):
                return "(" + "|".join(map(re.escape, words)) + ")"
            return _INTEGER if len(name) == 1 else _PATH

        pattern = re.escape(self._literals[0])
        for name, literal in zip(self.slots, self._literals[1:], strict=True):
            pattern += slot(name) + re.escape(literal)
        return re.compile(pattern, re.DOTALL)

    def parse(self, name: str) -> dict[str, int | str] | None:
        """The index that `name` stands for, or None when the name is not of this form."""
        match = self._regex.fullmatch(name)
        return match and {slot: self._value(slot, text) for slot, text in zip(self.slots, match.groups(), strict=True)}

    def _value(self, slot: str, text: str) -> int | str:
        if words := self._choices.get(slot):
            return words.index(text)
        return int(text) if len(slot) == 1 else text

    def render(self, index: Index) -> str:
        """The name at `index`; entries that are not slots of this template are ignored.

        Raises:
            KeyError: the index lacks a slot.
        """
        name = self._literals[0]
        for slot, literal in zip(self.slots, self._literals[1:], strict=True):
            words = self._choices.get(slot)
            name += (words[int(index[slot])] if words else str(index[slot])) + literal
        return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A block as it lies in a stored tensor: a slice per stored dimension, and the block inside what these slices give."""

    slices: tuple[slice, ...]
    shape: tuple[int, ...]
    inside: tuple[slice, ...]


@dataclass(frozen=True)
class Pattern:
    """An einops pattern for one side: `e k (g n)` is a tensor of rank 3 whose last dimension is `g` (outer) times `n`.

    `...` stands for any number of dimensions that only come along (MaxText's scan axes).

    Raises:
        ValueError: the text is not a pattern, or an axis is used twice.
    """

    text: str

    def __post_init__(self) -> None:
        if _TOKEN.sub("", self.text).strip():
            raise ValueError(f"{self.text!r} is not an axis pattern")
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"{self.text!r}: an axis is used twice")

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """One tuple of axes per stored dimension, outermost first."""
        return tuple(tuple(token.strip("()").split()) for token in _TOKEN.findall(self.text))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axes in storage order: the shape of the tensor once every composed dimension is split."""
        return tuple(axis for group in self.groups for axis in group)

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

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The stored shape for these axis sizes."""
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def split(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with every composed dimension split: one entry per axis."""
        return tuple(sizes[axis] for axis in self.axes)

    def sizes(self, shape: Sequence[int], known: Mapping[str, int]) -> dict[str, int]:
        """Axis sizes read off a stored shape; `known` gives all but one axis of each composed dimension.

        Raises:
            ValueError: rank or sizes do not fit the pattern.
        """
        if len(shape) != len(self.groups):
            raise ValueError(f"shape {tuple(shape)} is not of the form '{self.text}'")
        found = {axis: size for axis, size in known.items() if axis in self.axes}
        for group, size in zip(self.groups, shape, strict=True):
            free = [axis for axis in group if axis not in found]
            rest = math.prod(found[axis] for axis in group if axis in found)
            if len(free) > 1 or (free and not rest):
                raise ValueError(f"'{self.text}' leaves {free} open")
            if size % rest if free else size != rest:
                raise ValueError(f"shape {tuple(shape)} is not of the form '{self.text}' with {dict(found)}")
            found.update((axis, size // rest) for axis in free)
        return found

    def whole(self, sizes: Mapping[str, int]) -> dict[str, range]:
        """The box that is the whole tensor."""
        return {axis: range(sizes[axis]) for axis in self.axes}

    def window(self, sizes: Mapping[str, int], box: Box) -> Window:
        """Find `box` in the stored tensor: slices that cover it, as tightly as slices of stored dimensions can.

        Reading `array[w.slices].reshape(w.shape)[w.inside]` gives the box with one dimension per axis, without a copy when
        the array is in memory.
        """
        slices: list[slice] = []
        covers: list[tuple[range, range]] = []
        for group in self.groups:
            cover = _cover(group, sizes, box)
            start = 0
            for axis in group:
                start = start * sizes[axis] + cover[axis].start
            slices.append(slice(start, start + math.prod(map(len, cover.values()))))
            covers.extend((cover[axis], box[axis]) for axis in group)
        return Window(
            slices=tuple(slices),
            shape=tuple(len(cover) for cover, _ in covers),
            inside=tuple(slice(span.start - cover.start, span.stop - cover.start) for cover, span in covers),
        )

    def strips(self, sizes: Mapping[str, int], limit: int) -> Iterator[dict[str, range]]:
        """Cut the tensor into boxes that lie in one piece each, in storage order, of at most `limit` elements."""
        shape = self.split(sizes)
        if not shape:
            yield {}
            return
        depth = next((i for i in range(len(shape)) if math.prod(shape[i + 1 :]) <= limit), len(shape) - 1)
        step = max(1, limit // max(1, math.prod(shape[depth + 1 :])))
        inner = {axis: range(sizes[axis]) for axis in self.axes[depth + 1 :]}
        for outer in itertools.product(*map(range, shape[:depth])):
            fixed = {axis: range(i, i + 1) for axis, i in zip(self.axes, outer, strict=False)}
            for start in range(0, shape[depth], step):
                yield {**fixed, self.axes[depth]: range(start, min(start + step, shape[depth])), **inner}


def _cover(group: Sequence[str], sizes: Mapping[str, int], box: Box) -> dict[str, range]:
    """The smallest run of a composed dimension that holds the box: from the first real range inwards, all of it."""
    cover: dict[str, range] = {}
    inner = False
    for axis in group:
        cover[axis] = range(sizes[axis]) if inner else box[axis]
        inner = inner or len(box[axis]) > 1
    return cover
