"""Tiny models of every tree of MaxText, as Hugging Face has them, by hand: names and shapes of what is published."""

import numpy as np

from tests.planning import deepseek4, gemma
from tests.tiny import MemoryReader

K, H, J, D, V, N, E, F, X = 8, 4, 2, 3, 11, 5, 12, 7, 2
TWINS = ("layers.3.embed_tokens.weight", "shared_head.head.weight")
RNG = np.random.default_rng(0)


def random(*shape: int) -> np.ndarray:
    return RNG.integers(0, 2**32, shape, dtype="u4")


def outside() -> dict[str, np.ndarray]:
    return {"model.embed_tokens.weight": random(V, K), "model.norm.weight": random(K), "lm_head.weight": random(V, K)}


def norms(layer: str) -> dict[str, np.ndarray]:
    return {f"{layer}.{name}.weight": random(K) for name in ("input_layernorm", "post_attention_layernorm")}


def attention(layer: str, heads: int = H) -> dict[str, np.ndarray]:
    shapes = {"q_proj": (heads * D, K), "k_proj": (J * D, K), "v_proj": (J * D, K), "o_proj": (K, H * D)}
    return {f"{layer}.self_attn.{name}.weight": random(*shape) for name, shape in shapes.items()}


def gated(place: str, width: int) -> dict[str, np.ndarray]:
    shapes = {"gate_proj": (width, K), "up_proj": (width, K), "down_proj": (K, width)}
    return {f"{place}.{name}.weight": random(*shape) for name, shape in shapes.items()}


def experts(layer: str) -> dict[str, np.ndarray]:
    return {name: array for e in range(E) for name, array in gated(f"{layer}.mlp.experts.{e}", N).items()}


def qwen3_moe(layers: int) -> dict[str, np.ndarray]:
    found = outside()
    for layer in (f"model.layers.{i}" for i in range(layers)):
        found |= norms(layer) | attention(layer) | experts(layer) | {f"{layer}.mlp.gate.weight": random(E, K)}
        found |= {f"{layer}.self_attn.{name}.weight": random(D) for name in ("q_norm", "k_norm")}
    return found


def mixtral(layers: int) -> dict[str, np.ndarray]:
    found = outside()
    for layer in (f"model.layers.{i}" for i in range(layers)):
        found |= norms(layer) | attention(layer) | {f"{layer}.block_sparse_moe.gate.weight": random(E, K)}
        for e in range(E):
            words = zip(("w1", "w3", "w2"), gated("", N).values(), strict=True)
            found |= {f"{layer}.block_sparse_moe.experts.{e}.{word}.weight": array for word, array in words}
    return found


def deepseek_v3(layers: int) -> dict[str, np.ndarray]:
    found = outside()
    latent = {
        "q_a_proj": (6, K), "q_a_layernorm": (6,), "q_b_proj": (H * 5, 6), "kv_a_proj_with_mqa": (9, K),
        "kv_a_layernorm": (7,), "kv_b_proj": (H * 4, 7), "o_proj": (K, H * D),
    }  # fmt: skip
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= norms(layer) | {f"{layer}.self_attn.{name}.weight": random(*shape) for name, shape in latent.items()}
        if i < 2:
            found |= gated(f"{layer}.mlp", F)
        else:
            found |= experts(layer) | gated(f"{layer}.mlp.shared_experts", N) | {f"{layer}.mlp.gate.weight": random(E, K)}
            found |= {f"{layer}.mlp.gate.e_score_correction_bias": random(E)}
    return found


def deepseek_v32(layers: int) -> dict[str, np.ndarray]:
    """With an indexer, and a block that predicts further tokens behind the last layer, which repeats embedding and head."""
    last = f"model.layers.{layers}"
    found = {name: random(*array.shape) for name, array in deepseek_v3(layers + 1).items()}
    indexer = {"wq_b": (X * 3, 6), "wk": (3, K), "weights_proj": (X, K)}
    for layer in (f"model.layers.{i}.self_attn.indexer" for i in range(layers + 1)):
        found |= {f"{layer}.{name}.weight": random(*shape) for name, shape in indexer.items()}
        found |= {f"{layer}.k_norm.weight": random(3), f"{layer}.k_norm.bias": random(3)}
    mtp = {"enorm": (K,), "hnorm": (K,), "eh_proj": (K, 2 * K), "shared_head.norm": (K,)}
    found |= {f"{last}.{name}.weight": random(*shape) for name, shape in mtp.items()}
    found[f"{last}.embed_tokens.weight"] = found["model.embed_tokens.weight"].copy()
    return found | {f"{last}.shared_head.head.weight": found["lm_head.weight"].copy()}


