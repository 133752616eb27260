"""The table of target layouts: what kernels and loaders want `wi` and `wo` to be.

In: a target's name, a family, options. Out: the layouts of `wi` and `wo`. It never looks at a checkpoint.

A target is one line; `{experts}` is where the family keeps its experts, `...` the scan axes, if it has any. `{shards}`,
`{align}`, `{block}` and `{pad}` are the user's; `{pad}` is `%` and `{align}` where the user says it, and else nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from layouts.language.layout import Layout, Layouts, layouts
from layouts.language.parts import only
from layouts.tables.families import Family
from layouts.tables.natives import FUSED, MAXTEXT_PART

_WO = ("{experts}.wo{part}", "e ... n k")
_W2 = ("{experts}.w2_{part}", "e k n")

TARGETS: Mapping[str, Layouts] = {
    # MaxText CONCAT, jax.lax.ragged_dot, megablox: wi (E, K, 2N) gate first, wo (E, N, K)
    "concat": layouts(wi=("{experts}.wi{part}", "e ... k (g n)"), wo=_WO),
    # transformers 5: gate_up_proj (E, 2N, K), down_proj (E, K, N)
    "transformers": FUSED,
    # vLLM FusedMoE and CUTLASS MoEGEMM: w13 (E, 2N, K), w2 (E, K, N); column-major B, expert stride 2N*K
    "vllm": layouts(wi=("{experts}.w13_{part}", "e (g n) k"), wo=_W2),
    "cutlass": layouts(wi=("{experts}.w13_{part}", "e (g n) k"), wo=_W2),
    # FlashInfer's gated GEMM: as vLLM, up first
    "flashinfer": layouts(wi=("{experts}.w13_{part}", "e (-g n) k"), wo=_W2),
    # FlashInfer's CuteDSL MoE on Blackwell: 64 rows of up and 64 of gate in turn (vLLM, TensorRT-LLM and its tests)
    "cutedsl": layouts(wi=("{experts}.w13_{part}", "e (c -g n={block}) k"), wo=_W2),
    # a row of gate and a row of up in turn, as Inkling is published
    "interleaved-rows": layouts(wi=("{experts}.w13_{part}", "e (n g) k"), wo=_W2),
    # gpt-oss: gate and up in turn
    "interleaved": layouts(wi=("{experts}.wi{part}", "e ... k (n g)"), wo=_WO),
    # Megatron and TransformerEngine: gate and up in turn, 32 columns each; the same with 64
    "glu32": layouts(wi=("{experts}.wi{part}", "e ... k (c g n=32)"), wo=_WO),
    "glu64": layouts(wi=("{experts}.wi{part}", "e ... k (c g n=64)"), wo=_WO),
    # the same with any number
    "glu": layouts(wi=("{experts}.wi{part}", "e ... k (c g n={block})"), wo=_WO),
    # tpu-inference GMM_TP, MaxText and Tunix PER_SHARD_INTERLEAVE: each shard has its own gate and up, padded; wo is not
    "per-shard": layouts(wi=("{experts}.wi{part}", "e ... k (s={shards} g n%{align})"), wo=_WO),
    # Tunix lane interleave: gate and up in turn inside each shard, 128 columns each, padded if that is asked for
    "lane": layouts(wi=("{experts}.wi{part}", "e ... k (s={shards} c g n=128{pad})"), wo=_WO),
    # tpu-inference GMM_EP: as concat, each half padded
    "gmm-ep": layouts(wi=("{experts}.wi{part}", "e ... k (g n%128)"), wo=_WO),
    # tpu-inference FUSED_MOE: w13 (E, 2, K', N'), w2 (E, N', K')
    "fused-moe": layouts(
        wi=("{experts}.w13{part}", "e g k%256 n%256"),
        wo=("{experts}.w2{part}", "e n%256 k%256"),
    ),
}

LOADED_BY: Mapping[str, tuple[str, str]] = {
    "concat": ("orbax", "MaxText, as a tree (CONCAT)"),
    "transformers": ("hf", "transformers 5"),
    "per-shard": ("orbax", "MaxText, as a tree (PER_SHARD_INTERLEAVE, --align maxtext)"),
}
"""Targets with the format and the program that loads such a checkpoint as it is."""
TAKEN_BY: Mapping[str, str] = {
    "concat": "jax.lax.ragged_dot, megablox",
    "vllm": "vLLM (processed w13, w2)",
    "cutlass": "CUTLASS MoEGEMM",
    "flashinfer": "FlashInfer's gated GEMM",
    "cutedsl": "FlashInfer's CuteDSL MoE",
    "interleaved": "kernels of gpt-oss",
    "glu32": "Megatron, TransformerEngine",
    "glu": "Megatron, TransformerEngine, with --glu-block 32",
    "per-shard": "tpu-inference GMM_TP, Tunix",
    "lane": "Tunix lane interleave",
    "gmm-ep": "tpu-inference GMM_EP",
    "fused-moe": "tpu-inference FUSED_MOE",
}
"""Targets with who takes them as processed parameters, put there by your own code: their loaders read unfused files."""

ALIGNMENTS: Mapping[str, str] = {"maxtext": "256", "maxtext-pow2": "maxtext"}
"""Words for `{align}`, and what patterns and records say for them.

MaxText 0.2.5 pads N to the next multiple of 256 x S, which is 256 columns for each shard where S divides N; where it does not,
MaxText cannot cut either. Before, it took powers of two: records say `n%maxtext` for that, and go on meaning it. Source:
MaxText `integration/vllm/convert_utils.py`, `compute_padded_moe_mlp_dim` and `_interleave_moe_weights`.
"""

VERSION = 1
"""Written beside a target's name in every output; it grows when the meaning of a name changes."""

TAKE_SCALARS = frozenset(TARGETS) - {"transformers"}
"""Targets whose consumer takes one scale for gate and one for up, (E, 2)."""


IN_MAXTEXT = frozenset(name for name, table in TARGETS.items() if table["wi"].key == "{experts}.wi{part}")
"""Targets that a MaxText tree has a place for: it calls its fused leaf `wi`, (E, ..., K, columns), whatever the columns are."""


ALIGN = 128
"""To which multiple columns are padded where nobody says to which, in a layout that is always padded."""
BLOCK = 64
"""Columns of gate that stand together before as many of up, where nobody says how many."""


def target(name: str, family: Family, *, shards: int, align: int | str | None, block: int = BLOCK) -> Layouts:
    """A target as this family and these options make it."""
    table = (family.transformers if name == "transformers" else None) or TARGETS[name]
    to = ALIGNMENTS.get(str(align), str(align or ALIGN))
    words = {"{shards}": str(shards), "{align}": to, "{block}": str(block), "{pad}": f"%{to}" if align else ""}
    words |= {} if family.scan_axis else {"e ...": "... e"}
    keys = {role: only(layout.key, MAXTEXT_PART) if family.by_structure else layout.key for role, layout in table.items()}
    return {role: Layout(keys[role], _fill(layout.pattern, words)) for role, layout in table.items()}


def _fill(text: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text
