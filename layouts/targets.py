"""The table of target layouts: what kernels and loaders want `wi` and `wo` to be.

A target is one line; `{experts}` is where the family keeps its experts and `...` the scan axes, if it has any.
"""

from __future__ import annotations

from collections.abc import Mapping

from layouts.families import Layouts, layouts

TARGETS: Mapping[str, Layouts] = {
    # MaxText CONCAT, jax.lax.ragged_dot, megablox: wi (E, K, 2N) gate first, wo (E, N, K)
    "concat": layouts(wi=("{experts}.wi", "e ... k (g n)"), wo=("{experts}.wo", "e ... n k")),
    # transformers 5, vLLM w13 / w2, CUTLASS MoEGEMM: gate_up_proj (E, 2N, K), down_proj (E, K, N)
    "transformers": layouts(wi=("{experts}.gate_up_proj", "e ... (g n) k"), wo=("{experts}.down_proj", "e ... k n")),
}

DEFAULT = "concat"
VERSION = 1
"""Written beside a target's name in every output; it grows when the meaning of a name changes."""

UNMARKED: Mapping[str, str] = {"hf": "transformers"}
"""The target that a fused checkpoint without our record is in, for formats where one producer owns its keys."""
