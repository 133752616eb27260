"""Which tensor of the base each tensor of an adapter belongs to; each one of the adapter has one, or there is an error.

In: the descriptions of both. Out: sites. It never reads data, and never pairs by shape: shapes only refute.

A module may have another name in the library than in the base. `_PREFIXES` lists the differences; one rule has to fit all
modules of the adapter. Sources: transformers `base_model_prefix`, `_checkpoint_conversion_mapping` (4.52 to 5.24).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layouts.adapters.describe import Description
from layouts.adapters.forms import DOWN, GATE_UP, Form
from layouts.adapters.merging.plain import Plain
from layouts.adapters.merging.product import FLOATS
from layouts.adapters.merging.sites import Site, Term, check_pattern
from layouts.adapters.units import Block, Unit
from layouts.errors import InputError, PlanError
from layouts.language.pattern import Pattern
from layouts.language.template import Template
from layouts.matching.describe import Description as Model
from layouts.matching.group import Group
from layouts.reader import Reader

_PREFIXES: tuple[tuple[tuple[str, str], ...], ...] = (
    (),
    (("", "model."),),  # trained without its head (AutoModel)
    (("model.language_model.", "language_model.model."), ("model.", ""), ("lm_head", "language_model.lm_head")),  # LLaVA's way
    (("model.language_model.", "model."), ("model.visual.", "visual.")),  # Qwen2-VL's way
    (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head")),  # trained before 4.52
)
"""Beginnings of modules: in the adapter -> in the base; the first that fits a name is taken."""
_ROLES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "gate": ("wi", (0,)),
    "up": ("wi", (1,)),
    GATE_UP: ("wi", (0, 1)),
    DOWN: ("wo", (0,)),
}
"""Projection -> role in the base, and its numbers among gate and up."""
_AXES = {"wi": ("k", "n"), "wo": ("n", "k")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The open base with its description, and the beginnings of names that differ."""

    reader: Reader
    model: Model
    prefixes: tuple[tuple[str, str], ...] = ()

    def named(self, module: str) -> str:
        """A module of the adapter as the base calls it."""
        old, new = next((each for each in self.prefixes if module.startswith(each[0])), ("", ""))
        return new + module[len(old) :]

    def groups(self, module: str) -> list[Group]:
        """The weights of the experts of a module; a family may have two words for the module they are in."""
        template = Template(self.model.family.experts)
        at = template.parse(module) or template.parse(module.removesuffix(".experts"))
        if at is None:
            return []
        weights = [group for group in self.model.groups if group.part == ""]
        same = [group for group in weights if group.index == at]
        return same or [group for group in weights if _place(group.index) == _place(at)]

    def tensor(self, plain: Plain) -> str | None:
        """The tensor that something beside the experts changes."""
        name = self.named(plain.name)
        words = {name, name.replace(".mlp.", ".block_sparse_moe.") if "block_sparse_moe" in self.model.family.experts else name}
        found = [word for word in words if word in self.reader.tensors]
        return found[0] if len(found) == 1 else None


def _place(index: Mapping[str, Any]) -> dict[str, Any]:
    return {slot: at for slot, at in index.items() if slot != "moe"}


def pair(base: Reader, model: Model, adapter: Description, plains: tuple[Plain, ...], *, turns: bool) -> dict[str, Site]:
    """Every tensor of the base that changes.

    Raises:
        PlanError: a module that the base does not have, a quantised weight, a layout of stacked layers.
        InputError: shapes that do not fit.
    """
    found = _fitting(base, model, adapter, plains)
    sites: dict[str, Site] = {}
    for block in adapter.blocks:
        for name, unit in block.units.items():
            for site in _experts(found, adapter.form, block, name, unit, turns=turns):
                sites[site.name] = _joined(sites.get(site.name), site, base)
    for plain in plains:
        site = _plain(found, plain)
        sites[site.name] = _joined(sites.get(site.name), site, base)
    _check_tied(base, plains)
    return sites


def _fitting(reader: Reader, model: Model, adapter: Description, plains: tuple[Plain, ...]) -> Base:
    """The base with the one rule that fits all modules."""
    lost: list[str] = []
    for prefixes in _PREFIXES:
        base = Base(reader=reader, model=model, prefixes=prefixes)
        missing = [f"{_module(block)}.experts" for block in adapter.blocks if not base.groups(base.named(_experts_of(block)))]
        missing += [plain.name for plain in plains if base.tensor(plain) is None]
        if not missing:
            return base
        lost = lost or missing
    quantised = next((group for group in model.groups if group.part), None)
    hint = f"; if it is quantised ({quantised.names[0]}), dequantise it first (--dequantize=bf16)" if quantised else ""
    raise PlanError(
        f"{reader.path} has no {lost[0]}, for which the adapter has weights ({len(lost)} such){hint}; is it of another model?"
    )


