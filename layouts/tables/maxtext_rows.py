"""Rows that several of MaxText's trees share: attention of each kind, norms, MLPs that are not routed.

In: names of modules, where these differ. Out: rows in the language of `layouts.tables.maxtext`. It names no model.

Source: that of `layouts.tables.maxtext_trees`.
"""

from __future__ import annotations

from dataclasses import replace

from layouts.language.sections import Sections
from layouts.tables.maxtext import Row


def attention(place: str, *, bias: bool = False, shared: str = "j", out: str = "o_proj", computed: str = "") -> tuple[Row, ...]:
    """Grouped-query attention: q, k and v by head, and the projection back. `shared` are the heads of k and v.

    The values of queries are `computed` by this one of `layouts.tables.maxtext.RULES`.
    """
    projections = (("q_proj", "query", "h"), ("k_proj", "key", shared), ("v_proj", "value", shared))
    rows = [Row(f"self_attn.{q}.weight", f"({h} d) k", f"{place}.{name}.kernel", f"k {h} d") for q, name, h in projections]
    rows[0] = replace(rows[0], computed=computed)
    rows.append(Row(f"self_attn.{out}.weight", "k (h d)", f"{place}.out.kernel", "h d k"))
    if bias:
        rows += [Row(f"self_attn.{q}.bias", f"({h} d)", f"{place}.{name}.bias", f"{h} d") for q, name, h in projections]
        rows.append(Row(f"self_attn.{out}.bias", "k", f"{place}.out.bias", "k"))
    return tuple(rows)


def gated(hf: str, maxtext: str) -> tuple[Row, ...]:
    """A gated MLP that is not routed: a dense layer, or a shared expert."""
    return (
        Row(f"{hf}.gate_proj.weight", "f k", f"{maxtext}.wi_0.kernel", "k f"),
        Row(f"{hf}.up_proj.weight", "f k", f"{maxtext}.wi_1.kernel", "k f"),
        Row(f"{hf}.down_proj.weight", "k f", f"{maxtext}.wo.kernel", "f k"),
    )


def norms(before: str = "pre_self_attention_layer_norm", after: str = "post_self_attention_layer_norm") -> tuple[Row, ...]:
    """The norms of a layer: before attention, and after it."""
    return (
        Row("input_layernorm.weight", "k", f"{before}.scale", "k"),
        Row("post_attention_layernorm.weight", "k", f"{after}.scale", "k"),
    )


def norm(hf: str, maxtext: str) -> tuple[Row, ...]:
    """A norm with a bias."""
    return (Row(f"{hf}.weight", "k", f"{maxtext}.scale", "k"), Row(f"{hf}.bias", "k", f"{maxtext}.bias", "k"))


_QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_{t:qkv,z}", "out_proj", "gate_proj", "up_proj", "down_proj")


def scaled(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """These rows, and beside each weight that may be FP8 its scales, one for a block: MaxText has no others quantised.

    Source: MaxText 0.2.5 `param_mapping.py` (`is_quantized`), `layers/linears.py` (`kernel_scale`); it keeps them as they are.
    """
    weights = [row for row in rows if row.hf.split(".")[-2] in _QUANTISED]
    grids = (
        replace(row, hf=f"{row.hf}_scale_inv", maxtext=f"{row.maxtext}_scale", optional=True, grid="my" if row.sections else "")
        for row in weights
    )
    return (*rows, *grids)


def linear(hf: str, maxtext: str) -> tuple[Row, ...]:
    """A linear layer with a bias."""
    return (Row(f"{hf}.weight", "o k", f"{maxtext}.kernel", "k o"), Row(f"{hf}.bias", "o", f"{maxtext}.bias", "o"))


QK_NORM = (
    Row("self_attn.q_norm.weight", "d", "self_attention.query_norm.scale", "d"),
    Row("self_attn.k_norm.weight", "d", "self_attention.key_norm.scale", "d"),
)
"""Norms of queries and keys by head."""
LATENT = (
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
    Row("self_attn.indexer.weights_proj.weight", "x k", "self_attention.indexer.weights_proj.kernel", "k x", optional=True),
    Row("self_attn.indexer.wq_b.weight", "(x d) r", "self_attention.indexer.wq_b.kernel", "r x d", optional=True),
    Row("self_attn.indexer.wk.weight", "i k", "self_attention.indexer.wk.kernel", "k i", optional=True),
)
"""Latent attention, with an indexer or without."""
JOINED = (
    Row("linear_attn.in_proj_qkvz.weight", "q k", "attention.in_proj_qkvz.kernel", "k q"),
    Row("linear_attn.in_proj_ba.weight", "q k", "attention.in_proj_ba.kernel", "k q"),
)
APART = (
    Row(
        "linear_attn.in_proj_{t:qkv,z}.weight",
        "u k",
        "attention.in_proj_qkvz.kernel",
        "k u",
        sections=Sections("a: a m + a m + b y | b y"),
    ),
    Row("linear_attn.in_proj_{t:b,a}.weight", "u k", "attention.in_proj_ba.kernel", "k u", sections=Sections("a: b | b")),
)
"""What a gated delta net projects to: as MaxText has it, and as several tensors (MaxText `concat_qkvz_and_transpose`)."""
DELTA_NET = (
    ("a", "linear_num_key_heads"),
    ("b", "linear_num_value_heads"),
    ("m", "linear_key_head_dim"),
    ("y", "linear_value_head_dim"),
)
"""The sizes that its sections take."""


def hybrid(*, full: bool, projections: tuple[Row, ...] = JOINED) -> tuple[Row, ...]:
    """A layer with full attention, or with a gated delta net of these projections; and experts, one of them shared."""
    full_rows = (
        # With a gate: two for each head.
        Row("self_attn.q_proj.weight", "(h q) k", "attention.attention.query.kernel", "k h q"),
        *attention("attention.attention")[1:3],
        Row("self_attn.o_proj.weight", "k q", "attention.attention.out.kernel", "q k"),
        Row("self_attn.q_norm.weight", "d", "attention.attention.query_norm.scale", "d"),
        Row("self_attn.k_norm.weight", "d", "attention.attention.key_norm.scale", "d"),
    )
    linear_rows = (
        *projections,
        Row("linear_attn.conv1d.weight", "q o w", "attention.conv1d.kernel", "w o q"),
        Row("linear_attn.A_log", "q", "attention.A_log", "q"),
        Row("linear_attn.dt_bias", "q", "attention.dt_bias", "q"),
        Row("linear_attn.norm.weight", "q", "attention.norm.rms_norm.scale", "q"),
        Row("linear_attn.out_proj.weight", "k q", "attention.out_proj.kernel", "q k"),
    )
    return (
        *norms("input_layernorm", "post_attention_layernorm"),
        *(full_rows if full else linear_rows),
        *gated("mlp.shared_expert", "mlp.shared_expert"),
        Row("mlp.gate.weight", "e k", "mlp.routed_experts.gate.kernel", "k e"),
        Row("mlp.shared_expert_gate.weight", "o k", "mlp.shared_expert_gate.kernel", "k o"),
    )
