"""The table of MaxText's trees, in the language of `layouts.tables.maxtext`; one entry per family serves both directions.

In: nothing. Out: `TREES`. It never looks at a checkpoint. Rows that several models share are in `layouts.tables.maxtext_rows`,
vision encoders in `layouts.tables.maxtext_vision`.

Source: MaxText `checkpoint_conversion/utils/param_mapping.py` (which maps names one by one, with functions for the axes); for
Llama 4, which is not in it, `checkpoint_conversion/standalone_scripts/llama4_ckpt_unscanned.py` and `models/llama4.py`. That
models of MaxText 0.2.5 compute with these trees what transformers computes, `tests/clients/test_maxtext.py` shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

from layouts.tables.maxtext import HEADS, MTP, Row, Stack, Tree
from layouts.tables.maxtext_blocks import DEEPSEEK_V4, GEMMA4
from layouts.tables.maxtext_rows import APART, DELTA_NET, JOINED, LATENT, QK_NORM, attention, gated, hybrid, norms, scaled
from layouts.tables.maxtext_vision import LLAMA4_VISION, QWEN3_5, QWEN3_OMNI, QWEN3_VL

_DEEPSEEK_MOE = "DeepSeekMoeBlock_0.MoeBlock_0"
_DEEPSEEK_ROWS = (
    *norms(),
    *LATENT,
    *gated("mlp.shared_experts", "DeepSeekMoeBlock_0.shared_experts"),
    Row("mlp.gate.weight", "e k", f"{_DEEPSEEK_MOE}.gate.kernel", "k e"),
    Row("mlp.gate.e_score_correction_bias", "e", f"{_DEEPSEEK_MOE}.gate.bias", "e", optional=True, aside="MoEBiasVar"),
)
_BLOCK = "mtp_{m}_transformer_layer."
_DEEPSEEK_MTP = Stack(
    scanned=None,
    single=f"{MTP}.mtp_layer_{{m}}",
    experts=_BLOCK + _DEEPSEEK_MOE,
    first="num_hidden_layers",
    copies="num_nextn_predict_layers",
    rows=(
        Row("enorm.weight", "k", "mtp_{m}_embedding_norm.scale", "k"),
        Row("hnorm.weight", "k", "mtp_{m}_hidden_state_norm.scale", "k"),
        Row("eh_proj.weight", "k i", "mtp_{m}_projection.kernel", "i k"),
        Row("shared_head.norm.weight", "k", "mtp_{m}_final_norm.scale", "k"),
        Row("embed_tokens.weight", "v k", "token_embedder.embedding", "v k", twin=True),
        Row("shared_head.head.weight", "v k", "decoder.logits_dense.kernel", "k v", twin=True),
        *(replace(row, maxtext=_BLOCK + row.maxtext) for row in _DEEPSEEK_ROWS),
    ),
)
"""MaxText `layers/multi_token_prediction.py`: the embedding comes first in `eh_proj`, as in vLLM's `deepseek_mtp.py`."""
_DEEPSEEK = Tree(
    wrapped=("", "language_model."),  # Kimi K2.5
    stacks=(
        Stack(
            scanned="decoder.dense_layers",
            single="decoder.dense_layers_{l}",
            experts=None,
            last="first_k_dense_replace",
            rows=(*norms(), *LATENT, *gated("mlp", "mlp")),
        ),
        Stack(
            scanned="decoder.moe_layers",
            single="decoder.moe_layers_{l}",
            experts=_DEEPSEEK_MOE,
            first="first_k_dense_replace",
            rows=_DEEPSEEK_ROWS,
        ),
        _DEEPSEEK_MTP,
    ),
    only=(("moe_layer_freq", (1,), "experts in every layer after the dense ones"),),
)
_DEEPSEEK_V3 = (
    _DEEPSEEK,
    replace(_DEEPSEEK, aside="params.{}."),
    replace(_DEEPSEEK, aside="nnx_aux.model."),
    replace(_DEEPSEEK, aside_along=True),
)
"""MaxText 0.2.5 does not train the biases of routers (`MoEBiasVar` in its `layers/moe.py`), and stacks what it does not train
along the first axis. Below `ROOT` all of its loaders find them (`_alias_legacy_collections` of `common/checkpointing.py`;
`from_pretrained` of `utils/model_creation_utils.py` looks nowhere else). The second is the tree that its own converter writes,
the third what it saves of a training run; in the last one, from before 0.2.5, they are parameters like all else.
"""
_ALL_SPARSE: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("mlp_only_layers", ([],), "experts in every layer"),
    ("decoder_sparse_step", (1,), "experts in every layer"),
)
"""Sources: transformers `modeling_qwen3_moe.py`, `modeling_qwen3_next.py`; MaxText `models/qwen3.py` has no other layer."""
_ROUTER = Row("mlp.gate.weight", "e k", "moe_block.gate.kernel", "k e")
_QWEN3 = Tree(
    stacks=(
        Stack(
            scanned="decoder.layers",
            single="decoder.layers_{l}",
            experts="moe_block",
            rows=(*norms(), *attention("self_attention"), *QK_NORM, _ROUTER),
        ),
    ),
    only=_ALL_SPARSE,
)
_MIXTRAL = Tree(
    stacks=(
        Stack(
            scanned="decoder.layers",
            single="decoder.layers_{l}",
            experts="MoeBlock_0",
            rows=(
                *norms(),
                *attention("self_attention", computed="query-scale"),
                Row("block_sparse_moe.gate.weight", "e k", "MoeBlock_0.gate.kernel", "k e"),
            ),
        ),
    ),
    hf_experts="block_sparse_moe.experts",
)
_GPT_OSS_ROWS = (
    *norms(),
    *attention("GptOssAttention", bias=True),
    Row("self_attn.sinks", "h", "GptOssAttention.sinks", "h"),
    Row("mlp.router.weight", "e k", "GptOssMlp.gate.kernel", "k e"),
    Row("mlp.router.bias", "e", "GptOssMlp.gate.bias", "e"),
)


