"""What several processes have found, each in its part, as one finding.

In: what this process has found. Out: what all have, the same for each of them. It never compares.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from xxhash import xxh3_128_hexdigest

from convert.commit.processes import Processes
from convert.verifier.verdict import Level

Rule = Callable[[list[Any]], Any]
"""What becomes of what each process has."""


def joined(processes: Processes, lines: Sequence[str], *amounts: int) -> tuple[list[str], list[int]]:
    """The lines of all processes, in their order, and the sums of their amounts."""
    every = [json.loads(text) for text in processes.gather(json.dumps([*amounts, list(lines)]))]
    sums = [sum(each) for each in zip(*(found[:-1] for found in every), strict=True)]
    return [line for found in every for line in found[-1]], sums


def agree(processes: Processes, seen: Callable[[], object]) -> None:
    """See that all processes look at the same, if there are several.

    Raises:
        UsageError: one sees something else.
    """
    if processes.count > 1:
        processes.agree("verify", xxh3_128_hexdigest(repr(seen()).encode()))


def merged(processes: Processes, own: Mapping[str, Any], rules: Mapping[str, Rule]) -> dict[str, Any]:
    """What all processes have under each name, by the rule for that name."""
    every = [json.loads(text) for text in processes.gather(json.dumps(own))]
    return {name: rule([each[name] for each in every]) for name, rule in rules.items()}


def by_key(rule: Rule) -> Rule:
    """The same rule for each key of several mappings."""

    def merge(found: list[Any]) -> dict[str, Any]:
        keys = dict.fromkeys(key for each in found for key in each)
        return {key: rule([each[key] for each in found if key in each]) for key in keys}

    return merge


def chained(found: list[Any]) -> list[Any]:
    """Lists, one after the other."""
    return list(itertools.chain.from_iterable(found))


def by_first(processes: Processes, make: Callable[[], Level]) -> Level:
    """What the first process finds, where there is little to divide."""
    if processes.count == 1:
        return make()
    text = json.dumps(asdict(make())) if processes.first else ""
    return Level(**_frozen(json.loads(processes.gather(text)[0])))


def _frozen(value: Any) -> Any:
    """With tuples, where JSON has lists."""
    if isinstance(value, dict):
        return {key: _frozen(each) for key, each in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
