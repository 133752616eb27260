"""How long an axis is once it is padded: the rules that stand behind `%` in a pattern. Pure.

In: a rule, a size. Out: a size. It knows no pattern.
"""

from __future__ import annotations

_LEAST = 256
"""Columns that MaxText wanted each shard to have."""


def padded(rule: str | None, size: int, shards: int) -> int:
    """The stored size of an axis: a multiple of a number, or the rule that MaxText had before 0.2.5 for all shards together.

    Source of that rule: MaxText e591f30cb, `integration/vllm/maxtext_vllm_adapter/adapter.py`; it does without padding where
    each shard has a multiple of 256 columns, else takes the next power of two, doubled until each shard has 256.
    """
    if rule is None:
        return size
    if rule != "maxtext":
        return -(-size // int(rule)) * int(rule)
    if size % _LEAST == 0:
        return size
    total = 1 << (size * shards - 1).bit_length()
    while total // shards < _LEAST:
        total *= 2
    if total % shards:
        raise ValueError(f"MaxText's padding of {size * shards} to {total} does not divide into {shards} shards")
    return total // shards