def _turn(slot: int, step: int, experts: str | None, rows: tuple[Row, ...], *, word: str = "layers") -> Stack:
    """One of the stacks of a model whose layers take turns: every `step`-th layer from `slot` on."""
    scanned = f"decoder.layers.{word}_{slot}"
    return Stack(scanned=scanned, single="decoder.layers_{n}", experts=experts, slot=slot, step=step, rows=rows)


def _next_stacks() -> Iterator[Stack]:
    """Three layers in a row, stacked twice, and every fourth."""
    for place, slot, run in (("local_layers", 0, 3), ("global_layer", 3, 1)):
        yield Stack(
            scanned=f"decoder.layers.{place}",
            single="decoder.layers_{n}",
            experts="mlp.routed_experts",
            rows=hybrid(full=slot == 3),
            slot=slot,
            step=4,
            run=run,
        )


def _cycle(projections: tuple[Row, ...]) -> tuple[Stack, ...]:
    """The same four layers, each a stack of its own."""
    rows = (hybrid(full=slot == 3, projections=projections) for slot in range(4))
    return tuple(_turn(slot, 4, "mlp.routed_experts", each, word="layer") for slot, each in enumerate(rows))


def _llama4_stacks() -> Iterator[Stack]:
    """Llama 4: cycles of four layers, because every fourth has no rotary embedding; each second one, or each, has experts."""
    mixture = (
        *gated("feed_forward.shared_expert", "Llama4MoEBlock_0.shared_experts"),
        Row("feed_forward.router.weight", "e k", "Llama4MoEBlock_0.MoeBlock_0.gate.kernel", "k e"),
    )
    for slot, sparse in itertools.product(range(4), (False, True)):
        steps = tuple(step for step in (1, 2, 4) if ((slot + 1) % step == 0) == sparse)
        rows = (*norms(), *attention("self_attention"), *(mixture if sparse else gated("feed_forward", "mlp")))
        stack = _turn(slot, 4, "Llama4MoEBlock_0.MoeBlock_0" if sparse else None, rows)
        yield replace(stack, when=("interleave_moe_layer_step", steps))


TREES: Mapping[str, tuple[Tree, ...]] = {
    "qwen3_moe": (_QWEN3,),
    "qwen3_vl_moe": (replace(_QWEN3, wrapped=("model.", "model.language_model."), encoders=QWEN3_VL),),
    "qwen3_omni_moe": (replace(_QWEN3, wrapped=("", "thinker."), within="thinker_config", encoders=QWEN3_OMNI),),
    "mixtral": (_MIXTRAL,),
    "gemma4": (GEMMA4,),
    "deepseek_v2": (_DEEPSEEK,),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v4": DEEPSEEK_V4,
    "gpt_oss": (Tree(stacks=tuple(_turn(slot, 2, "GptOssMlp", _GPT_OSS_ROWS) for slot in range(2))),),
    "qwen3_next": (
        Tree(stacks=tuple(_next_stacks()), only=_ALL_SPARSE, mtp=("mtp.",)),
        Tree(stacks=_cycle(JOINED), only=_ALL_SPARSE),
    ),
    "qwen3_5_moe": (
        Tree(
            stacks=tuple(replace(stack, rows=scaled(stack.rows)) for stack in _cycle(APART)),
            scales=True,
            wrapped=("model.", "model.language_model."),
            encoders=QWEN3_5,
            heads=(*HEADS, *DELTA_NET),
            only=(
                ("model_type", ("qwen3_5_moe", "qwen3_5_moe_text"), "the layers of Qwen3.5"),
                ("full_attention_interval", (4,), "full attention in every fourth layer"),
                *_ALL_SPARSE,
            ),
            mtp=("mtp.",),
        ),
    ),
    "llama4": (
        Tree(
            stacks=tuple(_llama4_stacks()),
            hf_experts="feed_forward.experts",
            wrapped=("", "language_model."),
            encoders=(("vision_config", LLAMA4_VISION),),
        ),
    ),
}
"""By the name of the family: the tree that MaxText has now, which is written, and those that it had before, read only."""
