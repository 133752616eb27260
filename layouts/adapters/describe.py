"""Match every tensor of an adapter against the table of forms; nothing is guessed and nothing is left over.

In: an open adapter and what is known of it. Out: a `Description`. It never reads data, and never tells roles by names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layouts.adapters.forms import FORMS, SIDES, Form
from layouts.adapters.opening import plain_names
from layouts.adapters.packed import Known, decide
from layouts.adapters.settings import Settings
from layouts.adapters.units import Block, Unit
from layouts.errors import InputError, PlanError
from layouts.reader import Reader
from layouts.tensors import TensorSpec

_OURS = ".experts."
_KNOWN: Mapping[str, str] = {
    ".lora_magnitude_vector": "the norms of DoRA, which no packed form has (merge it with PEFT),",
    ".lora_B.bias": "a bias of B, which no packed form has (merge it with PEFT),",
}
"""Parts of names that are in no form -> what they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """An adapter in the words of the table."""

    form: Form
    blocks: tuple[Block, ...]
    others: Mapping[str, str]
    """Every other tensor: its name as PEFT saves it -> as it is stored."""
    settings: Settings
    known: Known
    remarks: tuple[str, ...] = ()


_Words = dict[str, dict[str, dict[int, TensorSpec]]]
_Found = dict[str, _Words]
"""Path -> word of the projection -> side -> expert (0 where one tensor has all) -> tensor."""


