"""MaxText's trees of Gemma 4 with experts and of DeepSeek-V4, whose layers it scans in blocks of several kinds.

In: nothing. Out: `GEMMA4`, `DEEPSEEK_V4`, in the language of `layouts.tables.maxtext`. It never looks at a checkpoint.

Of Gemma 4 five layers with a window and one without take turns. Layers without a window have heads of their own, and no values:
those are the keys (`attention_k_eq_v`). Source: MaxText `checkpoint_conversion/utils/param_mapping.py`, `models/gemma4.py`.

Of DeepSeek-V4 layers that compress much (128) and little (4) take turns, behind some that are not stacked: these find experts
by token (`tid2eid`). Source: `param_mapping.py` (`DEEPSEEK_V4_*`), `models/deepseek4.py`, `layers/attention_compressed.py`,
`layers/mhc.py`; the names that transformers 5.24 saves, its `conversion_mapping.py` read backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from layouts.language.sections import Sections
from layouts.tables.maxtext import HEADS, ONES, ROOT, Row, Stack, Tree
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
        Row(f"{_TOWER}.std_scale", "k", f"{_SEEN}.std_scale", "k"),
        Row(f"{_TOWER}.std_bias", "k", f"{_SEEN}.std_bias", "k"),
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
    only=(("standardize", (True,), "scales and biases of what it has seen"),),
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
    for place, slot, run, own in (
        ("local_layers", 0, 5, attention("self_attention")),
        ("global_layer", 5, 1, (_QUERIES, _KEYS, _OUT)),
    ):
        yield Stack(
            scanned=f"decoder.scanned_blocks.{place}",
            single="decoder.layers_{n}",
            experts=f"{_MOE}.MoeBlock_0",
            rows=(*own, *_LAYER),
            slot=slot,
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


def _connections(hf: str, place: str) -> tuple[Row, ...]:
    """Of what goes past attention or experts: three matrices behind one another, and what is added to and multiplied with each.

    The last one is of `w` rows times `w`, so that what is added to it is a matrix as well.
    """
    at = f"{place}.{{t:pre,post,res}}"
    return (
        Row(f"{hf}_fn", "u m", f"{at}_alpha", "m u", sections=Sections("1: w | w | w w")),
        Row(f"{hf}_base", "(u z)", f"{at}_beta", "(u z) | (u z) | u z", sections=Sections("1: 1 | 1 | w")),
        Row(f"{hf}_scale", "u", f"{at}_alpha_scale", "u", sections=Sections("1: 1 | 1 | 1")),
        Row(f"{hf}_fn{ONES}", "m", f"{place}.mhc_norm.scale", "m", computed="unit-scale"),
    )


def _compressor(hf: str, place: str) -> tuple[Row, ...]:
    return (
        Row(f"{hf}.ape", "a p", f"{place}.position_bias", "a p"),
        Row(f"{hf}.norm.weight", "p", f"{place}.kv_norm.scale", "p"),
        Row(f"{hf}.wgate.weight", "p k", f"{place}.gate_proj.kernel", "k p"),
        Row(f"{hf}.wkv.weight", "p k", f"{place}.kv_proj.kernel", "k p"),
    )


_SELF = "self_attention"
_LITTLE = (
    *_compressor("attn.compressor", f"{_SELF}.csa_compressor"),
    *_compressor("attn.indexer.compressor", f"{_SELF}.csa_compressor.indexer"),
    Row("attn.indexer.weights_proj.weight", "x k", f"{_SELF}.csa_compressor.indexer.weights_proj.kernel", "k x"),
    Row("attn.indexer.wq_b.weight", "q r", f"{_SELF}.csa_compressor.indexer.q_proj.kernel", "r q"),
)
_COMPRESSED = {0: (), 4: _LITTLE, 128: _compressor("attn.compressor", f"{_SELF}.hca_compressor")}
"""By how many tokens become one; their words in transformers are `_KINDS`."""
_KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_EXPERTS = "mlp.MoeBlock_0"
_BY_TOKEN = Row("ffn.gate.tid2eid", "v a", f"{_EXPERTS}.tid2eid", "v a", computed="float-table", aside="Tid2EidVar")
_BY_SCORE = Row("ffn.gate.bias", "e", f"{_EXPERTS}.gate.bias", "e", aside="MoEBiasVar")


def _layer(norm: str) -> tuple[Row, ...]:
    """What every layer has; `norm` is that of keys."""
    return (
        Row("attn_norm.weight", "k", "pre_self_attention_layer_norm.scale", "k"),
        Row("ffn_norm.weight", "k", "post_self_attention_layer_norm.scale", "k"),
        *_connections("hc_attn", "mhc_attention"),
        *_connections("hc_ffn", "mhc_mlp"),
        Row("attn.wq_a.weight", "r k", f"{_SELF}.wq_a.kernel", "k r"),
        Row("attn.q_norm.weight", "r", f"{_SELF}.q_norm.scale", "r"),
        Row("attn.wq_b.weight", "(h d) r", f"{_SELF}.wq_b.kernel", "r h d"),
        Row("attn.wkv.weight", "(j d) k", f"{_SELF}.wkv.kernel", "k j d"),
        Row(norm, "d", f"{_SELF}.kv_norm.scale", "d"),
        Row("attn.attn_sink", "h", f"{_SELF}.sinks", "h"),
        Row("attn.wo_a.weight", "(b o) i", f"{_SELF}.o_a_proj.kernel", "b i o"),
        Row("attn.wo_b.weight", "k q", f"{_SELF}.o_b_proj.kernel", "q k"),
        Row("ffn.gate.weight", "e k", f"{_EXPERTS}.gate.kernel", "k e"),
        Row("ffn.shared_experts.w1.weight", "f k", "mlp.shared_experts.wi_0.kernel", "k f"),
        Row("ffn.shared_experts.w3.weight", "f k", "mlp.shared_experts.wi_1.kernel", "k f"),
        Row("ffn.shared_experts.w2.weight", "k f", "mlp.shared_experts.wo.kernel", "f k"),
    )


def _deepseek_v4(kinds: Mapping[int, object], words: tuple[str, str], norm: str, outside: tuple[Row, ...], layers: str) -> Tree:
    """The tree by names in Hugging Face; `words` say how many layers find experts by token, and of which of `kinds` each is."""
    layer, (by_token, kind) = _layer(norm), words

    def stack(at: int, last: str, own: Row, scanned: str | None = None, **more: Any) -> Stack:
        rows, when = (*layer, *_COMPRESSED[at], own), (kind, (kinds[at],))
        single = "decoder.layers_{n}"
        return Stack(scanned=scanned, single=single, experts=_EXPERTS, rows=rows, last=last, when=when, hf=layers, **more)

    taking_turns = (
        stack(at, "num_hidden_layers", _BY_SCORE, f"decoder.scanned_blocks.layers_{slot}", first=by_token, slot=slot, step=2)
        for slot, at in enumerate((128, 4))
    )
    return Tree(
        stacks=(*(stack(at, by_token, _BY_TOKEN) for at in _COMPRESSED), *taking_turns),
        outside=(*outside, Row("head.weight", "v k", "decoder.logits_dense.kernel", "k v")),
        hf_experts="ffn.experts",
        heads=(*HEADS, ("w", "hc_mult"), ("z", "hc_mult"), ("b", "o_groups")),
        mtp=("mtp.",),
    )


def _around(embedding: str, norm: str, head: str) -> tuple[Row, ...]:
    return (
        Row(embedding, "v k", "token_embedder.embedding", "v k"),
        Row(norm, "k", "decoder.decoder_norm.scale", "k"),
        Row(f"{head}fn", "w m", "decoder.hc_head.hc_fn", "m w"),
        *(Row(f"{head}{word}", "o", f"decoder.hc_head.hc_{word}", "o") for word in ("base", "scale")),
    )


_PUBLISHED = _deepseek_v4(
    {at: at for at in _KINDS},
    ("num_hash_layers", "compress_ratios"),
    "attn.kv_norm.weight",
    _around("embed.weight", "norm.weight", "hc_head_"),
    "layers",
)
_SAVED = _deepseek_v4(
    _KINDS,
    ("mlp_layer_types=hash_moe", "layer_types"),
    "attn.norm.weight",
    _around("model.embed_tokens.weight", "model.norm.weight", "model.hc_head.hc_"),
    "model.layers",
)
DEEPSEEK_V4 = tuple(
    replace(tree, names=names, aside=aside)
    for tree, names in ((_PUBLISHED, ""), (_SAVED, "transformers"))
    for aside in (ROOT, "params.{}.", "nnx_aux.model.")
)
"""As it is published, and as transformers 5.24 saves it; what is not trained lies where it does of DeepSeek-V3."""
