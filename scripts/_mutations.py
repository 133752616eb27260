"""Random damage: to bytes, and to what JSON says. Each takes its dice, so that the same seed gives the same damage again."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

from scripts._sandbox import FORGED

Path = tuple[Any, ...]
CANARY = "CANARY"
"""Stands for the absolute path of the sandbox's canaries."""
NUMBERS = (0, 1, -1, 2, 7, 8, 255, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 64, -(1 << 63), 10**30)
FRACTIONS = (0.5, -0.0, 1e308, float("nan"), float("inf"))
TEXTS = (
    "",
    " ",
    ".",
    "..",
    "../x.a",
    "../../../../x.a",
    f"{CANARY}/x.a",
    "/",
    "a/b",
    "a\\b",
    "\0",
    "\x1b[31m",
    f"\n{FORGED}",
    "\x9b",
    "\ud800",
    "\u202e",
    "9" * 30,
    "9" * 5000,
    "a" * 300,
    "{",
    "{e}",
    "{path}.{g:a,b}",
    "{l*4+p}",
    "e ... k (g n)",
    "-e ... -k n%128",
    "(s=8 g n)",
    "(a" + "a" * 40,
    "concat",
    "float32",
    "BF16",
    "zstd",
    "0:4",
    "sharding_indexed",
    "s3://bucket/x",
    "inode",
)


def value(dice: random.Random) -> Any:
    """Something that probably does not belong here."""
    kind = dice.randrange(7)
    if kind < 2:
        return dice.choice(NUMBERS)
    if kind < 4:
        return dice.choice(TEXTS)
    if kind == 4:
        return dice.choice(FRACTIONS)
    if kind == 5:
        return dice.choice((None, True, False, [], {}, [[]], [{}], {"a": None}))
    return [dice.choice(NUMBERS) for _ in range(dice.choice((1, 2, 4, 40)))]


def places(tree: Any, at: Path = ()) -> list[Path]:
    """Every place in a tree but its root."""
    children = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [place for key, child in children for place in ((*at, key), *places(child, (*at, key)))]


def _node(tree: Any, place: Path) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def _put(tree: Any, place: Path, new: Any) -> None:
    _node(tree, place[:-1])[place[-1]] = new


def _replace(tree: Any, place: Path, dice: random.Random) -> None:
    _put(tree, place, value(dice))


def _drop(tree: Any, place: Path, _: random.Random) -> None:
    del _node(tree, place[:-1])[place[-1]]


def _double(tree: Any, place: Path, dice: random.Random) -> None:
    parent = _node(tree, place[:-1])
    if isinstance(parent, list):
        parent.insert(dice.randrange(len(parent) + 1), copy.deepcopy(parent[place[-1]]))
    else:
        parent[f"{place[-1]}{dice.choice(TEXTS)}"] = copy.deepcopy(parent[place[-1]])


def _rename(tree: Any, place: Path, dice: random.Random) -> None:
    parent = _node(tree, place[:-1])
    if isinstance(parent, dict):
        moved = {_text(str(key), dice) if key == place[-1] else key: child for key, child in parent.items()}
        parent.clear()
        parent.update(moved)
    else:
        dice.shuffle(parent)


def _exchange(tree: Any, place: Path, dice: random.Random) -> None:
    """What stands in another place stands here, too."""
    _put(tree, place, copy.deepcopy(_node(tree, dice.choice(places(tree)))))


def _nudge(tree: Any, place: Path, dice: random.Random) -> None:
    """A number or a text that is nearly what it was."""
    old = _node(tree, place)
    if isinstance(old, bool) or old is None:
        _put(tree, place, not old)
    elif isinstance(old, int | float):
        _put(tree, place, dice.choice((old + 1, old - 1, -old, old * 2, old * 10**9, str(old), float(old))))
    elif isinstance(old, str):
        _put(tree, place, _text(old, dice))
    else:
        _replace(tree, place, dice)


def _text(old: str, dice: random.Random) -> str:
    at, end = sorted(dice.randrange(len(old) + 1) for _ in range(2))
    return old[:at] + dice.choice((*TEXTS, old)) + old[end if dice.random() < 0.5 else at :]


EDITS: tuple[Callable[[Any, Path, random.Random], None], ...] = (_replace, _drop, _double, _rename, _exchange, _nudge, _nudge)


def mutate_tree(tree: Any, dice: random.Random) -> Any:
    """A tree with one to three edits, nearer to its root more often than the number of places there would have it."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        found = places(tree)
        if not found:
            return value(dice)
        depth = dice.choice(sorted({len(place) for place in found}))
        dice.choice(EDITS)(tree, dice.choice([place for place in found if len(place) == depth]), dice)
    return tree


def mutate_bytes(raw: bytes, dice: random.Random) -> bytes:
    """Bytes that were flipped, cut, put in, left out, doubled or overwritten."""
    for _ in range(dice.choice((1, 1, 2, 4))):
        at = dice.randrange(len(raw) + 1)
        end = min(len(raw), at + dice.choice((1, 4, 8, 64, 1000)))
        kind = dice.randrange(7)
        if kind == 0 and at < len(raw):
            raw = raw[:at] + bytes([raw[at] ^ 1 << dice.randrange(8)]) + raw[at + 1 :]
        elif kind == 1:
            raw = raw[:at]
        elif kind == 2:
            raw = raw[:at] + dice.randbytes(dice.choice((1, 8, 100))) + raw[at:]
        elif kind == 3:
            raw = raw[:at] + raw[end:]
        elif kind == 4:
            raw = raw[:end] + raw[at:end] * dice.choice((1, 1, 1000)) + raw[end:]
        elif kind == 5:
            raw = raw[:at] + dice.choice((b"\0", b"\xff", b"[", b'{"a":')) * (end - at) + raw[end:]
        else:
            raw = raw[:at] + (dice.choice(NUMBERS) & (1 << 64) - 1).to_bytes(8, "little") + raw[at + 8 :]
    return raw


def mutate_json(raw: bytes, dice: random.Random) -> bytes:
    """A JSON file: mostly its tree, else its bytes."""
    if dice.random() < 0.2:
        return mutate_bytes(raw, dice)
    return json.dumps(mutate_tree(json.loads(raw), dice)).encode()


def mutate_lines(raw: bytes, dice: random.Random) -> bytes:
    """A file of JSON objects, one in a line."""
    lines = raw.splitlines()
    if dice.random() < 0.2 or not lines:
        return mutate_bytes(raw, dice)
    at = dice.randrange(len(lines))
    lines[at] = mutate_json(lines[at], dice)
    return b"\n".join([*lines, b""])


def mutate_header(raw: bytes, dice: random.Random) -> bytes:
    """A safetensors file: its header, its length, or any of its bytes."""
    if dice.random() < 0.2:
        return mutate_bytes(raw, dice)
    end = 8 + int.from_bytes(raw[:8], "little")
    header = mutate_json(raw[8:end], dice)
    size = len(header) if dice.random() < 0.9 else dice.choice(NUMBERS) & (1 << 64) - 1
    return size.to_bytes(8, "little") + header + raw[end:]


def mutate_record(raw: bytes, dice: random.Random) -> bytes:
    """A JSON file, of which only our record changes."""
    tree = json.loads(raw)
    owner = tree if "moe_layout" in tree else tree["custom_metadata"]
    owner["moe_layout"] = mutate_tree(owner["moe_layout"], dice)
    return json.dumps(tree).encode()
