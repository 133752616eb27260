"""Tiny models of every family that transformers can build, and the reasons for those that it cannot.

Nothing here knows our tables: a config is the class's own defaults with small numbers under the names that the class has, and
`OVERRIDES` says what single families need besides.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers

EXPERTS, HIDDEN = 12, 64

SMALL: Mapping[str, Any] = {
    "vocab_size": 160, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "moe_top_k": 2,
    "intermediate_size": 48, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "sliding_window": 16,
    # multi-head latent attention and its indexer
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    # linear attention and state spaces
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16,
    # vision and audio towers
    "depth": 2, "num_heads": 4, "out_hidden_size": HIDDEN, "image_size": 56, "patch_size": 14,
    "d_model": HIDDEN, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "output_dim": HIDDEN,
    "downsample_hidden_size": 16, "num_position_embeddings": 16, "text_hidden_size": HIDDEN,
}  # fmt: skip
"""Small numbers by their names in the configs; a class gets those that it has."""

MLA = {"num_key_value_heads": 4}
TEXT = "text_config"
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
NOPE = {"index_kpool": 4, "qk_rope_head_dim": 0, "mlp_layer_types": ["dense", "sparse"]}
LONGCAT = {"num_layers": 2, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 40, "head_dim": 8}
QWEN4 = {
    "ngram_vocab_size_base": 64, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "ple_embed_dim": 16,
    "hc_lowrank": 8,
}  # fmt: skip
HYBRID = {"num_hidden_layers": 8, "shared_expert_intermediate_size": 40, "linear_value_head_dim": 8}
GEMMA = {"enable_moe_block": True, "vocab_size_per_layer_input": 160, "hidden_size_per_layer_input": 0}
CYCLES = {
    **GEMMA, "num_hidden_layers": 12, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 32,
    "final_logit_softcapping": 30.0,
}  # fmt: skip

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [1]},
    # 2N == K: a forgotten transpose shows in the values only
    "qwen3_moe-square-tied": {"moe_intermediate_size": 32, "tie_word_embeddings": True, "num_experts": 11},
    "deepseek_v3": {"n_group": 2},
    # as published: two layers that do not compress, then two kinds in turn; HCA compresses 128 tokens
    "deepseek_v4-cycles": {
        "num_hidden_layers": 7,
        "num_key_value_heads": 1,
        "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 0],
        "num_hash_layers": 3,
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
        "o_lora_rank": 12,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 48,
        "index_n_heads": 16,
    },
    "mixtral-heads": {"head_dim": 24, "sliding_window": None},  # as published; 24 is no power of four
    "deepseek_v32-heads": {"index_n_heads": 16},  # with few, many tokens have the score 0, and any of them is chosen
    "qwen3_omni_moe": {
        "talker_config": {
            "accept_hidden_layer": 1,
            "spatial_merge_size": 2,
            TEXT: {"shared_expert_intermediate_size": 56, "moe_intermediate_size": 24},
            "code_predictor_config": {"num_hidden_layers": 1},
            "thinker_hidden_size": HIDDEN,
        },
        "code2wav_config": {"decoder_dim": 64, "upsample_rates": [2], "upsampling_ratios": [2], "codebook_size": 16},
    },
    "glm4v_moe": {TEXT: {"rope_parameters": MROPE}},
    "glm4v_moe_text": {"rope_parameters": MROPE},
    "glm5_next": {TEXT: NOPE},
    "glm5_next_text": NOPE,
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "vision_config": {"pyramid_num_routed": [-1, 4], "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        "audio_config": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN, "conv_output_size": 256},
    },
    "ernie4_5_vl_moe": {TEXT: {"moe_intermediate_size": [40, 24], "rope_parameters": MROPE | {"mrope_section": [2, 2, 4]}}},
    "longcat_flash": LONGCAT | {"zero_expert_num": 0},
    # transformers saves gate and up of its experts without weights too, but no down
    "longcat_flash-zeros": LONGCAT | {"zero_expert_num": 4},
    "bailing_hybrid": {"num_expert_group": 1, "n_group": 1},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "flint": {"mlp_only_layers": [0]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "step3p7": {TEXT: {"mlp_layer_types": ["dense", "sparse"]}},
    "inkling_mm_model": {"vision_config": {"n_layers": 4, "patch_size": 4}},
    "inkling2": {TEXT: {"unpadded_vocab_size": 160}},
    "inkling2_text": {"unpadded_vocab_size": 160},
    "inkling2_loop": {TEXT: {"unpadded_vocab_size": 160}},
    "inkling2_loop_text": {"unpadded_vocab_size": 160},
    "hy_v4_vl": {TEXT: {"rope_parameters": MROPE}},
    "hy_v4_vl_text": {"rope_parameters": MROPE},
    "llama4": {
        TEXT: {"num_hidden_layers": 4},
        "vision_config": {"projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN},
    },
    "llama4-seen": {
        TEXT: {"num_hidden_layers": 4, "num_experts_per_tok": 1},
        "vision_config": {
            "image_size": 336,
            "num_hidden_layers": 3,
            "intermediate_size": 256,
            "vision_output_dim": 40,
            "projector_input_dim": 40,
            "projector_output_dim": 40,
        },
    },
    "llama4_text": {"num_hidden_layers": 4},
    "llama4_text-top1": {"num_experts_per_tok": 1, "num_hidden_layers": 8},
    "gemma4": {TEXT: GEMMA},
    "gemma4_text": GEMMA,
    "gemma4-cycles": {TEXT: CYCLES},
    "gemma4_text-cycles": CYCLES,
    "gemma4-seen": {
        TEXT: CYCLES,
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 12,
            "position_embedding_size": 16,
            "standardize": True,
        },
    },
    "qwen3_moe-sparse": {"mlp_only_layers": [], "norm_topk_prob": True},
    "qwen3_next-cycles": {"num_hidden_layers": 8, "shared_expert_intermediate_size": 40},
    "qwen3_5_moe-cycles": {TEXT: HYBRID},
    "qwen3_5_moe_text-cycles": HYBRID,
    "qwen3_vl_moe-square": {TEXT: {"moe_intermediate_size": 32}},
    "deepseek_ocr2": {TEXT: {"mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4}},
    "qwen4_exp": {TEXT: QWEN4},
    "qwen4_exp_text": QWEN4,
    "muse_spark_text": {"moe_hidden_size": 32},
    "unlimited_ocr": {TEXT: MLA},
    "zaya": {"num_experts_per_tok": 1},
    "muse_spark": {
        "projector_hidden_size": HIDDEN,
        "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
        TEXT: {"moe_hidden_size": 32},
    },
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_top_k": 2},
    },
}

PUBLISHED_FUSED = {
    "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa", "jetmoe", "dbrx", "aria", "aria_text", "llama4",
    "llama4_text", "gpt_oss", "openai_privacy_filter", "gemma4", "gemma4_text", "diffusion_gemma", "hy_v4", "zaya", "mistral4",
    "muse_spark", "qwen3_vl_moe", "qwen3_vl_moe_text", "glm4v_moe_text", "inkling_text",
    "minimax_m3_vl_text", "muse_spark_text", "lara_mini", "hy_v4_vl", "hy_v4_vl_text",
}  # fmt: skip
"""Model types that transformers writes and loads with gate and up in one tensor: nothing is left to fuse for it."""

ALIASES: Mapping[str, str] = {
    "kimi_k2": "deepseek_v3",
    "ernie4_5_moe_vl": "ernie4_5_vl_moe",
    "bailing_moe": "bailing_hybrid",
    "bailing_moe_v2": "bailing_hybrid",
    "mimo_v2": "mimo_v2_flash",
    "kolibri": "kolibri1",
    "minimax_m1": "minimax",
    "minimax_text_01": "minimax",
    "MiniMaxM1": "minimax",
    "MiniMaxText01": "minimax",
    "step3p5": "step3p7",
}
"""Names in published configs that transformers has no model class for, and a model type whose experts have the same names."""

_REMOTE = "transformers has no class of this model_type: it runs with the checkpoint's own code"
_PART = "no model class of its own; tested as a part of the whole"
SKIPPED: Mapping[str, str] = {
    "qwen3_omni_moe_talker": "no config class of its own; tested as a part of qwen3_omni_moe",
    "qwen3_omni_moe_text": _PART,
    "qwen3_omni_moe_talker_text": _PART,
    "deepseek_ocr2_text": _PART,
    "unlimited_ocr_text": _PART,
    "ernie4_5_vl_moe_text": _PART,
    "diffusion_gemma_text": _PART,
    "dots3_note_vision_encoder": _PART,
    "grok-1": _REMOTE,
    "llama_moe": _REMOTE,
    "interns2_mobius": _REMOTE,
    "interns2_mobius_text": _REMOTE,
    "iquest_q1": _REMOTE,
    "smallthinker": _REMOTE,
    "yuan2": _REMOTE,
    "yuan": _REMOTE,
    "time_moe": _REMOTE,
    "step3_text": _REMOTE,
    "step3_vl": _REMOTE,
    "klear": _REMOTE,
    "Klear": _REMOTE,
    "arctic": _REMOTE,
    "hunyuan": _REMOTE,
    "hunyuan_image_3_moe": _REMOTE,
}
"""Model types of our table without a client test, and why."""

EXTRA = ("qwen3_moe-square-tied", "longcat_flash-zeros")
"""Cases besides the plain model types."""

REFUSED: Mapping[str, str] = {}
"""Cases that we do not convert, and a word of the reason that the error must give."""


def config(case: str) -> Any:
    """The tiny config of a case: a model type, and after a hyphen what is special."""
    kind = case.partition("-")[0]
    return transformers.AutoConfig.for_model(kind, **_merged(_small(_defaults(kind)), OVERRIDES.get(case, {})))


def _defaults(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = transformers.AutoConfig.for_model(kind).to_dict()
    return found


def _small(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The small numbers that a config has a place for."""
    found = {key: SMALL[key] for key in defaults if key in SMALL}
    if "kv_lora_rank" in defaults:
        found.pop("head_dim", None)
        found |= MLA
    nested = {key: _small(value) for key, value in defaults.items() if key.endswith("_config") and isinstance(value, Mapping)}
    return found | {key: value for key, value in nested.items() if value}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base.get(key, {}), value) for key, value in over.items() if isinstance(value, Mapping)}
    return {**base, **over, **both}


