"""The table of forms: how writers of LoRA adapters store A and B of each expert.

In: nothing. Out: `FORMS`. It never looks at a file.

One neutral form stands between all others. For each block of experts and each projection it has `A` (e, r, i) and `B`
(e, o, r): A reads the input of the GEMM, B writes its output, and W[e] gains scale * B[e] @ A[e]. A row gives the key, and the
axes in the shape of what a file calls `lora_A` and `lora_B`; where a writer exchanged the roles, `lora_A` is B.

Sources: PEFT 0.17 to 0.21.2 `tuners/lora/layer.py` (ParamWrapper), unsloth_zoo `moe_utils.py`, Megatron-Bridge
`peft_bridge.py`, SGLang `lora/mem_pool.py`, vLLM `lora/model_manager.py`, NeMo AutoModel 36044ad `_peft/lora_experts.py` (x @ A
@ B, gate first).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from layouts.language.pattern import Pattern
from layouts.language.template import Template

SIDES = ("A", "B")
AXES: Mapping[str, tuple[str, ...]] = {"A": ("e", "r", "i"), "B": ("e", "o", "r")}
"""The axes of the neutral form."""
GATE_UP, DOWN = "gate_up", "down"
_APART, _FUSED, _WRAPPED = ("gate", "up", DOWN), (GATE_UP, DOWN), ("inner", "outer")
SLOTS: Mapping[str, str] = {
    "words": "{p:gate_proj,up_proj,down_proj}",
    "w123": "{p:w1,w3,w2}",
    "fused": "{p:gate_up_proj,down_proj}",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A row. `key` has `{path}` before the module of the experts, `{p}` the projection, `{s}` the side in the file's words.

    `units` are the projections that the words of `{p}` stand for; those of PEFT's wrappers are `inner` and `outer`, and
    shapes tell which is which. `stored` has, for `lora_A` and `lora_B`, the side that it really is, and the axes of its shape.
    """

    name: str
    key: str
    units: tuple[str, ...]
    stored: tuple[tuple[str, str], tuple[str, str]]
    text: str

    @property
    def template(self) -> Template:
        """The key, ready to parse and render."""
        return _template(self.key)

    @property
    def per_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return "{e}" in self.key

    @property
    def wrapped(self) -> bool:
        """Whether names do not say which projection it is."""
        return self.units == _WRAPPED

    @property
    def of_parameters(self) -> bool:
        """Whether no module of a name is the projection: then patterns of settings name the parameter, as `gate_up_proj`."""
        return self.key.index(".lora") < self.key.index("{p:") or self.wrapped

    def word(self, unit: str) -> str:
        """What the module of a projection is called in patterns."""
        if self.of_parameters:
            return f"{unit}_proj"
        return self.template.bind("p", self.units.index(unit)).text.rpartition(".lora_")[0].rpartition(".")[2]

    @property
    def fused(self) -> bool:
        """Whether gate and up are one projection."""
        return "gate" not in self.units

    @property
    def rank(self) -> int:
        """Dimensions of a tensor."""
        return len(_pattern(self.stored[0][1]).groups)

    @property
    def reversed(self) -> bool:
        """Whether what is called `lora_A` is B."""
        return self.stored[0][0] == "B"

    @property
    def grouped(self) -> bool:
        """Whether the columns of B have the expert outermost (`e * r + j`)."""
        return any(text.endswith("(e r)") for _, text in self.stored)

    def pattern(self, side: str) -> tuple[str, Pattern]:
        """The side that a tensor of this name really is, and its axes."""
        real, text = self.stored[SIDES.index(side)]
        return real, _pattern(text)


_template, _pattern = cache(Template), cache(Pattern)
"""A file has hundreds of thousands of names."""


def _per_expert(name: str, slot: str, units: tuple[str, ...], text: str) -> Form:
    key = f"{{path}}.experts.{{e}}.{SLOTS[slot]}.lora_{{s:A,B}}.weight"
    return Form(name=name, key=key, units=units, stored=(("A", "r i"), ("B", "o r")), text=text)


def _stacked(name: str, slot: str, units: tuple[str, ...], text: str) -> Form:
    key = f"{{path}}.experts.{SLOTS[slot]}.lora_{{s:A,B}}.weight"
    return Form(name=name, key=key, units=units, stored=(("A", "e r i"), ("B", "e o r")), text=text)


def _packed(name: str, one: tuple[str, str], other: tuple[str, str], text: str) -> Form:
    key = "{path}.experts.{p:base_layer.lora,lora}_{s:A,B}.weight"
    return Form(name=name, key=key, units=_WRAPPED, stored=(one, other), text=text)


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        _per_expert("per-expert", "words", _APART, "PEFT with transformers 4; vLLM, SGLang"),
        _per_expert("per-expert-w123", "w123", _APART, "the same with Mixtral's words"),
        _per_expert("per-expert-fused", "fused", _FUSED, "mcore_bridge (ms-swift 4)"),
        _packed("packed", ("A", "(e r) i"), ("B", "o (r e)"), "PEFT >= 0.19.1 target_parameters"),
        _packed("packed-reversed", ("B", "(e r) o"), ("A", "i (r e)"), "PEFT <= 0.18.1 target_parameters"),
        _packed("packed-grouped", ("A", "(e r) i"), ("B", "o (e r)"), "Unsloth before 2026.9.6"),
        _packed("packed-reversed-grouped", ("B", "(e r) o"), ("A", "i (e r)"), "Megatron-Bridge; Unsloth with PEFT <= 0.18.1"),
        _packed("packed-3d", ("A", "e r i"), ("B", "o r e"), "vLLM's container of 3-D experts"),
        _stacked("fused", "fused", _FUSED, "names of transformers 5, one tensor for all experts"),
        _stacked("stacked", "words", _APART, "SGLang, Tinker"),
        _stacked("stacked-w123", "w123", _APART, "the same with Mixtral's words"),
        Form(
            name="automodel",
            key="{path}.experts.lora_{p:gate_and_up,down}_{s:A,B}",
            units=_FUSED,
            stored=(("A", "e i r"), ("B", "e r o")),
            text="NeMo AutoModel's own names",
        ),
    )
}
"""Every form by its name, which `--layout` takes."""
DEFAULTS: Mapping[str, str] = {"prefuse": "packed", "split": "per-expert"}
"""What an action writes if nobody says otherwise."""


def packed(*, reversed: bool, grouped: bool) -> Form:  # noqa: A002
    """PEFT's packed form with these roles and this packing."""
    two = (form for form in FORMS.values() if form.wrapped and form.rank == 2)
    return next(form for form in two if (form.reversed, form.grouped) == (reversed, grouped))
