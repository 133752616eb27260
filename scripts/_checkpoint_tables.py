"""Which tensors a model of each family has, under the names that transformers and MaxText write.

Kept apart from `layouts/` on purpose: the tool is tested on checkpoints that do not come from its own tables. Sizes are
letters: E experts, K embed, N expert mlp, F dense mlp, V vocabulary, Q query heads x D, G key/value heads x D, D head width,
R latent rank, P that and a rotary head, W query heads x 2D (M = 2D: a head with and without rotation).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = tuple[str, str]
"""A name and the letters of its shape, outermost first."""

ATTENTION: Sequence[Row] = (
    ("self_attn.q_proj.weight", "QK"),
    ("self_attn.k_proj.weight", "GK"),
    ("self_attn.v_proj.weight", "GK"),
    ("self_attn.o_proj.weight", "KQ"),
)
QK_NORM: Sequence[Row] = (("self_attn.q_norm.weight", "D"), ("self_attn.k_norm.weight", "D"))
QK_NORM_WIDE: Sequence[Row] = (("self_attn.q_norm.weight", "Q"), ("self_attn.k_norm.weight", "G"))
QKV_BIAS: Sequence[Row] = (
    ("self_attn.q_proj.bias", "Q"),
    ("self_attn.k_proj.bias", "G"),
    ("self_attn.v_proj.bias", "G"),
)
LATENT_ATTENTION: Sequence[Row] = (
    ("self_attn.q_a_proj.weight", "RK"),
    ("self_attn.q_a_layernorm.weight", "R"),
    ("self_attn.q_b_proj.weight", "WR"),
    ("self_attn.kv_a_proj_with_mqa.weight", "PK"),
    ("self_attn.kv_a_layernorm.weight", "R"),
    ("self_attn.kv_b_proj.weight", "WR"),
    ("self_attn.o_proj.weight", "KQ"),
)
NORMS: Sequence[Row] = (("input_layernorm.weight", "K"), ("post_attention_layernorm.weight", "K"))
DENSE: Sequence[Row] = (
    ("mlp.gate_proj.weight", "FK"),
    ("mlp.up_proj.weight", "FK"),
    ("mlp.down_proj.weight", "KF"),
)


def shared(module: str) -> Sequence[Row]:
    """A shared expert, which every token passes: not one of the E, whatever its name looks like."""
    return tuple((f"mlp.{module}.{row[0].removeprefix('mlp.')}", row[1].replace("F", "N")) for row in DENSE)


@dataclass(frozen=True, slots=True, kw_only=True)
class HFModel:
    """A family as transformers saves it. `experts` has the words for down, gate and up, in the order of the files."""

    module: str = "mlp"
    experts: tuple[str, str, str] = ("down_proj", "gate_proj", "up_proj")
    attention: Sequence[Row] = ATTENTION
    others: Sequence[Row] = ()
    router: Sequence[Row] = (("mlp.gate.weight", "EK"),)
    dense_layers: int = 0
    architecture: str
    count_key: str = "num_experts"
    config: Mapping[str, Any] = field(default_factory=dict)
    widths: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that say a size, with its letter: without them transformers assumes the published model's."""


_BIASED_ROUTER: Sequence[Row] = (("mlp.gate.weight", "EK"), ("mlp.gate.e_score_correction_bias", "E"))

