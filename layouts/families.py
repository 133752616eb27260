"""The table of models: where each family keeps its expert weights.

One entry says it all, in the language of `layouts.pattern`: `experts` is the place of the experts, and a layout gives the key
and the axes of each role below that place. Roles and their logical axes:

    wi   gate (`g` = 0, `wi_0`) and up (`g` = 1, `wi_1`) projections   e k g n
    wo   down projection                                              e n k

Sources: transformers 5.23 `modeling_*.py` and `conversion_mapping.py`; MaxText `layers/moe.py`. `nn.Linear` stores [out, in].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from layouts.errors import PlanError
from layouts.pattern import Pattern, Template

ROLES: Mapping[str, frozenset[str]] = {"wi": frozenset("ekgn"), "wo": frozenset("enk")}
"""Every role with the axes that its key and its pattern must hold between them."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one role is stored: a key template and an axis pattern. `{experts}` stands for the family's place of experts."""

    key: str
    pattern: str

    def place(self, experts: str) -> Placed:
        """This layout below a place, ready to parse and render."""
        return Placed(Template(self.key.replace("{experts}", experts)), Pattern(self.pattern))


@dataclass(frozen=True, slots=True)
class Placed:
    """A layout with its full key."""

    key: Template
    pattern: Pattern


Layouts = Mapping[str, Layout]
"""A complete layout of a MoE block: one `Layout` per role."""


def layouts(*, wi: tuple[str, str], wo: tuple[str, str]) -> Layouts:
    """Build and check one row: each logical axis of a role is held exactly once, by the key or by the pattern.

    Raises:
        ValueError: an axis is missing, held twice, or unknown.
    """
    table = {"wi": Layout(*wi), "wo": Layout(*wo)}
    for role, layout in table.items():
        axes = [*Template(layout.key.replace("{experts}", "")).slots, *Pattern(layout.pattern).axes]
        if sorted(set(axes) - {"..."}) != sorted(ROLES[role]) or len(axes) != len(set(axes)):
            raise ValueError(f"{role} needs each of {sorted(ROLES[role])} once, {layout} has {axes}")
    return table


PER_EXPERT = layouts(
    wi=("{experts}.{e}.{g:gate_proj,up_proj}.weight", "n k"),
    wo=("{experts}.{e}.down_proj.weight", "k n"),
)
PER_EXPERT_W123 = layouts(
    wi=("{experts}.{e}.{g:w1,w3}.weight", "n k"),
    wo=("{experts}.{e}.w2.weight", "k n"),
)
MAXTEXT = layouts(
    wi=("{experts}.wi_{g:0,1}", "e ... k n"),
    wo=("{experts}.wo", "e ... n k"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family: its `config.json` names, where its experts are, and how it stores them when nobody fused them."""

    name: str
    experts: str
    native: Layouts
    model_types: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """`orbax` for trees that are told by their structure, `hf` for families that `config.json` names."""
        return "hf" if self.model_types else "orbax"


_MLP = "model.layers.{l}.mlp.experts"

FAMILIES: tuple[Family, ...] = (
    Family(
        name="mixtral",
        model_types=("mixtral",),
        experts="model.layers.{l}.block_sparse_moe.experts",
        native=PER_EXPERT_W123,
    ),
    Family(name="qwen2_moe", model_types=("qwen2_moe",), experts=_MLP, native=PER_EXPERT),
    Family(name="qwen3_moe", model_types=("qwen3_moe",), experts=_MLP, native=PER_EXPERT),
    Family(name="olmoe", model_types=("olmoe",), experts=_MLP, native=PER_EXPERT),
    Family(name="deepseek_v3", model_types=("deepseek_v3", "kimi_k2"), experts=_MLP, native=PER_EXPERT),
    Family(name="glm4_moe", model_types=("glm4_moe", "glm4_moe_lite"), experts=_MLP, native=PER_EXPERT),
    Family(name="maxtext", experts="{path}", native=MAXTEXT),
)

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""The names under which `config.json` gives the number of experts, a cross-check of what the tensors say."""


def find_family(
    model_type: object,
    names: Sequence[str],
    *,
    where: Path,
    format: str,  # noqa: A002
    override: str | None = None,
) -> Family:
    """The family called `override`, else `model_type`; `describe` checks that the names agree with it.

    Raises:
        PlanError: no such family; says what was seen, and the nearest known one by word or else by the names of the experts.
    """
    known = {alias: f for f in FAMILIES if f.format == format for alias in (f.name, *f.model_types)}
    wanted = override or model_type
    if isinstance(wanted, str) and wanted in known:
        return known[wanted]
    seen = f"model_type {wanted!r} in config.json is" if wanted else "config.json names no model_type, so this is"
    if override:
        seen = f"{override!r} is"
    near = get_close_matches(str(wanted), known, n=1) or [family.name for family in fitting(names, format)]
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise PlanError(
        f"{where}: {seen} no known MoE family{hint}. Known: {', '.join(sorted(known))}. If it stores its experts as one of "
        f"these does, say so with --family; first tensors: {', '.join(sorted(names)[:3])}"
    )


def fitting(names: Iterable[str], format: str) -> list[Family]:  # noqa: A002
    """The families whose table knows some of these names as experts, for hints in messages; never to choose one."""
    found = {f.name: [layout.place(f.experts).key for layout in f.native.values()] for f in FAMILIES if f.format == format}
    hits = {name: keys for name, keys in found.items() if any(key.parse(n) is not None for n in names for key in keys)}
    return [family for family in FAMILIES if family.name in hits]


def expert_count(config: Mapping[str, Any]) -> int | None:
    """The number of experts that `config.json` states, if it states one."""
    found = [config[key] for key in EXPERT_COUNTS if type(config.get(key)) is int and config[key] > 0]
    return found[0] if found else None
