"""LoRA of gate and up in a tree of MaxText, as qwix and Tunix leave it: `wi_0_lora_a` and `wi_0_lora_b` beside `wi_0`.

In: names, shapes, what is known of the weights beside. Out: the patterns of A and B. It never reads data.

qwix derives both from the einsum of the weight: A has the axes that the weight shares with its input, and the rank; B the rank,
and the others. So MaxText's `BSM,EMH->BSEH` gives an A that all experts share, `EBCM,EMH->EBCH` such a B, and batched products
one of each for every expert. How many dimensions A and B have tells which it is. Layers are stacked on the first axis or the
second; which one matters for the rank of B alone, and there shapes have to tell.

Source: qwix 0.1.8 `_src/providers/lora.py` (`_parse_einsum_str_for_lora`, `_create_lora_layer_shapes`), MaxText 0.2.5
`layers/moe.py` (`dense_matmul`), `checkpoint_conversion/to_huggingface.py` (`_get_lora_delta`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layouts.errors import InputError, PlanError
from layouts.language.pattern import Pattern
from layouts.language.template import Template
from layouts.tables.maxtext import LORA_APART, LORA_DOWN, LORA_FUSED

_FORMS: Mapping[int, tuple[str, str]] = {1: ("k r", "r e n"), -1: ("e k r", "r n"), 0: ("e k r", "e r n")}
"""Dimensions that B has more than A -> their axes, of one layer."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Where A has the rank, always last, and where B has the rank and its outputs, always last; other axes come along.

    `words` are the axes of A and of B as they are: `e`, `k`, `r`, `n`, and `l0`, ... of layers.
    """

    a: Pattern
    b: Pattern
    rank: int
    n: int
    words: tuple[tuple[str, ...], tuple[str, ...]]


def is_lora(name: str) -> bool:
    """Whether a leaf is A or B of a projection of experts."""
    return any(key.parse(name) is not None for key in (LORA_APART, LORA_FUSED, LORA_DOWN))


def found(names: Iterable[str], key: Template) -> dict[str, list[str]]:
    """Path -> the names of one block in the order of the key: A and B of gate, then of up, or A and B of both.

    Raises:
        PlanError: some are missing.
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        if (at := key.parse(name)) is not None:
            blocks.setdefault(str(at["path"]), set()).add(name)
    made: dict[str, list[str]] = {}
    for path in blocks:
        every = (key.render({"path": path, "g": g, "s": s}) for g in range(2) for s in range(2))
        made[path] = list(dict.fromkeys(every))
        if lost := [name for name in made[path] if name not in blocks[path]]:
            raise PlanError(
                f"{min(blocks[path])} has no partner {lost[0]}: gate and up become one together; what has no LoRA "
                "needs one whose B is zeros"
            )
    return made


def axes(names: tuple[str, str], a: Shape, b: Shape, weights: Mapping[str, int], layers: Shape | None) -> Axes:
    """The axes of A and B. `weights` are the sizes `e`, `k`, `n` of the weight beside, and `layers` its scan axes, if known.

    Raises:
        InputError: shapes that are no A and B, or not of this weight.
        PlanError: the layers could stand in two places.
    """
    form = _FORMS.get(len(b) - len(a))
    extra = len(a) - len(form[0].split()) if form else -1
    if form is None or extra < 0 or a[-1] == 0:
        raise InputError(f"{names[0]} of shape {a} and {names[1]} of {b} are no A and B of experts, as qwix has them")
    sizes = {**weights, "r": a[-1]}
    readings = {
        place: (_stored(form[0], extra, place), _stored(form[1], extra, place)) for place in ((0, 1) if extra else (0,))
    }
    given = None if layers is None else dict(zip((f"l{i}" for i in range(extra)), layers, strict=False))
    if (given is not None and len(given) != extra) or not any(_fits(one, a, sizes, given) for one, _ in readings.values()):
        raise InputError(f"{names[0]} of shape {a} is no A for {dict(weights)} in layers {layers}; are they of another model?")
    fitting = {place: other for place, (_, other) in readings.items() if _fits(other, b, sizes, given)}
    both = {place: other for place, other in fitting.items() if _fits(readings[place][0], a, sizes, given)}
    ranks = {other.index("r"): other for other in (both or fitting).values()}  # one scan axis holds for all parameters
    if not ranks:
        raise InputError(f"{names[1]} of shape {b} is no B of rank {a[-1]} for {dict(weights)} in layers {layers}")
    if len(ranks) > 1:
        raise PlanError(f"{names[1]} of shape {b}: nothing tells its rank {a[-1]} from its layers, of which there are as many")
    (at,) = ranks
    along = [f"d{i}" for i in range(len(b) - 2)]
    pattern = Pattern(" ".join([*along[:at], "r", *along[at:], "n"]))
    first = min(
        (each for each, (one, _) in readings.items() if _fits(one, a, sizes, given)), key=lambda each: each not in fitting
    )
    words = tuple(readings[first][0]), tuple(fitting.get(first) or next(iter(fitting.values())))
    return Axes(a=Pattern(" ".join([*(f"d{i}" for i in range(len(a) - 1)), "r"])), b=pattern, rank=a[-1], n=b[-1], words=words)


def _stored(text: str, extra: int, place: int) -> list[str]:
    """The axes with those of the layers in their place."""
    words = text.split()
    return [*words[:place], *(f"l{i}" for i in range(extra)), *words[place:]]


def _fits(words: list[str], shape: Shape, sizes: Mapping[str, int], layers: Mapping[str, int] | None) -> bool:
    known = {**sizes, **(layers or {})}
    return len(words) == len(shape) and all(known.get(word, size) == size for word, size in zip(words, shape, strict=True))