AUTO = (
    transformers.AutoModelForMultimodalLM,
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModel,
)


def build(case: str) -> torch.nn.Module:
    """A model with random weights; the seed is the same for every case."""
    return built(config(case))


def built(stated: Any) -> torch.nn.Module:
    """The same, of a config."""
    torch.manual_seed(0)
    auto = next(auto for auto in AUTO if type(stated) in auto._model_mapping)
    model = auto.from_config(stated, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers leaves some without values, and norms and biases all alike
            if parameter.ndim > 1 or not parameter.abs().max() < 100:
                parameter.normal_(std=0.1)
            else:
                parameter += torch.randn_like(parameter) * 0.05
    return model.eval()


def forward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden state of models without a head."""
    torch.manual_seed(0)  # diffusion models begin with noise
    with torch.no_grad():
        # transformers 5.24 asks a Llama 4 that saw no picture what it made of pictures, and fails
        text = {"qwen3_omni_moe": "thinker", "llama4": "language_model"}.get(model.config.model_type)
        found = (getattr(model, text) if text else model)(input_ids=ids, use_cache=False)
    return found.logits if hasattr(found, "logits") else found[0]


def experts(model: torch.nn.Module) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """What the model itself computes with: `wi` (E, K, 2N) gate first and `wo` (E, N, K) of each MoE block, and their biases.

    Written from the forward functions of transformers: `gate_up_proj` is (E, 2N, K), unless `is_transposed`; gate and up are
    its halves, unless not `is_concatenated`.
    """
    seen = set()
    for name, module in model.named_modules():
        found = dict(module.named_parameters(recurse=False))
        if type(module).__name__ == "DbrxExpertGLU":
            gate, up, down = (found[key].view(EXPERTS, -1, HIDDEN) for key in ("w1", "v1", "w2"))
            yield name, {"wi": torch.cat([gate, up], 1).mT, "wo": down}
        elif type(module).__name__ == "JetMoeMoE":
            yield name, {"wi": module.input_linear.weight.mT, "wo": module.output_linear.weight.mT}
        elif "gate_up_proj" in found and found["gate_up_proj"].ndim == 3 and found["gate_up_proj"].data_ptr() not in seen:
            seen.add(found["gate_up_proj"].data_ptr())
            yield name, _halves(module, found)


def _halves(module: torch.nn.Module, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    straight = getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
    arrays = {"wi": found["gate_up_proj"], "wo": found["down_proj"]}
    arrays = {role: array if straight else array.mT for role, array in arrays.items()}
    arrays |= {f"{role}_bias": found[key] for role, key in _BIASES.items() if key in found}
    if not getattr(module, "is_concatenated", True):
        for key in arrays.keys() & {"wi", "wi_bias"}:
            arrays[key] = torch.cat([arrays[key][..., 0::2], arrays[key][..., 1::2]], -1)
    return arrays


_BIASES = {"wi": "gate_up_proj_bias", "wo": "down_proj_bias"}
