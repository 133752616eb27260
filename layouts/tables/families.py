"""The table of models: where each family keeps its experts, and in which layouts.

In: nothing. Out: `FAMILIES`. It never looks at a checkpoint.

One entry says it all, in the language of `layouts.language`. `experts` is the place of the experts. `native` are the layouts
that published checkpoints have; `--split` writes the first one if nothing is known of the original. `others` are tensors that
look like experts and are none. The rows are in two modules, by what is published: `families_apart` has single experts,
`families_fused` the rest; here are those that no `config.json` names.
"""

from __future__ import annotations

from collections.abc import Mapping

from layouts.language.layout import Layouts, located
from layouts.tables.families_apart import APART
from layouts.tables.families_fused import TOGETHER
from layouts.tables.family import ANYWHERE, Family
from layouts.tables.natives import MAXTEXT, MAXTEXT_AXIS_0, MLX, PER_EXPERT, PER_EXPERT_W123, SOURCES

__all__ = ["FAMILIES", "NOT_GATED", "Family", "families_of", "maxtext", "name_of"]

_MAXTEXT_BIASES = ("{path}.wi_{g:0,1}_bias", "{path}.wo_bias")
"""They stay apart there, whatever the weights are."""

FAMILIES: tuple[Family, ...] = (
    *APART,
    *TOGETHER,
    # Told by their names alone: these words have one meaning in every model that we know. Sources for two that publish their
    # code with the weights alone: Megrez 2, sii-research/InnoMegrez2 demo/vllm/megrez_moe.py; TeleChat3-MoE, mindformers
    # telechat3/utils.py, and ms-swift, which takes it as DeepSeek-V3.
    Family(name="per-expert", experts=ANYWHERE, native=(PER_EXPERT,)),
    Family(name="per-expert-w123", experts=ANYWHERE, native=(PER_EXPERT_W123,), unfused=()),
    Family(name="mlx", experts=ANYWHERE, native=(located(MLX, ANYWHERE),), unfused=()),  # mlx-lm `SwitchGLU`, `SwitchLinear`
    Family(name="maxtext", experts="{path}", native=(MAXTEXT,), others=_MAXTEXT_BIASES, format="orbax"),
    Family(
        name="maxtext-axis-0", experts="{path}", native=(MAXTEXT_AXIS_0,), others=_MAXTEXT_BIASES, format="orbax", scan_axis=0
    ),
)


def families_of(format: str) -> list[Family]:  # noqa: A002
    """The families of one format."""
    return [family for family in FAMILIES if family.format == format]


def name_of(layouts: Layouts, family: Family) -> str | None:
    """What `SOURCES` calls these layouts of a family."""
    return next((name for name, table in SOURCES.items() if layouts in (table, family.own(table))), None)


def maxtext(scan_axis: int | None = None) -> Family:
    """MaxText's trees whose layers are stacked along this axis; by default along MaxText's own."""
    wanted = 1 if scan_axis is None else scan_axis
    return next(family for family in FAMILIES if family.by_structure and family.scan_axis == wanted)


_SQUARED = "experts of an up and a down projection (relu squared)"
NOT_GATED: Mapping[str, str] = {
    "nemotron_h": _SQUARED,
    "nemotron_h_omni": _SQUARED,
    "nemotron_h_puzzle": _SQUARED,
    "nemo_speechlm": _SQUARED,
    "vitpose_backbone": "experts that are one matrix each",
    "nomic_bert": "experts of w1 and w2",
    "switch_transformers": "experts of wi and wo",
    "nllb-moe": "experts of fc1 and fc2",
    "doge": "experts that are rows of an embedding",
    "phi-msft": "experts of fc1 and fc2",
}
"""Model types whose experts have no gate, and what they have."""
