"""Families that publish gate and up in one tensor, or all experts of a layer in one, by hand; see `tests.layouts.by_hand`."""

from tests.layouts.by_hand.styles import (
    FEED,
    MLP,
    SPARSE,
    Model,
    fc,
    flat,
    in_out,
    interleaved,
    linear,
    out_in,
    shared,
    stacked,
    w13_interleaved,
)

TOGETHER = {
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
    "granitemoe_swa": Model(types=("granitemoe_swa",), style=out_in, at=SPARSE, count="num_local_experts"),
    "granitemoe": Model(
        types=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        style=linear,
        at=SPARSE,
        count="num_local_experts",
        fused=SPARSE,
        beside=(f"{SPARSE}.router.layer.weight", "model.layers.{}.shared_mlp.input_linear.weight"),
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
        at=FEED,
        count="num_local_experts",
        beside=(f"{FEED}.router.weight", f"{FEED}.shared_expert.gate_proj.weight"),
    ),
    "llama4": Model(
        types=("llama4",),
        style=in_out,
        at="language_model.model.layers.{}.feed_forward",
        nested="text_config",
        count="num_local_experts",
    ),
    "aria": Model(
        types=("aria_text",), style=fc, count="moe_num_experts", beside=("model.layers.{}.mlp.router.weight", *shared(MLP))
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
