"""The encoders of MaxText's trees, for what is seen and heard, which a tree of `layouts.tables.maxtext_trees` refers to.

In: nothing. Out: a `Tree` for each encoder. MaxText never stacks its layers.

Source: MaxText `checkpoint_conversion/standalone_scripts/llama4_ckpt_unscanned.py`, `models/llama4.py`; of Qwen's,
`checkpoint_conversion/utils/param_mapping.py`.
"""

from __future__ import annotations

from dataclasses import replace

from layouts.tables.maxtext import Row, Stack, Tree
from layouts.tables.maxtext_rows import attention, linear, norm

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


def _qwen_vision(hf: str, name: str, merger: tuple[str, str, str], mergers: str | None) -> Tree:
    """Qwen3's vision encoder: `merger` are its norm and its two layers; `mergers` those of deeper layers, by the same words."""
    seen, norm_q, one, two = f"vision_encoder.{name}VisionEncoder_0", *merger
    merge = (*norm(norm_q, "ln_q"), *linear(one, "mlp_0"), *linear(two, "mlp_2"))
    at_end = f"vision_encoder.{name}VisionProjector_0.merger."
    deeper = Stack(
        scanned=None,
        single=f"{seen}.merger_{{l}}",
        hf=f"{hf}.{mergers}",
        last="deepstack_visual_indexes",
        experts=None,
        rows=merge,
    )
    return Tree(
        heads=(("h", "num_heads"),),
        outside=(
            Row(f"{hf}.patch_embed.proj.weight", "o c t y x", f"{seen}.patch_embed.proj.kernel", "t y x c o"),
            Row(f"{hf}.patch_embed.proj.bias", "o", f"{seen}.patch_embed.proj.bias", "o"),
            Row(f"{hf}.pos_embed.weight", "p k", f"{seen}.pos_embed_interpolate.pos_embed", "p k"),
            *(replace(row, hf=f"{hf}.merger.{row.hf}", maxtext=at_end + row.maxtext) for row in merge),
        ),
        stacks=(
            Stack(
                scanned=None,
                single=f"{seen}.blocks_{{l}}",
                hf=f"{hf}.blocks",
                last="depth",
                experts=None,
                rows=(
                    *norm("norm1", "ln1"),
                    *norm("norm2", "ln2"),
                    Row("attn.qkv.weight", "(q h d) k", "attn.attn.{q:query,key,value}.kernel", "k h d"),
                    Row("attn.qkv.bias", "(q h d)", "attn.attn.{q:query,key,value}.bias", "h d"),
                    Row("attn.proj.weight", "k (h d)", "attn.attn.out.kernel", "h d k"),
                    Row("attn.proj.bias", "k", "attn.attn.out.bias", "k"),
                    *linear("mlp.linear_fc1", "mlp"),
                    *linear("mlp.linear_fc2", "mlp_out"),
                ),
            ),
            *([deeper] if mergers else ()),
        ),
    )


_HEARD = "audio_encoder.Qwen3OmniAudioEncoder_0"
_TOWER = "thinker.audio_tower"
_OMNI_AUDIO = Tree(
    heads=(("h", "encoder_attention_heads"),),
    outside=(
        *(
            row
            for conv in ("conv2d1", "conv2d2", "conv2d3")
            for row in (
                Row(f"{_TOWER}.{conv}.weight", "o c y x", f"{_HEARD}.{conv}.kernel", "y x c o"),
                Row(f"{_TOWER}.{conv}.bias", "o", f"{_HEARD}.{conv}.bias", "o"),
            )
        ),
        Row(f"{_TOWER}.conv_out.weight", "o k", f"{_HEARD}.conv_out.kernel", "k o"),
        *norm(f"{_TOWER}.ln_post", f"{_HEARD}.layernorm_post"),
        *linear(f"{_TOWER}.proj1", "audio_encoder.Qwen3OmniAudioProjector_0.proj1"),
        *linear(f"{_TOWER}.proj2", "audio_encoder.Qwen3OmniAudioProjector_0.proj2"),
    ),
    stacks=(
        Stack(
            scanned=None,
            single=f"{_HEARD}.layers_{{l}}",
            hf=f"{_TOWER}.layers",
            last="encoder_layers",
            experts=None,
            rows=(
                *norm("self_attn_layer_norm", "input_layer_norm"),
                *norm("final_layer_norm", "post_attention_layer_norm"),
                *attention("self_attention_audio", bias=True, shared="h", out="out_proj"),
                *linear("fc1", "AudioMLP.wi"),
                *linear("fc2", "AudioMLP.wo"),
            ),
        ),
    ),
)
_MERGER = ("norm", "linear_fc1", "linear_fc2")
QWEN3_VL = (("vision_config", _qwen_vision("model.visual", "Qwen3VL", _MERGER, "deepstack_merger_list")),)
QWEN3_5 = (("vision_config", _qwen_vision("model.visual", "Qwen3_5Moe", _MERGER, None)),)
QWEN3_OMNI = (
    ("vision_config", _qwen_vision("thinker.visual", "Qwen3OmniMoe", ("ln_q", "mlp.0", "mlp.2"), "merger_list")),
    ("audio_config", _OMNI_AUDIO),
)
