"""The language of `layouts.tables.maxtext_trees`: for each tensor of a model its name and axes in Hugging Face and in MaxText.

In: nothing. Out: `Row`, `Stack`, `Tree`. It knows no model.

A row is read in both directions. MaxText stacks the layers of a `Stack` into one array whose second axis is the layer (its
`param_scan_axis`), or has one subtree per layer when they are not scanned; the patterns here are those of one layer. Experts
are not in the rows: the tables of families and targets have them.

Axes: `k` embed, `v` vocabulary, `h` query heads, `j` key/value heads (`u` in layers without a window), `x` heads of an
indexer, `d` head width, `f` dense or shared mlp, `e` expert, others as the rows use them. An axis in a name, as
`{q:query,key,value}`, is several tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from layouts.language.sections import Sections
from layouts.language.template import Template

LAYERS = ("l", "p")
"""The axes of layers: a stack's steps, and the run of layers in each, if there are several."""
ROOT = "params.params."
"""Where a training checkpoint of MaxText has its weights."""
MTP = "mtp_block"
"""And below it, its blocks that predict further tokens."""
PLACES = ("decoder.", "token_embedder.", f"{MTP}.", "vision_encoder.", "audio_encoder.")
"""And all that a model consists of."""

LORA_APART, LORA_FUSED = Template("{path}.wi_{g:0,1}_lora_{s:a,b}"), Template("{path}.wi_lora_{s:a,b}")
LORA_DOWN = Template("{path}.wo_lora_{s:a,b}")
"""What qwix calls A and B of a projection of experts, beside its weight or alone.

Source: qwix 0.1.8 `_src/providers/lora.py`; MaxText 0.2.5 `common/checkpointing.py`, which saves them, their moments and no
weights (`_filter_lora_trainable_state`).
"""

_EMBED = ("fsdp", "fsdp_transpose", "context", "context_usp_ulysses", "expert")
_WIDE = ("tensor", "tensor_sequence", "autoregressive")
SHARDED: Mapping[str, tuple[str, ...]] = {
    "e": ("expert",),
    **dict.fromkeys(("n", "f"), ("fsdp_transpose", *_WIDE)),
    **dict.fromkeys(("h", "j", "u", "x", "v"), _WIDE),
    **dict.fromkeys(("k", "r"), _EMBED),
}
"""By which axes of its mesh MaxText cuts an axis of a weight: the first in this order has them. `r` is that of latent queries.

Source: MaxText `configs/base.yml` (`logical_axis_rules`), and the `kernel_axes` of its layers.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """What MaxText has otherwise than a checkpoint: `said` says it. `word` is the user's, who has to want it.

    It has the values of a tensor over the root of the size of `axis`, or `times` it. Or it has them in the second of two
    element `types`, where only values that both have are converted. Or it has `ones` that no checkpoint has: the table calls
    such a tensor by the name of one that there is, with `ONES` behind it, and it is as long as the last dimension of that one
    and of its type.
    """

    said: str
    word: str
    axis: str = ""
    times: bool = False
    types: tuple[str, str] | None = None
    ones: bool = False

    def factor(self, size: int, *, to_maxtext: bool) -> float:
        """By what values are multiplied on the way there, or back, where the axis has this size."""
        return math.sqrt(size) if self.times == to_maxtext else 1 / math.sqrt(size)


ONES, EXACT = ".ones", "exact-values"
RULES: Mapping[str, Rule] = {
    "query-scale": Rule("the queries divided by the root of the head width", "query-scale", axis="d"),
    "embedding-scale": Rule("the embedding times the root of the embed width", "embedding-scale", axis="k", times=True),
    "float-table": Rule("the table of experts by token (tid2eid) as float32", EXACT, types=("I64", "F32")),
    "unit-scale": Rule("scales of mhc_norm, which are ones that no checkpoint has", EXACT, ones=True),
}
"""What is computed on the way to MaxText; the user's word for it is that of `--compute`.

