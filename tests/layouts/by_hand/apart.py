"""Families that publish single experts, by hand; see `tests.layouts.by_hand`."""

from tests.layouts.by_hand.styles import (
    FEED,
    MLP,
    SPARSE,
    Model,
    fc132,
    paddle,
    shared,
    spelt,
    up_first,
    w123,
    weight_first,
    yuan,
)

_BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
_ROUTED = (*shared(MLP), "model.layers.{}.mlp.gate.weight", _BIAS)

APART = {
    "mixtral": Model(types=("mixtral",), style=w123, at=SPARSE, count="num_local_experts", beside=(f"{SPARSE}.gate.weight",)),
    "phimoe": Model(types=("phimoe",), style=w123, at=SPARSE, count="num_local_experts", beside=(f"{SPARSE}.gate.weight",)),
    "minimax": Model(
        types=("minimax", "minimax_m1", "minimax_m2"),
        style=w123,
        at=SPARSE,
        count="num_local_experts",
        beside=(f"{SPARSE}.gate.weight", f"{SPARSE}.e_score_correction_bias"),
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
        at=SPARSE,
        beside=tuple(f"{SPARSE}.shared_experts.{p}_proj.weight" for p in ("gate", "up", "down")),
    ),
    "arctic": Model(types=("arctic",), style=w123, at=SPARSE, count="num_local_experts"),
    "lfm2_moe": Model(types=("lfm2_moe",), style=w123, at=FEED, beside=(f"{FEED}.gate.weight", f"{FEED}.expert_bias")),
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
    "qwen3_omni": Model(
        types=("qwen3_omni_moe", "qwen3_omni_moe_talker_text", "qwen3_omni_moe_text"),
        at="thinker.model.layers.{}.mlp",
        nested="thinker_config.text_config",
    ),
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
        beside=("model.layers.{}.mlp.moe_statics.e_score_correction_bias", *shared(MLP)),
    ),
    "hunyuan_v1_moe": Model(
        types=("hunyuan_v1_moe",),
        beside=("model.layers.{}.mlp.gate.wg.weight", "model.layers.{}.mlp.shared_mlp.gate_proj.weight"),
    ),
    "hy_v3": Model(types=("hy_v3",), beside=("model.layers.{}.mlp.router.gate.weight", "model.layers.{}.mlp.expert_bias")),
    "hunyuan": Model(
        types=("hunyuan", "hunyuan_image_3_moe"),
        style=up_first,
        beside=("model.layers.{}.mlp.shared_mlp.gate_and_up_proj.weight",),
    ),
    "longcat_flash": Model(
        types=("longcat_flash",),
        count="n_routed_experts",
        beside=("model.layers.{}.mlp.router.classifier.weight", "model.layers.{}.mlps.0.gate_proj.weight"),
    ),
    "bailing": Model(
        types=("bailing_moe", "bailing_moe_v2", "bailing_hybrid"), beside=("model.layers.{}.mlp.gate.expert_bias",)
    ),
    "afmoe": Model(types=("afmoe",), beside=("model.layers.{}.mlp.router.gate.weight", "model.layers.{}.mlp.expert_bias")),
    "jamba": Model(types=("jamba",), at=FEED, beside=(f"{FEED}.router.weight",)),
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
            "unlimited_ocr_text",
            "deepseek_ocr2_text",
        )
    ),
    "dots3_note": Model(types=("dots3_note",), at="layers.{}.mlp"),
    "dots3_note vision": Model(
        types=("dots3_note", "dots3_note_vision_encoder"),
        style=fc132,
        at="vision_encoder.blocks.{}.mlp",
        count="num_local_experts",
        nested="vision_config",
        beside=("vision_encoder.blocks.{}.mlp.gate_weight", "vision_encoder.blocks.{}.mlp.router_bias"),
    ),
    "ernie4_5 of paddle": Model(
        types=("ernie4_5_moe",),
        style=paddle,
        at="ernie.layers.{}.mlp",
        count="moe_num_experts",
        beside=("ernie.layers.{}.mlp.gate.weight", "ernie.layers.{}.mlp.shared_experts.up_gate_proj.weight"),
    ),
    "smallthinker": Model(
        types=("smallthinker",),
        style=spelt("gate", "up", "down"),
        at=SPARSE,
        count="moe_num_primary_experts",
        beside=(f"{SPARSE}.primary_router.weight",),
    ),
    "grok-1": Model(
        types=("grok-1",),
        style=spelt("linear", "linear_v", "linear_1"),
        at="model.layers.{}.moe_block",
        beside=("model.layers.{}.moe_block.gate.weight",),
    ),
    "yuan2": Model(types=("yuan2",), style=yuan, beside=("model.layers.{}.mlp.gate.query_key_value.weight",)),
    "time_moe": Model(
        types=("time_moe",),
        at="model.layers.{}.ffn_layer",
        beside=("model.layers.{}.ffn_layer.shared_expert.up_proj.weight", "model.layers.{}.ffn_layer.gate.weight"),
    ),
    "llama_moe": Model(
        types=("llama_moe",),
        style=weight_first,
        at="model.layers.{}.mlp.calculator",
        beside=("model.layers.{}.mlp.gate.gate_network.0.weight",),
    ),
    "sarvam": Model(
        types=("sarvam_moe", "sarvam_mla"),
        count="n_routed_experts",
        beside=("model.layers.{}.mlp.gate.expert_bias", *shared(MLP)),
    ),
}
