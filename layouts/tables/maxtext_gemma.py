"""MaxText's tree of Gemma 4 with experts, in the language of `layouts.tables.maxtext`.

In: nothing. Out: `GEMMA4`. It never looks at a checkpoint.

Five layers with a window and one without take turns. Layers without a window have heads of their own, and no values: those are
the keys (`attention_k_eq_v`). Source: MaxText `checkpoint_conversion/utils/param_mapping.py`, `models/gemma4.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from layouts.tables.maxtext import Row, Stack, Tree, numbered
from layouts.tables.maxtext_rows import attention, gated

_TOWER, _SEEN = "model.vision_tower", "vision_encoder.Gemma4VisionEncoderLayer_0"
_NORMS = {
    "input_layernorm": "pre_self_attention_norm",
    "post_attention_layernorm": "post_self_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _linear(rows: tuple[Row, ...]) -> Iterator[Row]:
    """Rows of the vision tower, whose linear layers are wrapped."""
    yield from (replace(row, hf=row.hf.replace(".weight", ".linear.weight")) for row in rows)


def _queries_and_keys(place: str) -> tuple[Row, ...]:
    """Norms of queries and keys by head."""
    return tuple(Row(f"self_attn.{x[0]}_norm.weight", "d", f"{place}.{x}_norm.scale", "d") for x in ("query", "key"))


_VISION = Tree(
    outside=(
        Row(
            "model.vision_tower.patch_embedder.input_proj.weight", "k p", f"{_SEEN}.vision_entry.input_projection.kernel", "p k"
        ),
        Row(
            "model.vision_tower.patch_embedder.position_embedding_table",
            "q p k",
            f"{_SEEN}.vision_entry.pos_emb_param",
            "p q k",
        ),
        Row(f"{_TOWER}.std_scale", "k", f"{_SEEN}.std_scale", "k", optional=True),
        Row(f"{_TOWER}.std_bias", "k", f"{_SEEN}.std_bias", "k", optional=True),
        Row(
            "model.embed_vision.embedding_projection.weight",
            "o k",
            "vision_encoder.Gemma4VisionProjector_0.projection.kernel",
            "k o",
        ),
    ),
    stacks=(
        Stack(
            scanned=None,
            single=f"{_SEEN}.layer_{{l}}",
            hf=f"{_TOWER}.encoder.layers",
            experts=None,
            rows=(
                *_linear(attention("attention")),
                *_queries_and_keys("attention"),
                *(
                    Row(f"{hf}.weight", "k", f"{there.replace('self_attention', 'attention')}.scale", "k")
                    for hf, there in _NORMS.items()
                ),
                *_linear(gated("mlp", "mlp")),
            ),
        ),
    ),
)
_MOE = "mlp.moe_block"
_LAYER = (
    *_queries_and_keys("self_attention"),
    *(Row(f"{hf}.weight", "k", f"{there}.scale", "k") for hf, there in _NORMS.items()),
    *(
        Row(f"{name}.weight", "k", f"mlp.{name}.scale", "k")
        for name in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
    ),
    *gated("mlp", f"{_MOE}.shared_experts"),
    Row("router.scale", "k", "mlp.pre_forward_scale_2", "k"),
    Row("router.proj.weight", "e k", f"{_MOE}.MoeBlock_0.gate.kernel", "k e"),
    Row("router.per_expert_scale", "e", f"{_MOE}.MoeBlock_0.per_expert_scale", "e"),
    Row("layer_scalar", "o", "layer_scalar", "o"),
)
_QUERIES, _KEYS, _, _OUT = attention("self_attention", shared="u")


def _stacks() -> Iterator[Stack]:
    for place, first, run, own in (
        ("local_layers", 0, 5, attention("self_attention")),
        ("global_layer", 5, 1, (_QUERIES, _KEYS, _OUT)),
    ):
        yield Stack(
            scanned=f"decoder.scanned_blocks.{place}",
            single=f"decoder.layers_{numbered(first, 6, run)}",
            experts=f"{_MOE}.MoeBlock_0",
            rows=(*own, *_LAYER),
            first=first,
            step=6,
            run=run,
        )


GEMMA4 = Tree(
    stacks=tuple(_stacks()),
    hf_experts="experts",
    outside=(
        Row("model.embed_tokens.weight", "v k", "token_embedder.embedding", "v k", computed="embedding-scale"),
        Row("model.norm.weight", "k", "decoder.decoder_norm.scale", "k"),
    ),
    wrapped=("model.", "model.language_model."),
    encoders=(("vision_config", _VISION),),
    heads=(
        ("h", "num_attention_heads"),
        ("j", "num_key_value_heads"),
        ("u", "num_key_value_heads"),
        ("u", "num_global_key_value_heads"),
        ("u", "per_layer_config.*.num_key_value_heads"),  # as transformers 5.24 saves it, where it differs
    ),
    only=(
        ("attention_k_eq_v", (True,), "no values of their own in layers without a window"),
        ("num_kv_shared_layers", (0,), "keys and values in every layer"),
        ("hidden_size_per_layer_input", (0,), "no embeddings by layer"),
        ("enable_moe_block", (True,), "experts"),
    ),
)
