"""The table of models: where each family keeps its experts, and in which layouts.

In: nothing. Out: `FAMILIES`. It never looks at a checkpoint.

One entry says it all, in the language of `layouts.language`. `experts` is the place of the experts. `native` are the layouts
that published checkpoints have; `--split` writes the first one if nothing is known of the original. `others` are tensors that
look like experts and are none.

Sources: transformers 5.23 `modeling_*.py` and `conversion_mapping.py`, published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layouts.language.layout import Layouts
from layouts.tables.natives import (
    FC,
    FLAT,
    FUSED,
    FUSED_BELOW,
    FUSED_IN_MLP,
    FUSED_IN_OUT,
    FUSED_INTERLEAVED,
    LINEAR,
    MAXTEXT,
    MAXTEXT_AXIS_0,
    PER_EXPERT,
    PER_EXPERT_W123,
    STACKED,
    UP_FIRST,
    W13_INTERLEAVED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family: its names in `config.json`, where its experts are, and how they are stored when nobody re-laid them."""

    name: str
    experts: str
    native: tuple[Layouts, ...]
    model_types: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    transformers: Layouts | None = None
    """What transformers 5 loads, where that is not its fused form at the place of the experts."""
    changed_in: int | None = None
    """The major version of transformers since which the second native layout stands under the keys of the first."""
    format: str = "hf"
    """`orbax` for trees that are told by their structure, `hf` for families that `config.json` names."""
    scan_axis: int = 1
    """The axis along which MaxText stacks layers (its `param_scan_axis`), if it does."""

    @property
    def by_structure(self) -> bool:
        """Whether its trees are told by their structure, as MaxText's are, and not by `config.json`."""
        return self.format == "orbax"


_MLP = "{path}.{l}.mlp.experts"
_SPARSE = "{path}.{l}.{moe:block_sparse_moe,mlp}.experts"
_FEED = "{path}.{l}.feed_forward.experts"
_BARE = "{path}.{l}.experts"
_MAXTEXT_BIASES = ("{path}.wi_{g:0,1}_bias", "{path}.wo_bias")
"""They stay apart there, whatever the weights are."""


def _per_expert(name: str, *aliases: str, experts: str = _MLP, others: tuple[str, ...] = ()) -> Family:
    """A family with one matrix for each expert and projection, as most are published."""
    return Family(name=name, model_types=(name, *aliases), experts=experts, native=(PER_EXPERT, FUSED), others=others)


def _w123(name: str, *aliases: str, experts: str = _SPARSE) -> Family:
    """The same with Mixtral's words: w1 is gate, w3 is up, w2 is down."""
    return Family(name=name, model_types=(name, *aliases), experts=experts, native=(PER_EXPERT_W123, FUSED))


def _fused(name: str, *aliases: str, experts: str = _MLP, native: Layouts = FUSED, others: tuple[str, ...] = ()) -> Family:
    """A family that is published with gate and up in one tensor, and that transformers loads as it is published.

    Quantised ones are often split into single experts; transformers may hold it under other names than it publishes.
    """
    also = {id(FC): (FUSED_IN_OUT,), id(LINEAR): (FUSED_BELOW,), id(FLAT): ()}.get(id(native), (PER_EXPERT,))
    types = (name, *aliases)
    return Family(name=name, model_types=types, experts=experts, native=(native, *also), others=others, transformers=native)


