"""The table of models, second part: families that publish gate and up in one tensor, or all experts of a layer in one.

In: nothing. Out: `TOGETHER`. It never looks at a checkpoint. Families that publish single experts are in `families_apart`.

Sources: transformers 5.24 `modeling_*.py` and `conversion_mapping.py`, published checkpoints.
"""

from __future__ import annotations

from layouts.tables.family import FEED, MLP, SPARSE, Family, fused
from layouts.tables.natives import (
    FC,
    FC1_FUSED,
    FC_PROJ,
    FLAT,
    FUSED,
    FUSED_IN_MLP,
    FUSED_IN_OUT,
    FUSED_INTERLEAVED,
    LINEAR,
    MLX_EXPERTS,
    MLX_GLU,
    MLX_IN_MLP,
    PER_EXPERT,
    PER_EXPERT_BELOW,
    PER_EXPERT_IN_MLP,
    STACKED,
    UP_FIRST,
    W13_INTERLEAVED,
)

TOGETHER: tuple[Family, ...] = (
    Family(
        name="qwen3_5_moe",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text"),
        experts=MLP,
        native=(FUSED, PER_EXPERT),
    ),
    Family(
        name="qwen3_vl_moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        experts=MLP,
        native=(FUSED_IN_OUT, FUSED),
        changed_in=5,
    ),
    Family(  # up first: `x1 * silu(x2)` (HunyuanImage-3.0 `HunyuanMLP`)
        name="hunyuan",
        model_types=("hunyuan", "hunyuan_image_3_moe"),
        experts=MLP,
        native=(UP_FIRST, PER_EXPERT),
    ),
    Family(  # modeling_step3.py, Step3vMoEMLP: `down_proj(silu(gate_proj(x)) * up_proj(x))`, MoELinear is [E, out, in]
        name="step3p5",
        model_types=("step3p5", "step3p7", "step3_text", "step3_vl"),
        experts="{path}.{l}.moe",
        native=(STACKED, FUSED_IN_MLP),
        unfused=(PER_EXPERT_BELOW, PER_EXPERT_IN_MLP, MLX_IN_MLP),
        transformers=FUSED_IN_MLP,
    ),
    Family(
        name="inkling",
        model_types=(
            "inkling_mm_model",
            "inkling_text",
            "inkling2",
            "inkling2_text",
            "inkling2_loop",
            "inkling2_loop_text",
        ),
        experts=MLP,
        native=(W13_INTERLEAVED, FUSED),
    ),
    fused(
        "gemma4", "gemma4_text", "diffusion_gemma", "diffusion_gemma_text", experts="{path}.{l}.{moe:,moe.}experts", mlx=MLX_GLU
    ),
    fused("hy_v4", "hy_v4_vl", "hy_v4_vl_text"),
    fused("lara_mini"),
    Family(  # the first half of linear_fc1 is gate (SGLang zaya.py); transformers has them in one tensor
        name="zaya",
        model_types=("zaya",),
        experts="{path}.{l}.{moe:mlp,zaya_block}.experts",
        native=(FUSED, FC1_FUSED),
    ),
    Family(  # SGLang interns2_mobius.py: layers share `num_blocks` banks of experts; the first half of rows is gate
        name="interns2_mobius",
        model_types=("interns2_mobius", "interns2_mobius_text"),
        experts="{path}.meta_mlp.{l}.experts",
        native=(FUSED,),
        banks="num_blocks",
    ),
    fused("iquest_q1", native=FC_PROJ),  # the first half of fc is gate (SGLang iquest_q1.py)
    fused("mistral4"),
    fused("muse_spark", "muse_spark_text", others=("{path}.{l}.mlp.experts.post_expert_norm.weight",)),
    fused("granitemoe_swa", experts=SPARSE),
    fused("granitemoe", "granitemoeshared", "granitemoehybrid", experts="{path}.{l}.block_sparse_moe", native=LINEAR),
    fused("jetmoe", experts="{path}.{l}.mlp", native=LINEAR, others=("{path}.{l}.self_attention.experts.{rest}",)),
    fused("llama4", "llama4_text", experts=FEED, native=FUSED_IN_OUT, mlx=MLX_EXPERTS),
    fused("aria", "aria_text", native=FC),
    fused("openai_privacy_filter", native=FUSED_IN_OUT),
    fused("gpt_oss", native=FUSED_INTERLEAVED, mlx=MLX_EXPERTS),
    fused("dbrx", experts="{path}.{l}.ffn.experts", native=FLAT),
)
