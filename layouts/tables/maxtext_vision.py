"""The vision encoders of MaxText's trees, which a tree of `layouts.tables.maxtext_trees` refers to.

In: nothing. Out: a `Tree` for each encoder. MaxText never stacks its layers.

Source: MaxText `checkpoint_conversion/standalone_scripts/llama4_ckpt_unscanned.py`, `models/llama4.py`.
"""

from __future__ import annotations

from layouts.tables.maxtext import Row, Stack, Tree
from layouts.tables.maxtext_rows import attention, norm

_SEEN = "vision_encoder.Llama4VisionModel_0"
LLAMA4_VISION = Tree(
    outside=(
        Row("vision_model.class_embedding", "k", f"{_SEEN}.class_embedding", "k"),
        Row("vision_model.positional_embedding_vlm", "p k", f"{_SEEN}.positional_embedding_vlm", "p k"),
        Row(
            "vision_model.patch_embedding.linear.weight",
            "k p",
            f"{_SEEN}.Llama4UnfoldConvolution_0.vit_unfold_linear.kernel",
            "p k",
        ),
        *norm("vision_model.layernorm_pre", f"{_SEEN}.layernorm_pre"),
        *norm("vision_model.layernorm_post", f"{_SEEN}.layernorm_post"),
        *(
            Row(
                f"vision_model.vision_adapter.mlp.{name}.weight",
                "o k",
                f"{_SEEN}.Llama4VisionPixelShuffleMLP_0.pixel_shuffle_mlp.vit_pixel_shuffle_mlp_{name}.kernel",
                "k o",
            )
            for name in ("fc1", "fc2")
        ),
        Row(
            "multi_modal_projector.linear_1.weight",
            "o k",
            "vision_encoder.Llama4MultiModalProjector_0.vit_multi_modal_projector.kernel",
            "k o",
        ),
    ),
    stacks=(
        Stack(
            scanned=None,
            single=f"{_SEEN}.Llama4VisionEncoder_0.layers_{{l}}",
            hf="vision_model.model.layers",
            experts=None,
            rows=(
                *norm("input_layernorm", "input_layer_norm"),
                *norm("post_attention_layernorm", "post_attention_layer_norm"),
                *attention("self_attention_vision", bias=True, shared="h"),
                *(
                    row
                    for name in ("fc1", "fc2")
                    for row in (
                        Row(f"mlp.{name}.weight", "o k", f"Llama4VisionMLP_0.vit_encoder_layer_mlp_{name}.kernel", "k o"),
                        Row(f"mlp.{name}.bias", "o", f"Llama4VisionMLP_0.vit_encoder_layer_mlp_{name}.bias", "o"),
                    )
                ),
            ),
        ),
    ),
)
