"""The table of models, first part: families that publish a matrix for each expert and projection.

In: nothing. Out: `APART`. It never looks at a checkpoint. Families that publish gate and up in one tensor, or all experts in
one, are in `families_fused`.

Sources: transformers 5.24 `modeling_*.py` and `conversion_mapping.py`, published checkpoints.
"""

from __future__ import annotations

from layouts.tables.family import BARE, FEED, MLP, SPARSE, Family, per_expert, w123
from layouts.tables.natives import (
    FUSED,
    FUSED_IN_MLP,
    MLX_EXPERTS,
    PADDLE,
    PADDLE_KINDS,
    PER_EXPERT,
    PER_EXPERT_FC,
    PER_EXPERT_IN_MLP,
    PER_EXPERT_KINDS,
    PER_EXPERT_LINEAR,
    PER_EXPERT_SPELT,
    PER_EXPERT_W123,
    W1_FUSED,
    WEIGHT_FIRST,
)

APART: tuple[Family, ...] = (
    per_expert("qwen2_moe"),
    per_expert("qwen3_moe"),
    per_expert("qwen3_next"),
    per_expert(
        "qwen3_omni_moe",
        "qwen3_omni_moe_text",
        "qwen3_omni_moe_thinker",
        "qwen3_omni_moe_talker",
        "qwen3_omni_moe_talker_text",
    ),
    per_expert("olmoe"),
    per_expert("flex_olmo"),
    per_expert("deepseek_v2", "deepseek_ocr2", "deepseek_ocr2_text"),
    per_expert("deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"),
    per_expert("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "glm5_next", "glm5_next_text"),
    per_expert("dots1", mlx=MLX_EXPERTS),
    Family(  # the vision encoder has experts, too: fc1 is gate, fc3 up (conversion_mapping.py)
        name="dots3_note",
        model_types=("dots3_note", "dots3_note_text", "dots3_note_vision_encoder"),
        experts=MLP,
        native=(PER_EXPERT, PER_EXPERT_FC, FUSED),
    ),
    Family(  # Paddle's linear layers are [in, out]; gate is first: `swish(Wx) * (Vx)`, W the first half (ernie4_5/modeling.py)
        name="ernie4_5_moe",
        model_types=("ernie4_5_moe",),
        experts=MLP,
        native=(PER_EXPERT, FUSED, PADDLE),
    ),
    Family(  # text experts first, those for images behind (vLLM ernie45_vl_moe.py, conversion_mapping.py of transformers)
        name="ernie4_5_vl_moe",
        model_types=("ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "ernie4_5_moe_vl"),
        experts="{path}.{l}.mlp.{kind:text_moe,vision_moe}.experts",
        native=(PER_EXPERT_KINDS, FUSED, PADDLE_KINDS),
    ),
    per_expert("hunyuan_v1_moe", "hy_v3"),
    per_expert("longcat_flash"),
    per_expert("bailing_moe", "bailing_moe_v2", "bailing_hybrid"),
    per_expert("afmoe", mlx=MLX_EXPERTS),
    per_expert("jamba", experts=FEED),
    per_expert("exaone_moe"),
    per_expert("cohere2_moe"),
    per_expert("solar_open"),
    per_expert("mellum"),
    per_expert("mimo_v2", "mimo_v2_flash"),
    per_expert("laguna", others=("{path}.{l}.mlp.experts.e_score_correction_bias",)),
    per_expert("axk1", "axk2"),
    per_expert("beam"),
    per_expert("flint"),
    per_expert("kolibri", "kolibri1", experts="{path}.{l}.{moe:mlp,moe}.experts"),
    per_expert("klear", "Klear", mlx=MLX_EXPERTS),
    per_expert("unlimited_ocr", "unlimited_ocr_text"),
    per_expert("sarvam_moe", "sarvam_mla"),
    per_expert("time_moe", experts="{path}.{l}.ffn_layer.experts"),  # TimeMoeTemporalBlock
    Family(  # modeling_smallthinker.py, SmallThinkerExpert: `down(up(x) * relu(gate(x)))`
        name="smallthinker",
        model_types=("smallthinker",),
        experts=SPARSE,
        native=(PER_EXPERT_SPELT,),
    ),
    Family(  # vLLM grok1.py: gate is `linear`, up `linear_v`, down `linear_1`
        name="grok-1",
        model_types=("grok-1",),
        experts="{path}.{l}.moe_block.experts",
        native=(PER_EXPERT_LINEAR,),
    ),
    Family(  # YuanExpertMLP: w1 gives both, the activation takes the first half
        name="yuan2",
        model_types=("yuan2", "yuan"),
        experts=MLP,
        native=(W1_FUSED,),
    ),
    Family(  # LinearGLUExperts: `down(act(gate(x)) * up(x))`, lists of parameters that F.linear takes
        name="llama_moe",
        model_types=("llama_moe",),
        experts="{path}.{l}.mlp.calculator.experts",
        native=(WEIGHT_FIRST,),
    ),
    w123("mixtral"),
    w123("phimoe"),
    w123(
        "minimax",
        "minimax_m1",
        "minimax_text_01",
        "MiniMaxM1",
        "MiniMaxText01",
        "minimax_m2",
        "minimax_m3_vl",
        "minimax_m3_vl_text",
    ),
    w123("kimi_linear"),
    w123("arctic"),
    w123("lfm2_moe", experts=FEED),
    w123("deepseek_v4", experts="{path}.{l}.{moe:ffn,mlp}.experts"),
    Family(
        name="mistral_large4",
        model_types=("mistral_large4", "mistral_large4_text"),
        experts=BARE,
        native=(PER_EXPERT_W123, FUSED, FUSED_IN_MLP),
        unfused=(PER_EXPERT, PER_EXPERT_IN_MLP),
    ),
)
