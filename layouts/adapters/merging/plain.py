"""What an adapter has beside experts: updates of matrices (attention, routers, shared experts, embeddings), whole tensors.

In: an open adapter and its description. Out: `Plain`, for each. It never looks at a base, and never reads data.

Sources: PEFT 0.21 `tuners/lora/layer.py` (Linear, Embedding), `utils/save_and_load.py`: `modules_to_save`, biases and resized
embeddings are saved whole, under the name of what they take the place of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from layouts.adapters.describe import Description
from layouts.adapters.forms import Form
from layouts.adapters.merging.product import FLOATS
from layouts.adapters.merging.sites import Site, Term
from layouts.adapters.units import Unit
from layouts.errors import InputError, PlanError
from layouts.reader import Reader

_KEY = "{path}.{e}.{p:weight}.lora_{s:A,B}.weight"
_LINEAR = Form(name="linear", key=_KEY, units=("weight",), stored=(("A", "r i"), ("B", "o r")), text="W (o, i) + s B A")
_EMBEDDING = Form(
    name="embedding", key=_KEY, units=("weight",), stored=(("B", "r o"), ("A", "i r")), text="W (o, i) + s (B A)^T"
)
_ENDS: Mapping[str, tuple[Form, str]] = {
    ".lora_A.weight": (_LINEAR, ".lora_B.weight"),
    ".lora_embedding_A": (_EMBEDDING, ".lora_embedding_B"),
}
"""How the first of two names ends -> what it is, and how the other ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A tensor of the base, by the adapter's name for it, its shape, and the update; None if `source` takes its place."""

    name: str
    source: str
    shape: tuple[int, ...]
    term: Term | None


def plain_ones(reader: Reader, described: Description) -> tuple[Plain, ...]:
    """Everything beside the experts.

    Raises:
        PlanError: a tensor of LoRA that is neither A nor B (DoRA), or an element type that float32 does not hold.
        InputError: A without B, or a rank that is not the settings'.
    """
    return tuple(_each(reader, described))


def _each(reader: Reader, described: Description) -> Iterator[Plain]:
    paired = set()
    for name, stored in described.others.items():
        end = next((end for end in _ENDS if name.endswith(end)), None)
        if end is not None:
            form, other = _ENDS[end]
            partner = described.others.get(name.removesuffix(end) + other)
            if partner is None:
                raise InputError(f"{reader.path}: {name} has no partner {other[1:]}")
            paired.add(partner)
            yield _update(reader, described, name.removesuffix(end).removeprefix("base_model.model."), form, (stored, partner))
    for name, stored in described.others.items():
        if ".lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            yield Plain(name=plain, source=stored, shape=reader.tensors[stored].shape, term=None)
        elif stored not in paired and not name.endswith(tuple(_ENDS)):
            raise PlanError(f"{reader.path}: {name} is no A and no B with a partner; merge such adapters (DoRA) with PEFT")


def _update(reader: Reader, described: Description, module: str, form: Form, names: tuple[str, str]) -> Plain:
    specs = [reader.tensors[name] for name in names]
    scale = described.settings.scale(module)
    sizes: dict[str, int] = {}
    for side, spec in zip("AB", specs, strict=True):
        try:
            sizes |= form.pattern(side)[1].sizes(spec.shape, {"r": scale.rank})
        except ValueError as error:
            raise InputError(
                f"{reader.path}: {spec.name} of shape {spec.shape} is no matrix of rank {scale.rank}, which "
                f"adapter_config.json says of it: {error}"
            ) from None
    unit = Unit(
        names=((names[0],), (names[1],)),
        modules=(module,),
        experts=1,
        rank=scale.rank,
        i=sizes["i"],
        o=sizes["o"],
        dtypes={form.pattern(side)[0]: spec.dtype for side, spec in zip("AB", specs, strict=True)},
        scales=(scale,),
    )
    return Plain(name=f"{module}.weight", source=names[0], shape=(unit.o, unit.i), term=Term(form=form, unit=unit))


def check_types(reader: Reader, sites: Mapping[str, Site]) -> None:
    """See that float32 holds what the adapter has.

    Raises:
        PlanError: it does not.
    """
    for site in sites.values():
        found = {code for term in site.terms.values() for code in term.unit.dtypes.values()}
        found |= {reader.tensors[site.instead].dtype} if site.instead else set()
        if wrong := sorted(found - set(FLOATS)):
            raise PlanError(f"{reader.path}: what changes {site.name} is {wrong[0]}; {', '.join(FLOATS)} are merged, no others")