def _module(block: Block) -> str:
    return block.path.removeprefix("base_model.model.")


def _experts_of(block: Block) -> str:
    return f"{_module(block)}.experts"


def _experts(base: Base, form: Form, block: Block, name: str, unit: Unit, *, turns: bool) -> Iterator[Site]:
    role, numbers = _ROLES[name]
    groups = [group for group in base.groups(base.named(_experts_of(block))) if group.role == role]
    if not groups:
        raise PlanError(
            f"{base.reader.path}: the {name} projection of {_experts_of(block)} is quantised, or not there; dequantise the "
            "base first (--dequantize=bf16)"
        )
    for group in groups:
        axes = _AXES[role]
        half = unit.o // 2
        rows_of_one = half if name == GATE_UP else unit.o
        _check_group(base.reader, group, unit, rows_of_one, f"{_experts_of(block)} ({name})")
        rows = {0: (0, 1), 1: (half, 1)} if not turns else {0: (0, 2), 1: (1, 2)}
        terms = {g: Term(form=form, unit=unit) for g in numbers}
        if name == GATE_UP:
            terms = {g: Term(form=form, unit=unit, first=rows[g][0], step=rows[g][1]) for g in numbers}
        for tensor in group.names:
            index = group.placed.key.parse(tensor) or {}
            mine = {g: term for g, term in terms.items() if index.get("g", g) == g}
            if mine:
                yield Site(name=tensor, pattern=group.placed.pattern, sizes=group.sizes, axes=axes, index=index, terms=mine)


def _check_group(reader: Reader, group: Group, unit: Unit, rows: int, what: str) -> None:
    """The base's weights are of the adapter's shape, `rows` of it in each projection, in a layout that can be computed."""
    axes = _AXES[group.role]
    inner, outer = map(group.total, axes)
    if (group.sizes["e"], inner, outer) != (unit.experts, unit.i, rows):
        raise InputError(
            f"{what} has A and B of {unit.experts} experts, {unit.i} in and {rows} out, and {group.names[0]} of "
            f"{reader.path} is of {group.sizes['e']} experts, {inner} in and {outer} out; is it an adapter of another model?"
        )
    if why := check_pattern(group.placed.pattern, axes, {**group.index, "e": 0, "g": 0}):
        raise PlanError(f"{reader.path}: {group.names[0]}: {why}; split it first")


def _plain(base: Base, plain: Plain) -> Site:
    """One weight matrix, or a tensor that takes another's place."""
    name = base.tensor(plain)
    assert name is not None
    have = base.reader.tensors[name].shape
    if plain.shape != have:
        raise InputError(
            f"{plain.source} is for {name} of shape {plain.shape}, which in {base.reader.path} is {have}; is it an adapter of "
            "another model?"
        )
    if plain.term is None:
        sizes = {f"d{at}": size for at, size in enumerate(have)}
        return Site(name=name, pattern=Pattern(" ".join(sizes)), sizes=sizes, instead=plain.source)
    sizes = {"n": have[0], "k": have[1]}
    return Site(name=name, pattern=Pattern("n k"), sizes=sizes, terms={0: plain.term})


def _joined(before: Site | None, site: Site, base: Reader) -> Site:
    """Gate and up of one tensor, or a whole tensor with an update on top of it."""
    if (dtype := base.tensors[site.name].dtype) not in FLOATS:
        raise PlanError(
            f"{base.path}: {site.name} is {dtype}, and weights are merged in {', '.join(FLOATS)} only; dequantise the base "
            "first (--dequantize=bf16)"
        )
    if before is None:
        return site
    if before.terms.keys() & site.terms.keys() or (before.instead and site.instead):
        raise InputError(f"{base.path}: the adapter has two updates for {site.name}")
    whole = site if site.terms else before
    return Site(
        name=site.name,
        pattern=whole.pattern,
        sizes=whole.sizes,
        axes=whole.axes,
        index=whole.index,
        terms={**before.terms, **site.terms},
        instead=before.instead or site.instead,
    )


def _check_tied(base: Reader, plains: tuple[Plain, ...]) -> None:
    """Embeddings that are the head as well cannot change alone."""
    configs = [config for config in (base.config, base.config.get("text_config")) if isinstance(config, Mapping)]
    tied = any(config.get("tie_word_embeddings") is True for config in configs)
    tied = tied or not any(name.endswith("lm_head.weight") for name in base.tensors)
    names = [plain.name for plain in plains if plain.name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if tied and names:
        raise PlanError(
            f"{base.path}: its embeddings are its head as well (tie_word_embeddings), and the adapter changes {names[0]}, "
            "which would change both; merge it with PEFT, into a model whose weights are not tied"
        )
