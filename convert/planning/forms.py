"""What the tensors of an output are counted by: those that differ in numbers of their names alone are of one form. Pure.

In: targets. Out: the same, with their forms. There may be 100,000 tensors of a few hundred forms, so that who adds up or
describes goes through forms. It never compares ways: targets of one have the same object.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

from convert.planning.targets import Target, Way


class Form(NamedTuple):
    """The first of `number` targets whose way, element type, shape, and words in their names are the same.

    Of tensors that are copied as they are, each has a way of its own: those of one element type and shape are of one form.
    """

    first: Target
    number: int


class Targets(tuple[Target, ...]):
    """The tensors of an output in order. What has been counted of them stays with them, whichever plan they are in."""

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """In the order of the first ones."""
        words: dict[int, tuple[str, ...]] = {}
        counted: dict[tuple[object, ...], tuple[Target, list[int]]] = {}
        for target in self:
            way, spec = target.way, target.spec
            if way.role == "verbatim":
                form: tuple[object, ...] = (spec.dtype, spec.shape)
            else:
                if (slots := words.get(id(way))) is None:
                    slots = words[id(way)] = words_of(way)
                form = (id(way), spec.dtype, spec.shape, *map(target.index.get, slots))
            if (known := counted.get(form)) is None:
                known = counted[form] = target, [0]
            known[1][0] += 1
        return tuple(Form(first, number) for first, (number,) in counted.values())


def words_of(way: Way) -> tuple[str, ...]:
    """What of its names is no number: a path, modules, the kind of an expert."""
    return tuple(slot for slot in (*way.source.key.slots, *way.target.key.slots) if len(slot) > 1)
