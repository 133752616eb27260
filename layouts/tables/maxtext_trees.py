"""The table of MaxText's trees, in the language of `layouts.tables.maxtext`; one entry per family serves both directions.

In: nothing. Out: `TREES`. It never looks at a checkpoint.

Source: MaxText `checkpoint_conversion/utils/param_mapping.py` (which maps names one by one, with functions for the axes); for
Llama 4, which is not in it, `checkpoint_conversion/standalone_scripts/llama4_ckpt_unscanned.py` and `models/llama4.py`. That
models of MaxText 0.2.5 compute with these trees what transformers computes, `tests/clients/test_maxtext.py` shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from layouts.tables.maxtext import Row, Stack, Tree, numbered


def _attention(place: str, *, bias: bool = False, shared: str = "j") -> tuple[Row, ...]:
    """Grouped-query attention: q, k and v by head, and the projection back. `shared` are the heads of k and v."""
    projections = (("q_proj", "query", "h"), ("k_proj", "key", shared), ("v_proj", "value", shared))
    rows = [Row(f"self_attn.{q}.weight", f"({h} d) k", f"{place}.{name}.kernel", f"k {h} d") for q, name, h in projections]
    rows.append(Row("self_attn.o_proj.weight", "k (h d)", f"{place}.out.kernel", "h d k"))
    if bias:
        rows += [Row(f"self_attn.{q}.bias", f"({h} d)", f"{place}.{name}.bias", f"{h} d") for q, name, h in projections]
        rows.append(Row("self_attn.o_proj.bias", "k", f"{place}.out.bias", "k"))
    return tuple(rows)


def _gated(hf: str, maxtext: str) -> tuple[Row, ...]:
    """A gated MLP that is not routed: a dense layer, or a shared expert."""
    return (
        Row(f"{hf}.gate_proj.weight", "f k", f"{maxtext}.wi_0.kernel", "k f"),
        Row(f"{hf}.up_proj.weight", "f k", f"{maxtext}.wi_1.kernel", "k f"),
        Row(f"{hf}.down_proj.weight", "k f", f"{maxtext}.wo.kernel", "f k"),
    )


def _norms(before: str = "pre_self_attention_layer_norm", after: str = "post_self_attention_layer_norm") -> tuple[Row, ...]:
    return (
        Row("input_layernorm.weight", "k", f"{before}.scale", "k"),
        Row("post_attention_layernorm.weight", "k", f"{after}.scale", "k"),
    )


_QK_NORM = (
    Row("self_attn.q_norm.weight", "d", "self_attention.query_norm.scale", "d"),
    Row("self_attn.k_norm.weight", "d", "self_attention.key_norm.scale", "d"),
)
_LATENT = (
    Row("self_attn.q_proj.weight", "(h q) k", "self_attention.query.kernel", "k h q", optional=True),
    Row("self_attn.q_a_proj.weight", "r k", "self_attention.wq_a.kernel", "k r", optional=True),
    Row("self_attn.q_a_layernorm.weight", "r", "self_attention.q_norm.scale", "r", optional=True),
    Row("self_attn.q_b_proj.weight", "(h q) r", "self_attention.wq_b.kernel", "r h q", optional=True),
    Row("self_attn.kv_a_proj_with_mqa.weight", "p k", "self_attention.wkv_a.kernel", "k p"),
    Row("self_attn.kv_a_layernorm.weight", "c", "self_attention.kv_norm.scale", "c"),
    Row("self_attn.kv_b_proj.weight", "(h m) c", "self_attention.wkv_b.kernel", "c h m"),
    Row("self_attn.o_proj.weight", "k (h d)", "self_attention.out.kernel", "h d k"),
    Row("self_attn.indexer.k_norm.bias", "i", "self_attention.indexer.k_norm.bias", "i", optional=True),
    Row("self_attn.indexer.k_norm.weight", "i", "self_attention.indexer.k_norm.scale", "i", optional=True),
    Row("self_attn.indexer.weights_proj.weight", "i k", "self_attention.indexer.weights_proj.kernel", "k i", optional=True),
    Row("self_attn.indexer.wk.weight", "i k", "self_attention.indexer.wk.kernel", "k i", optional=True),
)
_DEEPSEEK_MOE = "DeepSeekMoeBlock_0.MoeBlock_0"
_DEEPSEEK = Tree(
    stacks=(
        Stack(
            scanned="decoder.dense_layers",
            single="decoder.dense_layers_{l}",
            experts=None,
            last="first_k_dense_replace",
            rows=(*_norms(), *_LATENT, *_gated("mlp", "mlp")),
        ),
        Stack(
            scanned="decoder.moe_layers",
            single="decoder.moe_layers_{l}",
            experts=_DEEPSEEK_MOE,
            first="first_k_dense_replace",
            rows=(
                *_norms(),
                *_LATENT,
                *_gated("mlp.shared_experts", "DeepSeekMoeBlock_0.shared_experts"),
                Row("mlp.gate.weight", "e k", f"{_DEEPSEEK_MOE}.gate.kernel", "k e"),
                Row("mlp.gate.e_score_correction_bias", "e", f"{_DEEPSEEK_MOE}.gate.bias", "e", optional=True),
            ),
        ),
    )
)
_ROUTER = Row("mlp.gate.weight", "e k", "moe_block.gate.kernel", "k e")
_GPT_OSS_ROWS = (
    *_norms(),
    *_attention("GptOssAttention", bias=True),
    Row("self_attn.sinks", "h", "GptOssAttention.sinks", "h"),
    Row("mlp.router.weight", "e k", "GptOssMlp.gate.kernel", "k e"),
    Row("mlp.router.bias", "e", "GptOssMlp.gate.bias", "e"),
)


def _next_rows(*, full: bool) -> tuple[Row, ...]:
    """Qwen3-Next: every fourth layer has full attention, the others a gated delta net."""
    attention = (
        # With a gate: two for each head.
        Row("self_attn.q_proj.weight", "(h q) k", "attention.attention.query.kernel", "k h q"),
        *_attention("attention.attention")[1:3],
        Row("self_attn.o_proj.weight", "k q", "attention.attention.out.kernel", "q k"),
        Row("self_attn.q_norm.weight", "d", "attention.attention.query_norm.scale", "d"),
        Row("self_attn.k_norm.weight", "d", "attention.attention.key_norm.scale", "d"),
    )
    linear = (
        Row("linear_attn.in_proj_qkvz.weight", "q k", "attention.in_proj_qkvz.kernel", "k q"),
        Row("linear_attn.in_proj_ba.weight", "q k", "attention.in_proj_ba.kernel", "k q"),
        Row("linear_attn.conv1d.weight", "q o w", "attention.conv1d.kernel", "w o q"),
        Row("linear_attn.A_log", "q", "attention.A_log", "q"),
        Row("linear_attn.dt_bias", "q", "attention.dt_bias", "q"),
        Row("linear_attn.norm.weight", "q", "attention.norm.rms_norm.scale", "q"),
        Row("linear_attn.out_proj.weight", "k q", "attention.out_proj.kernel", "q k"),
    )
    return (
        *_norms("input_layernorm", "post_attention_layernorm"),
        *(attention if full else linear),
        *_gated("mlp.shared_expert", "mlp.shared_expert"),
        Row("mlp.gate.weight", "e k", "mlp.routed_experts.gate.kernel", "k e"),
        Row("mlp.shared_expert_gate.weight", "o k", "mlp.shared_expert_gate.kernel", "k o"),
    )


def _turn(slot: int, step: int, experts: str | None, rows: tuple[Row, ...], *, word: str = "layers") -> Stack:
    """One of the stacks of a model whose layers take turns: every `step`-th layer from `slot` on."""
    single = f"decoder.layers_{numbered(slot, step)}"
    return Stack(scanned=f"decoder.layers.{word}_{slot}", single=single, experts=experts, first=slot, step=step, rows=rows)


def _next_stacks() -> Iterator[Stack]:
    """Three layers in a row, stacked twice, and every fourth."""
    for place, first, run in (("local_layers", 0, 3), ("global_layer", 3, 1)):
        yield Stack(
            scanned=f"decoder.layers.{place}",
            single=f"decoder.layers_{numbered(first, 4, run)}",
            experts="mlp.routed_experts",
            rows=_next_rows(full=first == 3),
            first=first,
            step=4,
            run=run,
        )


def _llama4_stacks() -> Iterator[Stack]:
    """Llama 4: cycles of four layers, because every fourth has no rotary embedding; each second one, or each, has experts."""
    mixture = (
        *_gated("feed_forward.shared_expert", "Llama4MoEBlock_0.shared_experts"),
        Row("feed_forward.router.weight", "e k", "Llama4MoEBlock_0.MoeBlock_0.gate.kernel", "k e"),
    )
    for slot, sparse in itertools.product(range(4), (False, True)):
        steps = tuple(step for step in (1, 2, 4) if ((slot + 1) % step == 0) == sparse)
        rows = (*_norms(), *_attention("self_attention"), *(mixture if sparse else _gated("feed_forward", "mlp")))
        stack = _turn(slot, 4, "Llama4MoEBlock_0.MoeBlock_0" if sparse else None, rows)
        yield replace(stack, when=("interleave_moe_layer_step", steps))


def _norm(hf: str, maxtext: str) -> tuple[Row, ...]:
    """A norm with a bias."""
    return (Row(f"{hf}.weight", "k", f"{maxtext}.scale", "k"), Row(f"{hf}.bias", "k", f"{maxtext}.bias", "k"))


_SEEN = "vision_encoder.Llama4VisionModel_0"
_LLAMA4_VISION = Tree(
    outside=(
        Row("vision_model.class_embedding", "k", f"{_SEEN}.class_embedding", "k"),
        Row("vision_model.positional_embedding_vlm", "p k", f"{_SEEN}.positional_embedding_vlm", "p k"),
        Row(
            "vision_model.patch_embedding.linear.weight",
            "k p",
            f"{_SEEN}.Llama4UnfoldConvolution_0.vit_unfold_linear.kernel",
            "p k",
        ),
        *_norm("vision_model.layernorm_pre", f"{_SEEN}.layernorm_pre"),
        *_norm("vision_model.layernorm_post", f"{_SEEN}.layernorm_post"),
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
                *_norm("input_layernorm", "input_layer_norm"),
                *_norm("post_attention_layernorm", "post_attention_layer_norm"),
                *_attention("self_attention_vision", bias=True, shared="h"),
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


TREES: Mapping[str, tuple[Tree, ...]] = {
    "qwen3_moe": (
        Tree(
            stacks=(
                Stack(
                    scanned="decoder.layers",
                    single="decoder.layers_{l}",
                    experts="moe_block",
                    rows=(*_norms(), *_attention("self_attention"), *_QK_NORM, _ROUTER),
                ),
            )
        ),
    ),
    "deepseek_v2": (_DEEPSEEK,),
    "deepseek_v3": (_DEEPSEEK,),
    "gpt_oss": (Tree(stacks=tuple(_turn(slot, 2, "GptOssMlp", _GPT_OSS_ROWS) for slot in range(2))),),
    "qwen3_next": (
        Tree(stacks=tuple(_next_stacks())),
        Tree(stacks=tuple(_turn(slot, 4, "mlp.routed_experts", _next_rows(full=slot == 3), word="layer") for slot in range(4))),
    ),
    "llama4": (
        Tree(
            stacks=tuple(_llama4_stacks()),
            hf_experts="feed_forward.experts",
            wrapped="language_model.",
            vision=_LLAMA4_VISION,
        ),
    ),
}
"""By the name of the family: the tree that MaxText has now, which is written, and those that it had before, read only."""

COMPUTED: Mapping[str, str] = {
    "mixtral": "MaxText's Mixtral has the queries divided by the root of the head width, which would change values",
}
"""Families whose MaxText form is more than another layout."""
