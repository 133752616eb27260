"""Every family a second time, by hand: names and axes as published checkpoints have them, without a look at the tables.

Each style takes the logical weights of one MoE block, gate and up (E, K, N) and down (E, N, K), and gives name -> array.
Written from `modeling_*.py` of transformers 5.23 and from published checkpoints. `nn.Linear` stores [out, in].
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Style = Callable[[str, np.ndarray, np.ndarray, np.ndarray], Arrays]


def projections(at: str, gate, up, down) -> Arrays:
    """experts.{e}.gate_proj.weight [N, K], up_proj [N, K], down_proj [K, N]."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.gate_proj.weight"] = gate[e].T
        found[f"{at}.experts.{e}.up_proj.weight"] = up[e].T
        found[f"{at}.experts.{e}.down_proj.weight"] = down[e].T
    return found


def w123(at: str, gate, up, down) -> Arrays:
    """w1 is gate, w3 is up, w2 is down."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.w1.weight"] = gate[e].T
        found[f"{at}.experts.{e}.w3.weight"] = up[e].T
        found[f"{at}.experts.{e}.w2.weight"] = down[e].T
    return found


def up_first(at: str, gate, up, down) -> Arrays:
    """Hunyuan-Large: the rows of up stand before those of gate."""
    found = {}
    for e in range(len(gate)):
        found[f"{at}.experts.{e}.gate_and_up_proj.weight"] = np.concatenate((up[e].T, gate[e].T))
        found[f"{at}.experts.{e}.down_proj.weight"] = down[e].T
    return found


def out_in(at: str, gate, up, down) -> Arrays:
    """gate_up_proj [E, 2N, K], down_proj [E, K, N]."""
    rows = np.concatenate((gate, up), -1).swapaxes(1, 2)
    return {f"{at}.experts.gate_up_proj": rows, f"{at}.experts.down_proj": down.swapaxes(1, 2)}


def in_out(at: str, gate, up, down) -> Arrays:
    """gate_up_proj [E, K, 2N], down_proj [E, N, K]."""
    return {f"{at}.experts.gate_up_proj": np.concatenate((gate, up), -1), f"{at}.experts.down_proj": down}


def interleaved(at: str, gate, up, down) -> Arrays:
    """gpt-oss: columns 0, 2, 4, ... are gate; biases likewise."""
    both = np.stack((gate, up), -1).reshape(*gate.shape[:2], -1)
    bias = 7 + both[:, 0] * 3
    found = {f"{at}.experts.gate_up_proj": both, f"{at}.experts.gate_up_proj_bias": bias}
    return found | {f"{at}.experts.down_proj": down, f"{at}.experts.down_proj_bias": down[:, 0] * 5}


def linear(at: str, gate, up, down) -> Arrays:
    """Granite and JetMoE: input_linear.weight [E, 2N, K], output_linear.weight [E, K, N]."""
    rows = np.concatenate((gate, up), -1).swapaxes(1, 2)
    return {f"{at}.input_linear.weight": rows, f"{at}.output_linear.weight": down.swapaxes(1, 2)}


def fc(at: str, gate, up, down) -> Arrays:
    """Aria: fc1.weight [E, K, 2N], fc2.weight [E, N, K]."""
    return {f"{at}.experts.fc1.weight": np.concatenate((gate, up), -1), f"{at}.experts.fc2.weight": down}


def flat(at: str, gate, up, down) -> Arrays:
    """DBRX: w1 (gate), v1 (up) and w2 (down) all [E * N, K]."""
    k = gate.shape[1]
    rows = {"w1": gate.swapaxes(1, 2), "v1": up.swapaxes(1, 2), "w2": down}
    return {f"{at}.experts.mlp.{name}": array.reshape(-1, k) for name, array in rows.items()}


def stacked(at: str, gate, up, down) -> Arrays:
    """Step-3.5: gate_proj.weight [E, N, K], up_proj, down_proj [E, K, N]."""
    words = {"gate_proj": gate, "up_proj": up, "down_proj": down}
    return {f"{at}.{name}.weight": array.swapaxes(1, 2) for name, array in words.items()}


def w13_interleaved(at: str, gate, up, down) -> Arrays:
    """Inkling: w13_weight [E, 2N, K], rows 0, 2, 4, ... are gate."""
    both = np.stack((gate, up), -1).reshape(*gate.shape[:2], -1)
    return {f"{at}.experts.w13_weight": both.swapaxes(1, 2), f"{at}.experts.w2_weight": down.swapaxes(1, 2)}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A published family: its `model_type`s, the module of its experts, their style, and what stands beside them."""

    types: tuple[str, ...]
    style: Style = projections
    at: str = "model.layers.{}.mlp"
    count: str = "num_experts"
    nested: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    beside: tuple[str, ...] = ("model.layers.{}.mlp.gate.weight",)
    fused: str = ""
    """Where `wi` and `wo` of `concat` go, if not below `experts`."""