def kimi_k25(layers: int) -> dict[str, np.ndarray]:
    return {f"language_model.{name}": array for name, array in deepseek_v3(layers).items()}


def vision(place: str, merger: tuple[str, str, str], mergers: str) -> dict[str, np.ndarray]:
    """Two blocks of two heads, one merger at the end and three before."""
    c, m = 6, 24
    shapes = {
        "patch_embed.proj.weight": (c, 3, 2, 4, 4), "patch_embed.proj.bias": (c,), "pos_embed.weight": (9, c),
        **{f"merger.{name}": shape for name, shape in _merger(merger, c, m).items()},
    }  # fmt: skip
    for i in range(2):
        layer = {
            "norm1.weight": (c,), "norm1.bias": (c,), "norm2.weight": (c,), "norm2.bias": (c,), "attn.qkv.weight": (3 * c, c),
            "attn.qkv.bias": (3 * c,), "attn.proj.weight": (c, c), "attn.proj.bias": (c,), "mlp.linear_fc1.weight": (10, c),
            "mlp.linear_fc1.bias": (10,), "mlp.linear_fc2.weight": (c, 10), "mlp.linear_fc2.bias": (c,),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    for i in range(3):
        shapes |= {f"{mergers}.{i}.{name}": shape for name, shape in _merger(merger, m, m).items()}
    return {f"{place}.{name}": random(*shape) for name, shape in shapes.items()}


def _merger(words: tuple[str, str, str], norm: int, wide: int) -> dict[str, tuple[int, ...]]:
    sizes = {words[0]: ((norm,), norm), words[1]: ((wide, wide), wide), words[2]: ((K, wide), K)}
    found = {f"{name}.weight": shape for name, (shape, _) in sizes.items()}
    return found | {f"{name}.bias": (size,) for name, (_, size) in sizes.items()}


def qwen3_vl_moe(layers: int) -> dict[str, np.ndarray]:
    found = {}
    for name, array in qwen3_moe(layers).items():
        if ".experts." not in name:
            found[name.replace("model.", "model.language_model.") if name.startswith("model.") else name] = array
    for i in range(layers):
        experts = f"model.language_model.layers.{i}.mlp.experts"
        found |= {f"{experts}.gate_up_proj": random(E, K, 2 * N), f"{experts}.down_proj": random(E, N, K)}
    return found | vision("model.visual", ("norm", "linear_fc1", "linear_fc2"), "deepstack_merger_list")


def qwen3_omni_moe(layers: int) -> dict[str, np.ndarray]:
    found = {f"thinker.{name}": array for name, array in qwen3_moe(layers).items()}
    found |= vision("thinker.visual", ("ln_q", "mlp.0", "mlp.2"), "merger_list")
    c = 8
    shapes = {"conv_out.weight": (c, 12), "ln_post.weight": (c,), "ln_post.bias": (c,)}
    shapes |= {f"conv2d{i}.weight": (5, 1 if i == 1 else 5, 3, 3) for i in (1, 2, 3)} | {
        f"conv2d{i}.bias": (5,) for i in (1, 2, 3)
    }
    for name, size in (("proj1", c), ("proj2", K)):
        shapes |= {f"{name}.weight": (size, c), f"{name}.bias": (size,)}
    for layer in ("layers.0", "layers.1"):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (c, c), f"{layer}.self_attn.{name}.bias": (c,)}
        for name, (out, into) in (("fc1", (10, c)), ("fc2", (c, 10))):
            shapes |= {f"{layer}.{name}.weight": (out, into), f"{layer}.{name}.bias": (out,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{name}.weight": (c,), f"{layer}.{name}.bias": (c,)}
    return found | {f"thinker.audio_tower.{name}": random(*shape) for name, shape in shapes.items()}


def gpt_oss(layers: int) -> dict[str, np.ndarray]:
    found = outside()
    for layer in (f"model.layers.{i}" for i in range(layers)):
        found |= norms(layer) | attention(layer)
        biases = {"q_proj": H * D, "k_proj": J * D, "v_proj": J * D, "o_proj": K}
        found |= {f"{layer}.self_attn.{name}.bias": random(size) for name, size in biases.items()}
        mlp = {
            "router.weight": (E, K), "router.bias": (E,), "experts.gate_up_proj": (E, K, 2 * N), "experts.down_proj": (E, N, K),
            "experts.gate_up_proj_bias": (E, 2 * N), "experts.down_proj_bias": (E, K),
        }  # fmt: skip
        found |= {f"{layer}.mlp.{name}": random(*shape) for name, shape in mlp.items()}
        found |= {f"{layer}.self_attn.sinks": random(H)}
    return found


def qwen3_next(layers: int) -> dict[str, np.ndarray]:
    found = outside()
    linear = {
        "in_proj_qkvz.weight": (20, K), "in_proj_ba.weight": (6, K), "conv1d.weight": (14, 1, 4), "A_log": (3,),
        "dt_bias": (3,), "norm.weight": (D,), "out_proj.weight": (K, 9),
    }  # fmt: skip
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= norms(layer) | experts(layer) | gated(f"{layer}.mlp.shared_expert", F)
        found |= {f"{layer}.mlp.gate.weight": random(E, K), f"{layer}.mlp.shared_expert_gate.weight": random(1, K)}
        if i % 4 == 3:
            found |= attention(layer, 2 * H) | {f"{layer}.self_attn.{name}.weight": random(D) for name in ("q_norm", "k_norm")}
        else:
            found |= {f"{layer}.linear_attn.{name}": random(*shape) for name, shape in linear.items()}
    return found


def qwen3_5_moe(layers: int) -> dict[str, np.ndarray]:
    """Two key heads of 3 and four value heads of 2: sections of 6, 6, 8 and 8 rows."""
    linear = {
        "in_proj_qkv.weight": (20, K), "in_proj_z.weight": (8, K), "in_proj_b.weight": (4, K), "in_proj_a.weight": (4, K),
        "conv1d.weight": (20, 1, 4), "A_log": (4,), "dt_bias": (4,), "norm.weight": (2,), "out_proj.weight": (K, 8),
    }  # fmt: skip
    found = {}
    for name, array in qwen3_next(layers).items():
        if ".linear_attn." not in name and ".experts." not in name:
            found[name.replace("model.", "model.language_model.", 1)] = array
    for i in range(layers):
        layer = f"model.language_model.layers.{i}"
        found |= {f"{layer}.mlp.experts.gate_up_proj": random(E, 2 * N, K), f"{layer}.mlp.experts.down_proj": random(E, K, N)}
        if i % 4 != 3:
            found |= {f"{layer}.linear_attn.{name}": random(*shape) for name, shape in linear.items()}
    seen = vision("model.visual", ("norm", "linear_fc1", "linear_fc2"), "deeper")
    return found | {name: array for name, array in seen.items() if ".deeper." not in name}


def llama4(layers: int, step: int = 2) -> dict[str, np.ndarray]:
    found = outside()
    for i in range(layers):
        layer = f"model.layers.{i}"
        found |= norms(layer) | attention(layer)
        if (i + 1) % step:
            found |= gated(f"{layer}.feed_forward", F)
        else:
            mlp = {"router.weight": (E, K), "experts.gate_up_proj": (E, K, 2 * N), "experts.down_proj": (E, N, K)}
            found |= {f"{layer}.feed_forward.{name}": random(*shape) for name, shape in mlp.items()}
            found |= gated(f"{layer}.feed_forward.shared_expert", N)
    return {f"language_model.{name}": array for name, array in found.items()} | llama4_vision()


def llama4_vision() -> dict[str, np.ndarray]:
    c, h, d, f = 6, 3, 2, 10
    shapes = {
        "class_embedding": (c,), "positional_embedding_vlm": (5, c), "patch_embedding.linear.weight": (c, 12),
        "layernorm_pre.weight": (c,), "layernorm_pre.bias": (c,), "layernorm_post.weight": (c,), "layernorm_post.bias": (c,),
        "vision_adapter.mlp.fc1.weight": (7, 24), "vision_adapter.mlp.fc2.weight": (9, 7),
    }  # fmt: skip
    for layer in ("model.layers.0", "model.layers.1"):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (c, h * d), f"{layer}.self_attn.{name}.bias": (c,)}
        for name, sizes in (("fc1", (f, c)), ("fc2", (c, f))):
            shapes |= {f"{layer}.mlp.{name}.weight": sizes, f"{layer}.mlp.{name}.bias": sizes[:1]}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{layer}.{name}.weight": (c,), f"{layer}.{name}.bias": (c,)}
    found = {f"vision_model.{name}": random(*shape) for name, shape in shapes.items()}
    return found | {"multi_modal_projector.linear_1.weight": random(K, 9)}


MODELS = {
    "qwen3_moe": (qwen3_moe, 3),
    "mixtral": (mixtral, 3),
    "deepseek_v3": (deepseek_v3, 5),
    "deepseek_v32": (deepseek_v32, 3),
    "kimi_k25": (kimi_k25, 3),
    "qwen3_vl_moe": (qwen3_vl_moe, 2),
    "qwen3_omni_moe": (qwen3_omni_moe, 2),
    "gpt_oss": (gpt_oss, 4),
    "qwen3_next": (qwen3_next, 8),
    "qwen3_5_moe": (qwen3_5_moe, 8),
    "llama4": (llama4, 8),
    "deepseek_v4": (lambda _: deepseek4.arrays(RNG), deepseek4.LAYERS),
    "gemma4": (lambda _: {name: random(*shape) for name, shape in gemma.shapes().items()}, gemma.LAYERS),
}
CONFIGS = {"gemma4": gemma.CONFIG, "deepseek_v4": deepseek4.CONFIG}
COUNT = {"deepseek_v3": "n_routed_experts", "deepseek_v32": "n_routed_experts", "kimi_k25": "n_routed_experts"}
COUNT |= {"mixtral": "num_local_experts", "gpt_oss": "num_local_experts", "llama4": "num_local_experts"}


def reader(name: str) -> MemoryReader:
    make, layers = MODELS[name]
    if name in CONFIGS:
        return MemoryReader(make(layers), config=CONFIGS[name])
    config = {"model_type": name, "num_hidden_layers": layers, "num_attention_heads": H, "num_key_value_heads": J}
    config |= {COUNT.get(name, "num_experts"): E, "first_k_dense_replace": 2}
    if name == "llama4":
        text = config | {"model_type": "llama4_text", "interleave_moe_layer_step": 2}
        vision = {"num_attention_heads": 3, "num_hidden_layers": 2}
        config = {"model_type": name, "text_config": text, "vision_config": vision}
    if name == "kimi_k25":
        config = {"model_type": name, "text_config": config | {"model_type": "kimi_k2"}}
    if name == "deepseek_v32":
        config |= {"index_n_heads": X, "num_nextn_predict_layers": 1}
    if name == "qwen3_5_moe":
        sizes = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 3, "value_head_dim": 2}
        text = config | {"model_type": "qwen3_5_moe_text"} | {f"linear_{word}": size for word, size in sizes.items()}
        config = {"model_type": name, "text_config": text, "vision_config": {"num_heads": 2, "depth": 2}}
    if name in ("qwen3_vl_moe", "qwen3_omni_moe"):
        seen = {"num_heads": 2, "depth": 2, "deepstack_visual_indexes": [0, 1, 1]}
        heard = {"encoder_attention_heads": 4, "encoder_layers": 2}
        config = {"text_config": config | {"model_type": f"{name}_text"}, "vision_config": seen, "audio_config": heard}
        config = {"model_type": name, **({"thinker_config": config} if "omni" in name else config)}
        config["transformers_version"] = "4.57.0"  # before 5, which turned the experts of Qwen3-VL
    return MemoryReader(make(layers), config=config)