HF_MODELS: Mapping[str, HFModel] = {
    "mixtral": HFModel(
        architecture="MixtralForCausalLM",
        module="block_sparse_moe",
        experts=("w2", "w1", "w3"),
        router=(("block_sparse_moe.gate.weight", "EK"),),
        count_key="num_local_experts",
    ),
    "qwen2_moe": HFModel(
        architecture="Qwen2MoeForCausalLM",
        attention=(*ATTENTION, *QKV_BIAS),
        others=(*shared("shared_expert"), ("mlp.shared_expert_gate.weight", "1K")),
        config={"decoder_sparse_step": 1, "norm_topk_prob": False},
        widths={"shared_expert_intermediate_size": "N"},
    ),
    "qwen3_moe": HFModel(
        architecture="Qwen3MoeForCausalLM",
        attention=(*ATTENTION, *QK_NORM),
        config={"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    ),
    "olmoe": HFModel(architecture="OlmoeForCausalLM", attention=(*ATTENTION, *QK_NORM_WIDE)),
    "deepseek_v3": HFModel(
        architecture="DeepseekV3ForCausalLM",
        attention=LATENT_ATTENTION,
        others=shared("shared_experts"),
        router=_BIASED_ROUTER,
        dense_layers=1,
        count_key="n_routed_experts",
        config={"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5},
        widths={
            "q_lora_rank": "R",
            "kv_lora_rank": "R",
            "qk_nope_head_dim": "D",
            "qk_rope_head_dim": "D",
            "v_head_dim": "D",
            "num_key_value_heads": "H",
        },
    ),
    "glm4_moe": HFModel(
        architecture="Glm4MoeForCausalLM",
        others=shared("shared_experts"),
        router=_BIASED_ROUTER,
        dense_layers=1,
        count_key="n_routed_experts",
        config={"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
}

MAXTEXT_NORMS: Sequence[Row] = (
    ("pre_self_attention_layer_norm.scale", "K"),
    ("post_self_attention_layer_norm.scale", "K"),
)
SCANNED_ATTENTION: Sequence[Row] = (
    ("self_attention.query.kernel", "KHD"),
    ("self_attention.key.kernel", "KJD"),
    ("self_attention.value.kernel", "KJD"),
    ("self_attention.out.kernel", "HDK"),
    *MAXTEXT_NORMS,
)
SCANNED_LATENT_ATTENTION: Sequence[Row] = (
    ("self_attention.wq_a.kernel", "KR"),
    ("self_attention.q_norm.scale", "R"),
    ("self_attention.wq_b.kernel", "RHM"),
    ("self_attention.wkv_a.kernel", "KP"),
    ("self_attention.kv_norm.scale", "R"),
    ("self_attention.wkv_b.kernel", "RHM"),
    ("self_attention.out.kernel", "HDK"),
    *MAXTEXT_NORMS,
)
MAXTEXT_DENSE: Sequence[Row] = (("mlp.wi_0.kernel", "KF"), ("mlp.wi_1.kernel", "KF"), ("mlp.wo.kernel", "FK"))
EXPERTS: Sequence[Row] = (("gate.kernel", "KE"), ("wi_0", "EKN"), ("wi_1", "EKN"), ("wo", "ENK"))


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxTextModel:
    """A family as MaxText lays it out below `params.params.decoder`; `dense` and `moe` name the stacks of layers."""

    block: str
    attention: Sequence[Row] = SCANNED_ATTENTION
    moe: str = "layers"
    dense: str | None = None
    others: Sequence[Row] = ()


MAXTEXT_MODELS: Mapping[str, MaxTextModel] = {
    "mixtral": MaxTextModel(block="MoeBlock_0"),
    "qwen3_moe": MaxTextModel(
        block="moe_block", others=(("self_attention.query_norm.scale", "D"), ("self_attention.key_norm.scale", "D"))
    ),
    "deepseek_v3": MaxTextModel(
        block="DeepSeekMoeBlock_0.MoeBlock_0",
        attention=SCANNED_LATENT_ATTENTION,
        moe="moe_layers",
        dense="dense_layers",
        others=(
            ("DeepSeekMoeBlock_0.MoeBlock_0.gate.bias", "E"),
            ("DeepSeekMoeBlock_0.shared_experts.wi_0.kernel", "KN"),
            ("DeepSeekMoeBlock_0.shared_experts.wi_1.kernel", "KN"),
            ("DeepSeekMoeBlock_0.shared_experts.wo.kernel", "NK"),
        ),
    ),
}
