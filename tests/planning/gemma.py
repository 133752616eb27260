"""A tiny Gemma 4 with experts as Hugging Face has it, by hand: names and shapes of google/gemma-4-26b-a4b-it."""

from typing import Any

K, V, F, N, E = 8, 11, 7, 5, 12
HEADS, WIDTH, WIDE = 4, 3, 6
VISION, LAYERS = 10, 12
TEXT: dict[str, Any] = {
    "model_type": "gemma4_text", "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "num_global_key_value_heads": 1, "num_experts": E, "attention_k_eq_v": True, "enable_moe_block": True,
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
}  # fmt: skip
SEEN = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
CONFIG = {"model_type": "gemma4", "text_config": TEXT, "vision_config": SEEN}
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def shapes() -> dict[str, tuple[int, ...]]:
    """Every sixth layer attends to all, with heads of its own and no values."""
    found: dict[str, tuple[int, ...]] = {"model.language_model.embed_tokens.weight": (V, K)}
    found["model.language_model.norm.weight"] = (K,)
    for i in range(LAYERS):
        wide = i % 6 == 5
        d, kv = (WIDE, 1) if wide else (WIDTH, 2)
        layer = {f"{name}.weight": (K,) for name in NORMS}
        layer |= {f"{side}_feedforward_layernorm_{n}.weight": (K,) for side, n in (("pre", 2), ("post", 1), ("post", 2))}
        layer |= {"self_attn.q_proj.weight": (HEADS * d, K), "self_attn.k_proj.weight": (kv * d, K)}
        layer |= {} if wide else {"self_attn.v_proj.weight": (kv * d, K)}
        layer |= {"self_attn.o_proj.weight": (K, HEADS * d)}
        layer |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,), "layer_scalar": (1,)}
        layer |= {"mlp.gate_proj.weight": (F, K), "mlp.up_proj.weight": (F, K), "mlp.down_proj.weight": (K, F)}
        layer |= {"router.scale": (K,), "router.proj.weight": (E, K), "router.per_expert_scale": (E,)}
        layer |= {"experts.gate_up_proj": (E, 2 * N, K), "experts.down_proj": (E, K, N)}
        found |= {f"model.language_model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found | vision()


def vision() -> dict[str, tuple[int, ...]]:
    """Its linear layers are wrapped."""
    tower, k = "model.vision_tower", VISION
    found: dict[str, tuple[int, ...]] = {
        f"{tower}.patch_embedder.input_proj.weight": (k, 12),
        f"{tower}.patch_embedder.position_embedding_table": (2, 5, k),
        f"{tower}.std_scale": (k,),
        f"{tower}.std_bias": (k,),
        "model.embed_vision.embedding_projection.weight": (K, k),
    }
    for i in range(2):
        layer = {f"{name}.weight": (k,) for name in NORMS}
        layer |= {f"self_attn.{name}_proj.linear.weight": (2 * 4, k) for name in "qkv"}
        layer |= {
            "self_attn.o_proj.linear.weight": (k, 2 * 4),
            "self_attn.q_norm.weight": (4,),
            "self_attn.k_norm.weight": (4,),
        }
        layer |= {f"mlp.{name}_proj.linear.weight": (F, k) for name in ("gate", "up")} | {"mlp.down_proj.linear.weight": (k, F)}
        found |= {f"{tower}.encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found