Source: MaxText `param_mapping.py`, `scale_query_layer`, and of Gemma 4 `pad_hf_embedding_layer`. Its `layers/attentions.py`
multiplies queries by nothing afterwards, nor its decoder the embedding of a token, which is also the head. Of DeepSeek-V4
`mhc_dummy_norm` there, and `Tid2EidVar` in `layers/moe.py`, which makes integers of the table again.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor: key and pattern in Hugging Face, key and pattern in MaxText. An `optional` one may be absent.

    A `twin` is in Hugging Face only: it holds once more what `maxtext` is, which stands outside the layers. The values of a
    `computed` one are others in MaxText, by this one of `RULES`. With `sections`, one side has several tensors of what the
    other has as one: `{t:qkv,z}` in its key, `u` on both sides (see `layouts.language.sections`). `a | a | b` are patterns of
    MaxText's tensors, one for each, where these differ.

    A `grid` is one of scales, a number for each block of a quantised weight: there if `config.json` says how large blocks are.
    Of its axes, these letters are widths that `config.json` has, counted in blocks here.
    One `aside` is a variable of this kind, which MaxText does not train: `Tree.aside` says where it lies.
    """

    hf: str
    hf_axes: str
    maxtext: str
    maxtext_axes: str
    optional: bool = False
    twin: bool = False
    computed: str = ""
    sections: Sections | None = None
    grid: str | None = None
    aside: str = ""

    @property
    def parts(self) -> tuple[str, ...]:
        """The patterns of MaxText's tensors, where it has several that differ in them."""
        several = self.maxtext_axes.split(" | ")
        return tuple(several) if len(several) > 1 else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Of the layers from `first` up to `last` (before it) every `step`-th from `slot` on, by the words of `config.json`.

    `hf` is where Hugging Face has layers, `scanned` the subtree of all of them, `single` that of layer `{l}`, counted within
    the stack, or `{n}`, as Hugging Face counts. MaxText never stacks layers without `scanned`. With `run`, each step is of so
    many layers in a row, which are stacked once more, on an axis `p` behind `l`. Where a word is a list in `config.json`, its
    length counts, or of `a=b` how often `b` is in the list `a`.

    The stack is there if the word `when` has one of these values. If that is a list, it says for each layer what kind it is:
    all of the stack should be of these, and of layers that are not stacked, it has those that are.

    With `copies`, a word of `config.json`, there are so many layers from `first` on, each with a subtree of its own: `{m}` in
    MaxText's names counts them from 1. Each is there as a whole, or not at all (transformers leaves MTP blocks out).
    """

    scanned: str | None
    single: str
    experts: str | None
    rows: tuple[Row, ...]
    first: int | str = 0
    slot: int = 0
    step: int = 1
    run: int = 1
    last: str = "num_hidden_layers"
    when: tuple[str, tuple[object, ...]] | None = None
    copies: str | None = None
    hf: str = "model.layers"


HEADS = (("h", "num_attention_heads"), ("j", "num_key_value_heads"), ("x", "index_n_heads"))
"""Axes of heads with their words in `config.json`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A model: what stands outside the layers, and its stacks of layers. `hf_experts` is the place of experts in a layer.

    A multimodal model has the words for its text under `text_config`, where names that begin with the first text of `wrapped`
    begin with the second, and those of its `encoders` under the words given here, all of it in the part `within`, if that is
    there. `heads` are the axes whose sizes `config.json` has to give, because a shape does not tell a head from its width;
    the last word that says one counts, and `a.*.b` is the word `b` of all that is under `a`.
    Below `aside`, where `{}` is their kind, are variables that MaxText does not train, their layers stacked along the first
    axis, whatever its `param_scan_axis` is; with `aside_along`, along that one.
    `mtp` are places of blocks that predict further tokens, which `--drop-mtp` leaves out besides those of stacks with `copies`.
    `only` are words of `config.json`, their values in models that MaxText has, and what these models have; where the word is
    absent, it is one of these. With `scales`, those of quantised experts have a place, too. `names` is what records call the
    names that it has in Hugging Face, if models of this family come with others as well.
    """

    stacks: tuple[Stack, ...]
    hf_experts: str = "mlp.experts"
    outside: tuple[Row, ...] = (
        Row("model.embed_tokens.weight", "v k", "token_embedder.embedding", "v k"),
        Row("model.norm.weight", "k", "decoder.decoder_norm.scale", "k"),
        Row("lm_head.weight", "v k", "decoder.logits_dense.kernel", "k v", optional=True),
    )
    wrapped: tuple[str, str] = ("", "")
    within: str = ""
    encoders: tuple[tuple[str, Tree], ...] = ()
    heads: tuple[tuple[str, str], ...] = HEADS
    aside: str = ROOT
    aside_along: bool = False
    mtp: tuple[str, ...] = ()
    only: tuple[tuple[str, tuple[object, ...], str], ...] = ()
    scales: bool = False
    names: str = ""
