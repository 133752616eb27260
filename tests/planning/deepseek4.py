"""A tiny DeepSeek-V4, by hand: names and shapes of deepseek-ai/DeepSeek-V4-Flash, and what transformers 5.24 calls them."""

from typing import Any

import numpy as np

from tests.tiny import MemoryReader

K, V, N, E, H, D, W = 8, 11, 5, 3, 4, 6, 2
Q, OUT, GROUPS, HASHED = 3, 5, 2, 3
RATIOS = [0, 0, 4, 128, 4, 128, 4]
LAYERS = len(RATIOS)
SIZES: dict[str, Any] = {
    "model_type": "deepseek_v4", "num_hidden_layers": LAYERS, "num_attention_heads": H, "num_key_value_heads": 1,
    "n_routed_experts": E, "hc_mult": W, "o_groups": GROUPS, "index_n_heads": 2,
}  # fmt: skip
CONFIG = {**SIZES, "num_hash_layers": HASHED, "compress_ratios": [*RATIOS, 0]}  # the last one is of the MTP block
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
SAVED = {
    **SIZES,
    "layer_types": [KINDS[ratio] for ratio in RATIOS],
    "mlp_layer_types": ["hash_moe"] * HASHED + ["moe"] * (LAYERS - HASHED),
}


def shapes() -> dict[str, tuple[int, ...]]:
    """As published, in one type."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (V, K), "norm.weight": (K,), "head.weight": (V, K)}
    found |= {"hc_head_fn": (W, W * K), "hc_head_base": (W,), "hc_head_scale": (1,)}
    for i, ratio in enumerate(RATIOS):
        layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (K,), "ffn_norm.weight": (K,)}
        for name in ("hc_attn", "hc_ffn"):
            rows = W + W + W * W
            layer |= {f"{name}_fn": (rows, W * K), f"{name}_base": (rows,), f"{name}_scale": (3,)}
        layer |= {"attn.wq_a.weight": (Q, K), "attn.q_norm.weight": (Q,), "attn.wq_b.weight": (H * D, Q)}
        layer |= {"attn.wkv.weight": (D, K), "attn.kv_norm.weight": (D,), "attn.attn_sink": (H,)}
        layer |= {"attn.wo_a.weight": (GROUPS * OUT, H * D // GROUPS), "attn.wo_b.weight": (K, GROUPS * OUT)}
        if ratio:
            layer |= compressor("attn.compressor", ratio, D if ratio == 128 else 2 * D)
        if ratio == 4:
            layer |= compressor("attn.indexer.compressor", ratio, 2 * 3)
            layer |= {"attn.indexer.weights_proj.weight": (2, K), "attn.indexer.wq_b.weight": (2 * 3, Q)}
        layer |= {"ffn.gate.weight": (E, K), **({"ffn.gate.bias": (E,)} if i >= HASHED else {"ffn.gate.tid2eid": (V, 2)})}
        for place in ("shared_experts", *(f"experts.{e}" for e in range(E))):
            layer |= {f"ffn.{place}.{w}.weight": (K, N) if w == "w2" else (N, K) for w in ("w1", "w2", "w3")}
        found |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def compressor(place: str, ratio: int, width: int) -> dict[str, tuple[int, ...]]:
    norm = width // 2 if ratio == 4 else width
    shapes = {"ape": (ratio, width), "norm.weight": (norm,), "wgate.weight": (width, K), "wkv.weight": (width, K)}
    return {f"{place}.{name}": shape for name, shape in shapes.items()}


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random bits, and ids of experts as int64."""
    return {
        name: rng.integers(0, E, shape) if name.endswith("tid2eid") else rng.integers(0, 2**32, shape, dtype="u4")
        for name, shape in shapes().items()
    }


def published() -> MemoryReader:
    return MemoryReader(arrays(np.random.default_rng(0)), config=CONFIG)


def by_transformers() -> MemoryReader:
    """As transformers 5.24 saves it: the inverse of its renaming is not what it read."""
    return MemoryReader({_saved(name): array for name, array in published().arrays.items()}, config=SAVED)


def _saved(name: str) -> str:
    whole = {"embed.weight": "model.embed_tokens.weight", "head.weight": "head.weight", "norm.weight": "model.norm.weight"}
    if name.startswith("hc_head"):
        return name.replace("hc_head_", "model.hc_head.hc_")
    return whole.get(name) or f"model.{name.replace('.attn.kv_norm.', '.attn.norm.')}"