FAMILIES: tuple[Family, ...] = (
    _per_expert("qwen2_moe"),
    _per_expert("qwen3_moe"),
    _per_expert("qwen3_next"),
    _per_expert("qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen3_omni_moe_talker"),
    _per_expert("olmoe"),
    _per_expert("flex_olmo"),
    _per_expert("deepseek_v2", "deepseek_ocr2"),
    _per_expert("deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25"),
    _per_expert("glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm_moe_dsa", "glm5_next", "glm5_next_text"),
    _per_expert("dots1", "dots3_note", "dots3_note_text", others=("vision_encoder.{rest}",)),
    _per_expert("ernie4_5_moe", "ernie4_5_vl_moe", "ernie4_5_moe_vl"),
    _per_expert("hunyuan_v1_moe", "hy_v3"),
    _per_expert("longcat_flash"),
    _per_expert("bailing_moe", "bailing_moe_v2", "bailing_hybrid"),
    _per_expert("afmoe"),
    _per_expert("jamba", experts=_FEED),
    _per_expert("exaone_moe"),
    _per_expert("cohere2_moe"),
    _per_expert("solar_open"),
    _per_expert("mellum"),
    _per_expert("mimo_v2", "mimo_v2_flash"),
    _per_expert("laguna", others=("{path}.{l}.mlp.experts.e_score_correction_bias",)),
    _per_expert("axk1", "axk2"),
    _per_expert("beam"),
    _per_expert("flint"),
    _per_expert("kolibri", "kolibri1", experts="{path}.{l}.{moe:mlp,moe}.experts"),
    _per_expert("klear", "Klear"),
    _per_expert("unlimited_ocr"),
    _w123("mixtral"),
    _w123("phimoe"),
    _w123(
        "minimax",
        "minimax_m1",
        "minimax_text_01",
        "MiniMaxM1",
        "MiniMaxText01",
        "minimax_m2",
        "minimax_m3_vl",
        "minimax_m3_vl_text",
    ),
    _w123("kimi_linear"),
    _w123("arctic"),
    _w123("lfm2_moe", experts=_FEED),
    _w123("deepseek_v4", experts="{path}.{l}.{moe:ffn,mlp}.experts"),
    Family(
        name="mistral_large4",
        model_types=("mistral_large4", "mistral_large4_text"),
        experts=_BARE,
        native=(PER_EXPERT_W123, FUSED, FUSED_IN_MLP),
    ),
    Family(
        name="qwen3_5_moe",
        model_types=("qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "qwen4_exp_text"),
        experts=_MLP,
        native=(FUSED, PER_EXPERT),
    ),
    Family(
        name="qwen3_vl_moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        experts=_MLP,
        native=(FUSED_IN_OUT, FUSED),
        changed_in=5,
    ),
    Family(name="hunyuan", model_types=("hunyuan",), experts=_MLP, native=(UP_FIRST,)),
    Family(
        name="step3p5",
        model_types=("step3p5", "step3p7"),
        experts="{path}.{l}.moe",
        native=(STACKED, FUSED_IN_MLP),
        transformers=FUSED_IN_MLP,
    ),
    Family(
        name="inkling",
        model_types=("inkling_mm_model", "inkling_text", "inkling2", "inkling2_text"),
        experts=_MLP,
        native=(W13_INTERLEAVED, FUSED),
    ),
    _fused("gemma4", "gemma4_text", "diffusion_gemma", experts=_BARE),
    _fused("hy_v4"),
    _fused("zaya"),
    _fused("mistral4"),
    _fused("muse_spark", "muse_spark_text", others=("{path}.{l}.mlp.experts.post_expert_norm.weight",)),
    _fused("granitemoe_swa", experts=_SPARSE),
    _fused("granitemoe", "granitemoeshared", "granitemoehybrid", experts="{path}.{l}.block_sparse_moe", native=LINEAR),
    _fused("jetmoe", experts="{path}.{l}.mlp", native=LINEAR, others=("{path}.{l}.self_attention.experts.{rest}",)),
    _fused("llama4", "llama4_text", experts=_FEED, native=FUSED_IN_OUT),
    _fused("aria", "aria_text", native=FC),
    _fused("openai_privacy_filter", native=FUSED_IN_OUT),
    _fused("gpt_oss", native=FUSED_INTERLEAVED),
    _fused("dbrx", experts="{path}.{l}.ffn.experts", native=FLAT),
    Family(name="maxtext", experts="{path}", native=(MAXTEXT,), others=_MAXTEXT_BIASES, format="orbax"),
    Family(
        name="maxtext-axis-0", experts="{path}", native=(MAXTEXT_AXIS_0,), others=_MAXTEXT_BIASES, format="orbax", scan_axis=0
    ),
)


def families_of(format: str) -> list[Family]:  # noqa: A002
    """The families of one format."""
    return [family for family in FAMILIES if family.format == format]


def maxtext(scan_axis: int | None = None) -> Family:
    """MaxText's trees whose layers are stacked along this axis; by default along MaxText's own."""
    wanted = 1 if scan_axis is None else scan_axis
    return next(family for family in FAMILIES if family.by_structure and family.scan_axis == wanted)


NOT_GATED: Mapping[str, str] = {
    "nemotron_h": "experts of an up and a down projection (relu squared)",
    "switch_transformers": "experts of wi and wo",
    "nllb-moe": "experts of fc1 and fc2",
    "doge": "experts that are rows of an embedding",
    "phi-msft": "experts of fc1 and fc2",
}
"""Model types whose experts have no gate, and what they have."""
