"""The rows that go through some experts in one call: those that read weights back, random ones, and routed ones.

In: how many experts, and where tokens go. Out: rows and groups. It never runs them.

All probes share one pass over the weights: on a CPU, to go over them is what a call costs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.verifier.bits.logical import Block

ONE_HOT = 16
"""Rows of a weight that the identity probe reads back, evenly spread; all of them where there are no more."""
RANDOM = 3
"""Random rows of each expert."""
ROUTED = 4
"""Routed rows that there is room for, for each expert of a call: as many as a token has experts, if all are alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows `x` (M, K) sorted by expert, `sizes` (E,) of their groups; rows behind the last group are nobody's.

    `hot` are the places (M,) where rows and hidden rows are one-hot, -1 if they are not. `random` and `routed` say which rows
    these are.
    """

    x: NDArray[np.float32]
    hot: tuple[NDArray[np.int32], NDArray[np.int32]]
    sizes: NDArray[np.int32]
    random: NDArray[np.int64]
    routed: NDArray[np.int64]


def rows_of(block: Block, tokens: int = 1) -> dict[str, NDArray[Any]]:
    """Which rows of each weight the one-hot tokens read."""
    lengths = {"wi": block.groups["wi", ""].total("k"), "wo": block.groups["wo", ""].total("n")}
    return {role: np.unique(np.linspace(0, n - 1, min(ONE_HOT * tokens, n)).astype(int)) for role, n in lengths.items()}


def room_for(experts: int, tokens: int = 1) -> int:
    """Routed rows of a call."""
    return max(8, ROUTED * experts * tokens)


def most_of(block: Block, experts: int, tokens: int = 1) -> int:
    """Rows of one expert in a call, at most."""
    return _each(block, tokens) + room_for(experts, tokens)


def length_of(block: Block, experts: int, tokens: int = 1) -> int:
    """Rows of a call: always as many, whatever they are, so that a call is compiled once."""
    return experts * _each(block, tokens) + room_for(experts, tokens)


def _each(block: Block, tokens: int) -> int:
    """Rows of each expert: those that read, and random ones."""
    return max(map(len, rows_of(block, tokens).values())) + RANDOM * tokens


@functools.lru_cache(maxsize=2)
def _drawn(first: int, k: int, count: int) -> NDArray[np.float32]:
    """Random rows; both sides get the same ones."""
    return np.random.default_rng([first, k]).standard_normal((count, k), np.float32)


def ask(block: Block, experts: range, tokens: int = 1, routed: tuple[NDArray[Any], NDArray[Any]] | None = None) -> Rows:
    """One-hot and random rows for each of these experts, and `routed` ones: rows (R, K), and how many each expert has."""
    count, k = len(experts), block.groups["wi", ""].total("k")
    x, sizes = routed or (np.zeros((0, k), np.float32), np.zeros(count, int))
    hot, drawn = _spread(rows_of(block, tokens)), count * RANDOM * tokens
    kinds = np.repeat((0, 1, 2), (count * len(hot[0]), drawn, len(x)))
    owners = np.concatenate([np.repeat(np.arange(count), each) for each in (len(hot[0]), RANDOM * tokens, sizes)])
    kinds = kinds[np.argsort(owners, kind="stable")]
    random_at, routed_at = (np.flatnonzero(kinds == kind) for kind in (1, 2))
    every = np.zeros((length_of(block, count, tokens), k), np.float32)
    every[random_at], every[routed_at] = _drawn(experts.start, k, drawn), x
    return Rows(
        x=every,
        hot=(_placed(hot[0], kinds, len(every)), _placed(hot[1], kinds, len(every))),
        sizes=np.bincount(owners, minlength=count).astype(np.int32),
        random=random_at,
        routed=routed_at,
    )


def _spread(rows: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The rows of both weights that are read, as many of each: of the shorter one, the last more than once."""
    most = max(map(len, rows.values()))
    return [np.pad(rows[role], (0, most - len(rows[role])), mode="edge") for role in ("wi", "wo")]


def _placed(hot: NDArray[Any], kinds: NDArray[Any], length: int) -> NDArray[np.int32]:
    found = np.full(length, -1, np.int32)
    at = np.flatnonzero(kinds == 0)
    found[at] = np.tile(hot, len(at) // len(hot))
    return found
