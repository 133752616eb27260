"""What stands beside the adapters of experts: other tensors, and the settings.

In: two described adapters. Out: levels. It never writes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from convert.verifier.adapters.factors import Side
from convert.verifier.bits.order import STRIP
from convert.verifier.verdict import Level
from layouts.adapters.describe import module_of
from layouts.adapters.settings import CONFIG
from layouts.language.pattern import strips

_FORMAL = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "lora_dropout"),
        *("lora_B_layout", "unsloth_fused_expert_lora", "peft_version", "inference_mode"),
    }
)
"""Keys of `adapter_config.json` that say how the same adapter is stored; scales are compared as numbers."""


def compare_others(left: Side, right: Side) -> Level:
    """All other tensors, bit for bit, and the scales of their modules."""
    sides = [{_moved(name): (name, stored) for name, stored in side.described.others.items()} for side in (left, right)]
    differ = [
        f"{name} is only in the {'first' if name in sides[0] else 'second'}" for name in sorted(sides[0].keys() ^ sides[1])
    ]
    both = sorted(sides[0].keys() & sides[1].keys())
    for name in both:
        stored = [found[name][1] for found in sides]
        one, other = (side.reader.tensors[each] for side, each in zip((left, right), stored, strict=True))
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            differ.append(f"{name} is {one.dtype} {one.shape} and {other.dtype} {other.shape}")
        elif any(
            not np.array_equal(left.reader.read(one.name, part), right.reader.read(other.name, part))
            for part in strips(one.shape, STRIP)
        ):
            differ.append(f"{name} differs")
        elif ".lora_" in name:
            differ += _scales(name, [found[name][0] for found in sides], (left, right))
    covered = f"{len(both)} other tensors, bit for bit, and the scales of their modules"
    return Level(
        name="others", covered=covered, compared=len(both), differences=tuple(differ), asked=bool(sides[0] or sides[1])
    )


def _moved(name: str) -> str:
    return name.replace(".block_sparse_moe.", ".mlp.")


def _scales(name: str, names: Iterable[str], sides: tuple[Side, Side]) -> list[str]:
    pairs = zip(sides, names, strict=True)
    one, other = (side.described.settings.scale(module_of(each)).factor for side, each in pairs)
    return [] if one == other else [f"{name} has scale {one:g} and {other:g}"]


def compare_settings(left: Side, right: Side) -> Level:
    """What `adapter_config.json` says beside form and scales."""
    one, other = (side.described.settings.raw for side in (left, right))
    keys = sorted((one.keys() | other.keys()) - _FORMAL)
    differ = tuple(
        f"{CONFIG}: {key} is {one.get(key)!r} and {other.get(key)!r}" for key in keys if one.get(key) != other.get(key)
    )
    return Level(
        name="settings", covered=f"{len(keys)} keys of {CONFIG}", compared=len(keys), differences=differ, asked=bool(keys)
    )
