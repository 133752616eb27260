"""All hostile checkpoints: a table of what is done to sound ones, cut into batches for the tests."""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from tests.hostile import configs, databases, headers, manifests, names, places, records, specials, stages, stores
from tests.hostile.variants import Table, Variant

MODULES = (records, names, headers, configs, specials, stores, databases, manifests, stages, places)
AT_ONCE = 60
"""Cases of a batch, at most."""
MOST = 36
"""Variants of a kind that the default suite tries, besides those that it always does."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some cases of one kind."""

    name: str
    cases: Sequence[tuple[Variant, str]]


@cache
def tables() -> list[Table]:
    """All kinds with their variants."""
    return [table for module in MODULES for table in module.variants()]


def variants() -> list[Variant]:
    """All variants; no two have the same name."""
    found = [variant for table in tables() for variant in table.found]
    assert len({variant.name for variant in found}) == len(found)
    return found


def batches(*, slow: bool) -> list[Batch]:
    """The cases of the default suite, or the others."""
    return [batch for table in tables() for batch in _cut(table, slow)]


def _cut(table: Table, slow: bool) -> Iterator[Batch]:
    usual = set(_usual(table))
    every = [(variant, command) for variant in table.found for command in variant.commands]
    cases = [(variant, command) for variant, command in every if slow != ((variant.name, command) in usual)]
    for number, start in enumerate(range(0, len(cases), AT_ONCE)):
        yield Batch(f"{table.kind} {number}" if number else table.kind, cases[start : start + AT_ONCE])


def _usual(table: Table) -> Iterator[tuple[str, str]]:
    """What the default suite runs: of a kind's variants so many, evenly, and of several commands one, now this and now that."""
    quick = [variant for variant in table.found if not variant.slow]
    rest = [variant for variant in quick if not variant.always]
    step = -(-len(rest) // MOST) or 1
    for variant in [variant for variant in quick if variant.always] + rest[::step]:
        at = zlib.crc32(variant.name.encode(errors="replace")) % len(variant.commands)
        yield variant.name, variant.commands[at]
