"""What Orbax says of each leaf of a tree besides its data: the kinds of the keys on the way to it, and whether it is restored.

In: an open checkpoint. Out: differences in words. It never looks at arrays.

Names are compared elsewhere; `0` of a list and `0` of a dictionary are the same name, and not the same tree.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from layouts.orbax.tree import ARRAYS, METADATA
from layouts.reader import Reader

_KINDS: Mapping[int, str] = {1: "an index of a list", 2: "a key of a dictionary"}
"""`key_type` in Orbax's tree metadata."""
Path = tuple[str, ...]


def compare_leaves(one: Reader, other: Reader) -> Iterator[str]:
    """What is wrong within either tree, and nodes that are lists in one and dictionaries in the other."""
    found = []
    for reader in (one, other):
        kinds = _kinds(reader)
        yield from (f"{reader.path}: {line}" for line in (*_odd(kinds), *_skipped(reader)))
        found.append({node: each.most_common(1)[0][0] for node, each in kinds.items()})
    for node in sorted(found[0].keys() & found[1].keys()):
        if found[0][node] != found[1][node]:
            yield f"{METADATA}: below {_named(node)} is {_word(found[0][node])} in one, {_word(found[1][node])} in the other"


def leaves_of(reader: Reader) -> int:
    """How many leaves are looked at; files without a tree have none."""
    return len(getattr(reader, "leaves", {}))


def _kinds(reader: Reader) -> dict[Path, Counter[Any]]:
    """The kinds of the keys right below each node, by how many leaves say so."""
    found: dict[Path, Counter[Any]] = defaultdict(Counter)
    for leaf in getattr(reader, "leaves", {}).values():
        keys = leaf.entry["key_metadata"]
        path = tuple(str(key["key"]) for key in keys)
        for at, key in enumerate(keys):
            found[path[:at]][key["key_type"]] += 1
    return found


def _odd(kinds: Mapping[Path, Counter[Any]]) -> Iterator[str]:
    for node, found in sorted(kinds.items()):
        if len(found) > 1 or next(iter(found)) not in _KINDS:
            words = " and ".join(f"{_word(kind)} ({count} leaves)" for kind, count in found.most_common())
            yield f"{METADATA}: below {_named(node)} is {words}"


def _skipped(reader: Reader) -> Iterator[str]:
    """Arrays that Orbax leaves out when it restores the tree."""
    for name, leaf in getattr(reader, "leaves", {}).items():
        if leaf.kind in ARRAYS and leaf.entry["value_metadata"].get("skip_deserialize"):
            yield f"{METADATA}: {name} is marked skip_deserialize, so Orbax does not restore it"


def _named(node: Path) -> str:
    return ".".join(node) or "the root"


def _word(kind: object) -> str:
    return next((word for known, word in _KINDS.items() if known == kind), f"a key of kind {kind!r}, which Orbax has not")
