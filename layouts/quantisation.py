"""What `config.json` says of how a model is quantised.

In: a config. Out: sizes. It never looks at a tensor: a grid of scales does not tell how large its blocks are.

Sources: transformers `FineGrainedFP8Config`; compressed-tensors `QuantizationArgs`; vLLM `modelopt.py` (FP8_PB_WO).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

PLACES = ("quantization_config", "compression_config")
"""Where it stands, at any depth: a model of several parts says it of one of them."""
BESIDE = ("expert_dtype",)
"""Words beside those places: DeepSeek-V4's config says it of experts alone."""
FILES = ("hf_quant_config.json",)
"""Files that say the same beside `config.json`."""
PARAMS, QUANTIZATION = "params.json", "quantization"
"""Mistral's own config of a model, and the word in it."""
ALGORITHMS: Mapping[str, tuple[int, int]] = {"FP8_PB_WO": (128, 128)}
"""Names of ModelOpt that stand for a size of blocks."""


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that does not say it, at any depth."""
    return {k: without(v) if isinstance(v, Mapping) else v for k, v in config.items() if k not in (*PLACES, *BESIDE)}


def stated(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every part of a config that says how something is quantised."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if key in PLACES:
                yield value
            else:
                yield from stated(value)


def weights_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What compressed-tensors, and ModelOpt after it, say of the weights of each group of modules."""
    for part in stated(config):
        groups = part.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
                yield group["weights"]


def block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block that has one scale; None where nothing says it, or not all say the same."""
    sizes = [ALGORITHMS.get(str(part.get("quant_algo"))) or part.get("weight_block_size") for part in stated(config)]
    sizes += [weights.get("block_structure") for weights in weights_of(config)]
    found = {tuple(size) if _is_block(size) else () for size in sizes if size is not None}
    block = next(iter(found)) if len(found) == 1 else ()
    return (block[0], block[1]) if block else None


def _is_block(size: Any) -> bool:
    return isinstance(size, list | tuple) and len(size) == 2 and all(type(each) is int and each > 0 for each in size)
