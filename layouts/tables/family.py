"""What a row of the table of models says, and the short ways to say it.

In: nothing. Out: `Family`, and what the rows of `families_apart` and `families_fused` are written with. It never looks at a
checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from layouts.language.layout import OPEN, Layouts, located
from layouts.language.parts import is_in_first
from layouts.language.pattern import Pattern
from layouts.language.template import Template
from layouts.tables.natives import (
    AUTOMODEL,
    FC,
    FLAT,
    FUSED,
    FUSED_BELOW,
    FUSED_IN_OUT,
    LINEAR,
    MLX,
    PER_EXPERT,
    PER_EXPERT_BELOW,
    PER_EXPERT_HELD,
    PER_EXPERT_W1V1,
    PER_EXPERT_W123,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family: its names in `config.json`, where its experts are, and how they are stored when nobody re-laid them."""

    name: str
    experts: str
    native: tuple[Layouts, ...]
    model_types: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    unfused: tuple[Layouts, ...] = (PER_EXPERT,)
    """What quantisers save whatever the family publishes: they take the experts apart into modules of three projections."""
    transformers: Layouts | None = None
    """What transformers 5 loads, where that is not its fused form at the place of the experts."""
    banks: str | None = None
    """The word of `config.json` for how many banks of experts there are, where layers share them: `{l}` is that of a bank."""
    changed_in: int | None = None
    """The major version of transformers since which the second native layout stands under the keys of the first."""
    format: str = "hf"
    """`orbax` for trees that are told by their structure, `hf` for families that `config.json` names."""
    scan_axis: int = 1
    """The axis along which MaxText stacks layers (its `param_scan_axis`), if it does."""

    first: int = 0
    """How many experts of the first kind a layer has, if it has several kinds and `config.json` was read."""

    @property
    def by_structure(self) -> bool:
        """Whether its trees are told by their structure, as MaxText's are, and not by `config.json`."""
        return self.format == "orbax"

    @property
    def by_names(self) -> bool:
        """Whether no `config.json` names it: the names of its experts have one meaning, whatever the model is."""
        return not self.model_types and not self.by_structure

    @property
    def kinds(self) -> int:
        """How many kinds of experts a layer has, each a block of its own with its own sizes."""
        return Template(self.experts).choices.get("kind", 1)

    @property
    def is_open(self) -> bool:
        """Whether it takes a look at `config.json` to know which expert of a name is of which kind."""
        return any(OPEN in layout.key for table in self.native for layout in table.values())

    def filled(self, first: int) -> Family:
        """This family with so many experts of the first kind."""
        told = replace(self, first=first)
        return replace(told, native=tuple(map(told.own, self.native)))

    def own(self, table: Layouts) -> Layouts:
        """A layout as this family has it: at the place of its experts, and with the number of them that it leaves open."""
        own = located(table, self.experts)
        return {role: layout.filled(self.first) for role, layout in own.items()} if self.first else own

    @property
    def both_ways(self) -> bool:
        """Whether its checkpoints come as [out, in] and as [in, out], so that sizes are worth a look."""
        return len({is_in_first(Pattern(table["wi"].pattern), "wi") for table in self.native}) > 1

    @property
    def stored(self) -> tuple[Layouts, ...]:
        """All layouts that its checkpoints come in: the native ones, then what quantisers and trainers make of them."""
        others = () if self.by_structure else (*self.unfused, AUTOMODEL, self.own(MLX))
        return (*self.native, *(table for table in others if table not in self.native))


MLP = "{path}.{l}.mlp.experts"
SPARSE = "{path}.{l}.{moe:block_sparse_moe,mlp}.experts"
FEED = "{path}.{l}.feed_forward.experts"
BARE = "{path}.{l}.experts"
ANYWHERE = "{path}.{l}.{within:?}experts"
_APART = {id(LINEAR): (PER_EXPERT_BELOW,), id(FLAT): (PER_EXPERT, PER_EXPERT_HELD, PER_EXPERT_W1V1)}
"""By how a family is published fused: what others make of it, where that is not one module for each expert and projection."""


def per_expert(
    name: str, *aliases: str, experts: str = MLP, others: tuple[str, ...] = (), mlx: Layouts | None = None
) -> Family:
    """A family with one matrix for each expert and projection, as most are published; `mlx` is how MLX has it, if otherwise."""
    unfused = (PER_EXPERT, mlx) if mlx else (PER_EXPERT,)
    return Family(
        name=name, model_types=(name, *aliases), experts=experts, native=(PER_EXPERT, FUSED), others=others, unfused=unfused
    )


def w123(name: str, *aliases: str, experts: str = SPARSE) -> Family:
    """The same with Mixtral's words: w1 is gate, w3 is up, w2 is down."""
    return Family(name=name, model_types=(name, *aliases), experts=experts, native=(PER_EXPERT_W123, FUSED))


def fused(
    name: str,
    *aliases: str,
    experts: str = MLP,
    native: Layouts = FUSED,
    others: tuple[str, ...] = (),
    mlx: Layouts | None = None,
) -> Family:
    """A family that is published with gate and up in one tensor, and that transformers loads as it is published.

    transformers may hold it under other names than it publishes; `mlx` is how MLX does, where the place does not tell.
    """
    also = {id(FC): (FUSED_IN_OUT,), id(LINEAR): (FUSED_BELOW,)}.get(id(native), ())
    return Family(
        name=name,
        model_types=(name, *aliases),
        experts=experts,
        native=(native, *also),
        others=others,
        unfused=(*_APART.get(id(native), (PER_EXPERT,)), *([mlx] if mlx else [])),
        transformers=native,
    )
