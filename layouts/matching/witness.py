"""What else says how many experts and layers there are: routers, `config.json`, the names of leaves beside the experts.

In: a described checkpoint. Out: remarks for the plan, or an error. It never changes what was found.
Sources: `configuration_*.py` of transformers 5.24 for the words that say which layers have experts; for those that share them
`megrez_moe.py` of sii-research/InnoMegrez2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from layouts.disk.files import CONFIG
from layouts.errors import InputError
from layouts.language.parts import CHUNKS, EXTRA
from layouts.matching.group import Group
from layouts.matching.lookup import EXPERT_COUNTS, expert_counts, idle_experts
from layouts.reader import Reader

ROUTERS = (
    "gate.weight",
    "router.weight",
    "primary_router.weight",
    "gate.wg.weight",
    "router.layer.weight",
    "router.classifier.weight",
    "gate.kernel",
)
"""A router's name beside its experts; it has a row, or a column, for each of them."""
SPARSE: Mapping[str, str] = {
    "first_k_dense_replace": "from",
    "num_dense_layers": "from",
    "mlp_only_layers": "but",
    "moe_layers": "only",
    "decoder_sparse_step": "last of",
    "interleave_moe_layer_step": "last of",
    "moe_layer_freq": "first of",
    "mlp_layer_types": "named",
}
"""Words of `config.json`, and how each says which layers have experts: see `_says`. A layer has them if all words say so."""
_SHARED = "experts_shared_frequency"
"""How many of these layers, one behind the other, share the experts that the first of them holds (Megrez 2)."""
_OTHER = ("dense", "sparse", "moe_layer", "expert_layer", "layer_type", "block_type", "interval", "hybrid", "enable_moe")
"""Parts of words that may say more about it; where such a word is not in the table, `config.json` counts as silent."""
_LAYERS = "num_hidden_layers"
_MOST, _EXPERTS = 100_000, 1 << 24
"""Layers, and experts of a layer; who states more states nonsense."""
_NAMED = {"dense": False, "sparse": True, "moe": True, "hash_moe": True}
"""What layers are called, and whether such a one has experts."""
_HARMLESS = ("layer_types", "use_dense", "dense_bias")
"""Words with such parts that say something else."""


def check_counts(reader: Reader) -> None:
    """See that what `config.json` says of experts, and of layers beside them, are numbers: `"4"` or `true` is not silence.

    Raises:
        InputError: one is none, or none that a model has.
    """
    for part in _mappings(reader.config):
        experts = [word for word in EXPERT_COUNTS if part.get(word) is not None]
        most = dict.fromkeys(experts, (0, _EXPERTS)) | (
            {_LAYERS: (1, _MOST)} if experts and part.get(_LAYERS) is not None else {}
        )
        for word, (least, limit) in most.items():
            for value in part[word] if isinstance(part[word], list) else [part[word]]:
                if type(value) is not int or not least <= value <= limit:
                    raise InputError(
                        f"{reader.path / CONFIG}: {word} is {repr(value)[:40]}, which is no number of "
                        f"{'layers' if word == _LAYERS else 'experts'} that a model has; correct it"
                    )


