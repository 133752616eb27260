"""Every family a second time, by hand: names and axes as published checkpoints have them, without a look at the tables."""

from typing import Any

import numpy as np

from tests.layouts.by_hand.apart import APART
from tests.layouts.by_hand.styles import Arrays, Model
from tests.layouts.by_hand.together import SAID, TOGETHER

__all__ = ["APART", "CASES", "MODELS", "SAID", "config", "tensors", "weights"]

MODELS = APART | TOGETHER
CASES = [(name, kind) for name, model in MODELS.items() for kind in model.types]


def weights(layer: int, e: int, k: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gate, up (E, K, N) and down (E, N, K) in which every element says where it belongs."""
    spots = np.arange(e * k * n, dtype="u4").reshape(e, k, n)
    return (spots + 10_000_000 * (layer + 1), spots + 10_000_000 * (layer + 1) + 2_000_000,
            spots.swapaxes(1, 2) + 10_000_000 * (layer + 1) + 4_000_000)  # fmt: skip


def config(model: Model, kind: str, e: int) -> dict[str, Any]:
    """`config.json`: the number of experts where this family has it."""
    found: dict[str, Any] = {"model_type": kind, **model.config}
    inner = found
    for key in filter(None, model.nested.split(".")):
        inner = inner.setdefault(key, {})
    inner[model.count] = e
    return found


def tensors(model: Model, layers=(2, 11), e: int = 12, k: int = 6, n: int = 4) -> Arrays:
    """A small checkpoint: experts, what stands beside them, and what every model has."""
    found = {"lm_head.weight": np.arange(5, dtype="u4"), "model.layers.0.mlp.gate_proj.weight": np.arange(7, dtype="u4")}
    for layer in layers:
        found |= model.style(model.at.format(layer), *weights(layer, e, k, n))
        found |= {name.format(layer): np.arange(layer, layer + 9, dtype="u4") for name in model.beside}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}