def module_of(name: str) -> str:
    """The module that a tensor's name is of, as PEFT's patterns see it."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def describe(reader: Reader, settings: Settings, known: Known, *, experts: bool = True) -> Description:
    """Say what every tensor of an adapter is; unless it must be on `experts`, it may be on other modules alone.

    Raises:
        InputError: experts are missing, or shapes and settings contradict one another.
        PlanError: no form of the table, several of them, or one that nobody can tell.
    """
    plain = plain_names(reader.tensors, reader.path)
    form, found, others = _matched(reader, plain, experts=experts)
    if form.wrapped and found:
        form, units, remarks = decide(reader.path, form, {p: _one(each) for p, each in found.items()}, settings, known)
    else:
        units, remarks = dict(zip(range(len(form.units)), form.units, strict=True)), ()
    blocks = tuple(_block(reader, form, path, found[path], units, settings) for path in found)
    _check_alike(reader, blocks, known)
    return Description(form=form, blocks=blocks, others=others, settings=settings, known=known, remarks=remarks)


def _one(words: _Words) -> dict[str, dict[str, tuple[int, ...]]]:
    return {word: {side: each[0].shape for side, each in sides.items()} for word, sides in words.items()}


def _matched(reader: Reader, plain: Mapping[str, str], *, experts: bool) -> tuple[Form, _Found, dict[str, str]]:
    """The form that all names on experts have, its tensors, and all others; forms may have the word for down in common."""
    hits: dict[str, dict[str, Mapping[str, int | str]]] = {}
    for name, stored in plain.items():
        spec = reader.tensors[stored]
        hits[name] = {form.name: at for form in FORMS.values() if (at := _parsed(form, name, spec)) is not None}
        if not hits[name]:
            _check_other(reader, name, spec)
    ours = {name: each for name, each in hits.items() if each}
    if not ours and experts:
        first = ", ".join(sorted(reader.tensors)[:3]) or "none"
        raise PlanError(f"{reader.path}: no LoRA on experts found here, so there is nothing to convert. First tensors: {first}")
    common = set(FORMS).intersection(*ours.values())
    if not common:
        several = ", ".join(dict.fromkeys(next(iter(each)) for each in ours.values()))
        raise PlanError(f"{reader.path}: experts stand there in several forms ({several}); convert them one by one")
    form = next(form for form in FORMS.values() if form.name in common)
    found: _Found = {}
    for name, each in ours.items():
        at = each[form.name]
        sides = found.setdefault(str(at["path"]), {}).setdefault(str(at["p"]), {})
        sides.setdefault(SIDES[int(at["s"])], {})[int(at.get("e", 0))] = reader.tensors[plain[name]]
    return form, found, {name: plain[name] for name, each in hits.items() if not each}


def _parsed(form: Form, name: str, spec: TensorSpec) -> Mapping[str, int | str] | None:
    """Where a name stands in a form; the rank tells a form of all experts from that of one."""
    at = form.template.parse(name)
    return at if at is not None and len(spec.shape) == form.rank and not form.reversed and not form.grouped else None


def _check_other(reader: Reader, name: str, spec: TensorSpec) -> None:
    """Refuse what belongs to experts and is in no row.

    Raises:
        PlanError, InputError: it is.
    """
    if _OURS in f".{name}" and ".lora_" in name:
        told = next((words for word, words in _KNOWN.items() if word in name), "")
        lost = "empty or flat as ZeRO-3 leaves it," if 0 in spec.shape or len(spec.shape) == 1 else ""
        said = f", {told or lost}" if told or lost else ""
        raise PlanError(
            f"{reader.path}: {name}{said} of shape {spec.shape} is on experts and in no form that is known: {', '.join(FORMS)}"
        )
    if ".lora_" in name and 0 in spec.shape:
        raise InputError(f"{reader.path}: {name} is empty, as ZeRO-3 leaves it; gather the adapter and save it again")


def _block(reader: Reader, form: Form, path: str, words: _Words, units: Mapping[int, str], settings: Settings) -> Block:
    found = {}
    for word, sides in words.items():
        if sides.keys() != set(SIDES):
            [only] = sides
            raise InputError(f"{reader.path}: {next(iter(sides[only].values())).name} has no partner lora_{'BA'[only == 'B']}")
        found[units[int(word)]] = _unit(reader, form, path, units[int(word)], sides, settings)
    block = Block(path=path, units=found)
    _check_block(reader, block)
    return block


def _unit(
    reader: Reader, form: Form, path: str, unit: str, sides: Mapping[str, Mapping[int, TensorSpec]], settings: Settings
) -> Unit:
    experts = sides["A"].keys() | sides["B"].keys()
    if lost := [e for e in range(max(experts) + 1) if e not in sides["A"] or e not in sides["B"]]:
        raise InputError(f"{reader.path}: {path}.experts has no whole {unit} adapter for expert {lost[0]} of 0..{max(experts)}")
    names = tuple(tuple(sides[side][e].name for e in sorted(experts)) for side in SIDES)
    module = f"{path.removeprefix('base_model.model.')}.experts"
    word = form.word(unit)
    modules = tuple(f"{module}.{e}.{word}" for e in sorted(experts)) if form.per_expert else (f"{module}.{word}",)
    ranks = [settings.rank_of(each) for each in modules]
    found: dict[str, int] = {}
    for side in SIDES:
        for e, rank in zip(sorted(experts), ranks, strict=False):
            _add(reader, found, sides[side][e], form.pattern(side)[1], rank)
    count = len(names[0]) if form.per_expert else found["e"]
    scales = [settings.scale(each) for each in modules]
    return Unit(
        names=(names[0], names[1]),
        modules=modules,
        experts=count,
        rank=max(ranks),
        i=found["i"],
        o=found["o"],
        dtypes={form.pattern(side)[0]: _dtype(reader, sides[side].values()) for side in SIDES},
        scales=tuple(scales if form.per_expert else scales * count),
    )


def _add(reader: Reader, found: dict[str, int], spec: TensorSpec, pattern: Any, rank: int) -> None:
    """Read the sizes of a tensor; shared sides of all experts have one.

    Raises:
        InputError: they contradict the settings, or those of the others.
    """
    known = {"r": rank}
    try:
        sizes = pattern.sizes(spec.shape, known)
        if sizes["r"] != rank:
            raise ValueError(f"its rank is {sizes['r']}")
    except ValueError as error:
        raise InputError(
            f"{reader.path}: {spec.name} of shape {spec.shape} does not fit rank {rank}, which adapter_config.json says of it: "
            f"{error}"
        ) from None
    for axis in sizes.keys() - {"r"}:
        have = found.setdefault(axis, sizes[axis])
        if axis == "e" and 1 in (have, sizes[axis]):  # shared by all experts
            found[axis] = max(have, sizes[axis])
        elif have != sizes[axis]:
            raise InputError(f"{reader.path}: {spec.name} of shape {spec.shape} has {axis} = {sizes[axis]}, others have {have}")


def _dtype(reader: Reader, specs: Iterable[TensorSpec]) -> str:
    found = {spec.dtype: spec.name for spec in specs}
    if len(found) > 1:
        raise InputError(f"{reader.path}: {' and '.join(found.values())} have different element types: {', '.join(found)}")
    return next(iter(found))


def _check_block(reader: Reader, block: Block) -> None:
    """K and N of all projections of a block, and its experts, must agree."""
    sizes: dict[str, set[int]] = {"e": {unit.experts for unit in block.units.values()}, "k": set(), "n": set()}
    for name, unit in block.units.items():
        k, n = (unit.o, unit.i) if name == "down" else (unit.i, unit.o)
        if name == "gate_up" and n % 2:
            raise InputError(f"{reader.path}: {unit.names[1][0]} has {n} rows for gate and up together, which is odd")
        sizes["k"].add(k)
        sizes["n"].add(n // 2 if name == "gate_up" else n)
    for axis, found in sizes.items():
        if len(found) > 1:
            where = f"{reader.path}: {block.path}.experts"
            raise InputError(f"{where}: its projections have {axis} = {sorted(found)}; they must agree")


def _check_alike(reader: Reader, blocks: Sequence[Block], known: Known) -> None:
    """All blocks have the experts of the base, and as many as the others."""
    counts = {unit.experts: block.path for block in blocks for unit in block.units.values()}
    if len(counts) > 1:
        listed = ", ".join(f"{count} in {path}.experts" for count, path in sorted(counts.items()))
        raise InputError(f"{reader.path}: layers have adapters of other numbers of experts: {listed}; some are missing")
    for block in blocks:
        for name, unit in block.units.items():
            k, n = (unit.o, unit.i) if name == "down" else (unit.i, unit.o)
            have = {"e": unit.experts, "k": k, "n": n // 2 if name == "gate_up" else n}
            for axis, size in known.sizes.items():
                if axis in have and have[axis] != size:
                    where = f"{reader.path}: {block.path}.experts ({name})"
                    raise InputError(f"{where} has {axis} = {have[axis]}, and the base {size}")