def _mappings(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The whole, and each part of it at any depth."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _mappings(value)


def check_routers(reader: Reader, groups: Sequence[Group]) -> tuple[str, ...]:
    """See that routers have as many rows as there are experts, where `config.json` does not say one number of them.

    What the plan should say: names alone tell how many there are where no router does, and the last ones may be missing.

    Raises:
        InputError: one has another number.
    """
    if len(expert_counts(reader.config)) == 1:
        return ()
    alone = set()
    for group in (group for group in groups if group.role == "wi" and not group.part):
        if not _has_router(reader, group) and "e" in group.placed.key.slots:
            alone.add(group.total("e"))
    told = " or ".join(map(str, sorted(alone)))
    return (f"neither config.json nor a router says how many experts there are; by their names {told}",) if alone else ()


def _has_router(reader: Reader, group: Group) -> bool:
    """Whether there is one beside these experts.

    Raises:
        InputError: it has another number of rows.
    """
    experts, embed, found = group.total("e"), group.sizes.get("k"), False
    whole = {experts, experts + idle_experts(reader.config)}
    stacked = [size for axis, size in group.sizes.items() if axis not in {"e", "k", "g", *EXTRA, *CHUNKS}]
    for name in _beside(group):
        shape = reader.tensors[name].shape if name in reader.tensors else ()
        if len(shape) < 2 or embed not in shape or name in group.names:  # SmallThinker calls the gate of an expert `gate`, too
            continue
        found = True
        rows = next((size for size in (shape[-1], shape[0]) if size != embed), embed)
        if whole & {*shape} or rows in stacked:  # a tree that does not say where its layers are may be read along the other one
            continue
        raise InputError(
            f"{reader.path}: {group.names[0]} is one of {experts} experts, but the router {name} (in {reader.where(name)}) "
            f"is for {rows}: experts are missing. Get the rest, or state the number of experts in config.json"
        )
    return found


def _beside(group: Group) -> Iterator[str]:
    """The names that the router of a block may have: in the modules around the experts, within their layer.

    That of a second kind of experts is `gate.weight_1` (ERNIE 4.5 VL).
    """
    parts, kind = group.names[0].split("."), group.index.get("kind")
    for depth in range(len(parts) - 1, 0, -1):
        if parts[depth - 1].isdecimal() and parts[depth - 2] != "experts":
            return
        yield from (".".join([*parts[:depth], f"{name}_{kind}" if kind else name]) for name in ROUTERS)


def check_layers(reader: Reader, groups: Sequence[Group], banks: str | None = None) -> tuple[str, ...]:
    """Compare the layers that have experts with those that `config.json` says should; what the plan should say of it.

    Where layers share banks of experts, `banks` is the word for how many there are, and numbers are those of banks.

    Raises:
        InputError: a layer, or a bank, has none.
    """
    places: dict[Any, set[int]] = {}
    for group in (group for group in groups if "l" in group.index):
        places.setdefault(group.index.get("path"), set()).add(int(group.index["l"]))
    found = max(places.values(), key=len, default=set())  # those beside it (MTP) have numbers of their own
    if not found or (reader.format != "hf" and not reader.config):
        return ()
    parts = list(_parts(reader.config))
    if len(parts) != 1:
        said = f"speaks of {len(parts)} models with experts" if parts else "does not say how many layers and experts there are"
        return (f"config.json {said}, so that nobody has looked whether layers are missing; {len(found)} have experts",)
    config, unit = parts[0], "bank" if banks else "layer"
    count = config.get(banks or _LAYERS)
    if type(count) is not int or (banks and not 0 < count <= _MOST):
        return (f"config.json does not say how many banks of experts there are ({banks}); there are {len(found)}",)
    wanted = set(range(count)) if banks else _wanted(config, count)
    if lost := sorted((wanted or set()) - found) or (not banks and _absent(reader, groups, found, count)):
        more = f", and so it is with {len(lost) - 1} others" if len(lost) > 1 else ""
        raise InputError(
            f"{reader.path}: config.json says {count} {unit}s, {len(wanted) if wanted else 'some'} of them with experts, but "
            f"{unit} {lost[0]} has none{more}. Get the files that are missing"
        )
    if wanted is None:
        return (f"config.json does not say which of {count} layers have experts; {len(found)} have them",)
    return ()


def layers_with_experts(config: Mapping[str, Any]) -> frozenset[int] | None:
    """The numbers of the layers that have experts by `config.json`; None where it does not say it in words that we know."""
    text, count = _text(config), decoder_layers(config)
    wanted = None if text is None or count is None else _wanted(text, count)
    return None if wanted is None else frozenset(wanted)


def decoder_layers(config: Mapping[str, Any]) -> int | None:
    """How many layers the model has by `config.json`, with and without experts; None where it does not say."""
    text = _text(config)
    count = text[_LAYERS] if text else 0
    return count if 0 < count <= _MOST else None


def _absent(reader: Reader, groups: Sequence[Group], found: Collection[int], count: int) -> list[int]:
    """The layers of which there is no tensor at all, where all experts are in one place; those with experts are `found`."""
    if len(found) >= count and not set(range(count)) - set(found):
        return []  # nothing can be absent, and names are many
    places = {group.index.get("path") for group in groups}
    if len(places) > 1 or None in places:
        return []
    begin = f"{places.pop()}."
    words = {name[len(begin) :].partition(".")[0] for name in reader.tensors if name.startswith(begin)}
    return sorted(set(range(count)) - {int(word) for word in words if word.isdecimal() and len(word) < 7})


def _text(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of `config.json` that says how many layers and experts the model has, if just one part does."""
    parts = list(_parts(config))
    return parts[0] if len(parts) == 1 else None


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for part in _mappings(config):
        if type(part.get(_LAYERS)) is int and any(type(part.get(word)) is int for word in EXPERT_COUNTS):
            yield part


def _wanted(config: Mapping[str, Any], count: int) -> set[int] | None:
    """The layers that should have experts; None where `config.json` does not say it in words that we know."""
    words = {word: value for word, value in config.items() if value is not None}
    open_words = (word for word in words if word not in SPARSE and word not in _HARMLESS)
    if any(part in word for word in open_words for part in _OTHER):
        return None
    if not SPARSE.keys() & words.keys():
        return None
    rules, step = [(how, words[word]) for word, how in SPARSE.items() if word in words], words.get(_SHARED, 1)
    if type(step) is not int or step < 1:
        return None
    try:
        return set([layer for layer in range(count) if all(_says(how, value, layer) for how, value in rules)][::step])
    except (TypeError, LookupError, ZeroDivisionError):
        return None


def _says(how: str, value: Any, layer: int) -> bool:
    """Whether a word of this kind and value says that a layer has experts.

    Raises:
        TypeError, LookupError, ZeroDivisionError: it is not of its kind.
    """
    if type(value) not in ((int, list) if how == "first of" else (int,) if how in ("from", "last of") else (list,)):
        raise TypeError(value)
    if how == "from":
        return bool(layer >= value)
    if how in ("but", "only"):
        return (layer in value) == (how == "only")
    if how == "last of":
        return bool((layer + 1) % value == 0)
    if how == "named":
        return _NAMED[value[layer]]
    return bool(value[layer] if isinstance(value, list) else layer % value == 0)