_SHARED = tuple(f"model.layers.{{}}.mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down"))
_BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
_SPARSE, _FEED = "model.layers.{}.block_sparse_moe", "model.layers.{}.feed_forward"
_ROUTED = (*_SHARED, "model.layers.{}.mlp.gate.weight", _BIAS)

MODELS = {
    "mixtral": Model(types=("mixtral",), style=w123, at=_SPARSE, count="num_local_experts", beside=(f"{_SPARSE}.gate.weight",)),
    "phimoe": Model(types=("phimoe",), style=w123, at=_SPARSE, count="num_local_experts", beside=(f"{_SPARSE}.gate.weight",)),
    "minimax": Model(
        types=("minimax", "minimax_m1", "minimax_m2"),
        style=w123,
        at=_SPARSE,
        count="num_local_experts",
        beside=(f"{_SPARSE}.gate.weight", f"{_SPARSE}.e_score_correction_bias"),
    ),
    "minimax_m3_vl": Model(
        types=("minimax_m3_vl",),
        style=w123,
        at="language_model.model.layers.{}.block_sparse_moe",
        count="num_local_experts",
        nested="text_config",
    ),
    "kimi_linear": Model(
        types=("kimi_linear",),
        style=w123,
        at=_SPARSE,
        beside=tuple(f"{_SPARSE}.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")),
    ),
    "arctic": Model(types=("arctic",), style=w123, at=_SPARSE, count="num_local_experts"),
    "lfm2_moe": Model(types=("lfm2_moe",), style=w123, at=_FEED, beside=(f"{_FEED}.gate.weight", f"{_FEED}.expert_bias")),
    "deepseek_v4": Model(
        types=("deepseek_v4",),
        style=w123,
        at="layers.{}.ffn",
        count="n_routed_experts",
        beside=("layers.{}.ffn.gate.weight", "layers.{}.ffn.shared_experts.w1.weight"),
    ),
    "mistral_large4": Model(types=("mistral_large4",), style=w123, at="layers.{}", count="n_routed_experts"),
    "qwen2_moe": Model(
        types=("qwen2_moe",),
        beside=(
            "model.layers.{}.mlp.shared_expert.gate_proj.weight",
            "model.layers.{}.mlp.shared_expert_gate.weight",
            "model.layers.{}.mlp.gate.weight",
        ),
    ),
    "qwen3_moe": Model(types=("qwen3_moe",), count="num_local_experts"),
    "qwen3_next": Model(types=("qwen3_next",), beside=("model.layers.{}.mlp.shared_expert.down_proj.weight",)),
    "qwen3_omni": Model(types=("qwen3_omni_moe",), at="thinker.model.layers.{}.mlp", nested="thinker_config.text_config"),
    "olmoe": Model(types=("olmoe",)),
    "flex_olmo": Model(types=("flex_olmo",)),
    "deepseek": Model(
        types=("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"), count="n_routed_experts", beside=_ROUTED
    ),
    "kimi_k25": Model(
        types=("kimi_k25",), at="language_model.model.layers.{}.mlp", count="n_routed_experts", nested="text_config"
    ),
    "glm4_moe": Model(types=("glm4_moe", "glm4_moe_lite", "glm_moe_dsa"), count="n_routed_experts", beside=_ROUTED),
    "glm4v_moe": Model(
        types=("glm4v_moe", "glm5_next"),
        at="model.language_model.layers.{}.mlp",
        count="n_routed_experts",
        nested="text_config",
    ),
    "dots1": Model(types=("dots1",), count="n_routed_experts", beside=_ROUTED),
    "ernie4_5_moe": Model(
        types=("ernie4_5_moe",),
        count="moe_num_experts",
        beside=("model.layers.{}.mlp.moe_statics.e_score_correction_bias", *_SHARED),
    ),
    "hunyuan_v1_moe": Model(
        types=("hunyuan_v1_moe",),
        beside=("model.layers.{}.mlp.gate.wg.weight", "model.layers.{}.mlp.shared_mlp.gate_proj.weight"),
    ),
    "hy_v3": Model(types=("hy_v3",), beside=("model.layers.{}.mlp.router.gate.weight", "model.layers.{}.mlp.expert_bias")),
    "hunyuan": Model(types=("hunyuan",), style=up_first, beside=("model.layers.{}.mlp.shared_mlp.gate_and_up_proj.weight",)),
    "longcat_flash": Model(
        types=("longcat_flash",),
        count="n_routed_experts",
        beside=("model.layers.{}.mlp.router.classifier.weight", "model.layers.{}.mlps.0.gate_proj.weight"),
    ),
    "bailing": Model(
        types=("bailing_moe", "bailing_moe_v2", "bailing_hybrid"), beside=("model.layers.{}.mlp.gate.expert_bias",)
    ),
    "afmoe": Model(types=("afmoe",), beside=("model.layers.{}.mlp.router.gate.weight", "model.layers.{}.mlp.expert_bias")),
    "jamba": Model(types=("jamba",), at=_FEED, beside=(f"{_FEED}.router.weight",)),
    "exaone_moe": Model(types=("exaone_moe",), beside=("model.layers.{}.mlp.e_score_correction_bias",)),
    "laguna": Model(types=("laguna",), beside=("model.layers.{}.mlp.experts.e_score_correction_bias",)),
    "kolibri": Model(types=("kolibri1",), beside=("model.layers.{}.moe.router.expert_bias",)),
    "others": Model(
        types=(
            "cohere2_moe",
            "solar_open",
            "mellum",
            "mimo_v2_flash",
            "axk1",
            "axk2",
            "beam",
            "flint",
            "klear",
            "unlimited_ocr",
        )
    ),
    "dots3_note": Model(
        types=("dots3_note",), at="layers.{}.mlp", beside=("vision_encoder.blocks.{}.mlp.experts.0.fc1.weight",)
    ),
    "qwen3_5_moe": Model(types=("qwen3_5_moe",), style=out_in, at="model.language_model.layers.{}.mlp", nested="text_config"),
    "qwen3_vl_moe": Model(
        types=("qwen3_vl_moe",),
        style=in_out,
        at="model.language_model.layers.{}.mlp",
        nested="text_config",
        config={"transformers_version": "4.57.0.dev0"},
    ),
    "qwen3_vl_moe saved again": Model(
        types=("qwen3_vl_moe",),
        style=out_in,
        at="model.language_model.layers.{}.mlp",
        nested="text_config",
        config={"transformers_version": "5.23.0"},
    ),
    "gemma4": Model(
        types=("gemma4_text",),
        style=out_in,
        at="model.layers.{}",
        beside=("model.layers.{}.router.per_expert_scale", "model.layers.{}.mlp.gate_proj.weight"),
    ),
    "gemma4 multimodal": Model(types=("gemma4",), style=out_in, at="model.language_model.layers.{}", nested="text_config"),
    "hy_v4": Model(
        types=("hy_v4",),
        style=out_in,
        count="n_routed_experts",
        beside=("model.layers.{}.mlp.shared_experts.linear_gate.weight",),
    ),
    "zaya": Model(types=("zaya",), style=out_in, beside=("model.layers.{}.mlp.gate.router_mlp.0.weight",)),
    "mistral4": Model(types=("mistral4",), style=out_in, count="n_routed_experts"),
    "muse_spark": Model(
        types=("muse_spark",),
        style=out_in,
        at="model.language_model.layers.{}.mlp",
        nested="text_config",
        count="num_local_experts",
        beside=("model.language_model.layers.{}.mlp.experts.post_expert_norm.weight",),
    ),
    "granitemoe_swa": Model(types=("granitemoe_swa",), style=out_in, at=_SPARSE, count="num_local_experts"),
    "granitemoe": Model(
        types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        style=linear,
        at=_SPARSE,
        count="num_local_experts",
        fused=_SPARSE,
        beside=(f"{_SPARSE}.router.layer.weight", "model.layers.{}.shared_mlp.input_linear.weight"),
    ),
    "jetmoe": Model(
        types=("jetmoe",),
        style=linear,
        count="num_local_experts",
        fused="model.layers.{}.mlp",
        beside=("model.layers.{}.mlp.bias", "model.layers.{}.self_attention.experts.input_linear.weight"),
    ),
    "llama4_text": Model(
        types=("llama4_text",),
        style=in_out,
        at=_FEED,
        count="num_local_experts",
        beside=(f"{_FEED}.router.weight", f"{_FEED}.shared_expert.gate_proj.weight"),
    ),
    "llama4": Model(
        types=("llama4",),
        style=in_out,
        at="language_model.model.layers.{}.feed_forward",
        nested="text_config",
        count="num_local_experts",
    ),
    "aria": Model(
        types=("aria_text",), style=fc, count="moe_num_experts", beside=("model.layers.{}.mlp.router.weight", *_SHARED)
    ),
    "openai_privacy_filter": Model(
        types=("openai_privacy_filter",), style=in_out, at="layers.{}.mlp", count="num_local_experts"
    ),
    "gpt_oss": Model(
        types=("gpt_oss",),
        style=interleaved,
        count="num_local_experts",
        beside=("model.layers.{}.mlp.router.weight", "model.layers.{}.mlp.router.bias"),
    ),
    "dbrx": Model(
        types=("dbrx",),
        style=flat,
        at="transformer.blocks.{}.ffn",
        count="moe_num_experts",
        nested="ffn_config",
        beside=("transformer.blocks.{}.ffn.router.layer.weight",),
    ),
    "step3p5": Model(
        types=("step3p5", "step3p7"),
        style=stacked,
        at="model.layers.{}.moe",
        count="moe_num_experts",
        fused="model.layers.{}.moe",
        beside=("model.layers.{}.moe.gate.weight", "model.layers.{}.moe.router_bias"),
    ),
    "inkling": Model(
        types=("inkling_mm_model", "inkling2"),
        style=w13_interleaved,
        at="model.llm.layers.{}.mlp",
        count="n_routed_experts",
        nested="text_config",
        beside=("model.llm.layers.{}.mlp.shared_w13_weight", "model.llm.layers.{}.mlp.gate.weight"),
    ),
}
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
