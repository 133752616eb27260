"""The JSON files that Orbax keeps beside the arrays of an item: the tree, the shardings, the chunks of sharded arrays. Pure.

What the input says of a leaf stays: that it is a `jax.Array`, its sharding, that it is a random key. A fused tensor takes over
what its first source had. Where the input has none (it is no Orbax checkpoint), leaves are NumPy arrays below dict keys.

Source: Orbax 0.12 `metadata/tree.py`, `metadata/sharding.py`, `metadata/array_metadata_store.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.checkpoint import Reader
from layouts.errors import InputError
from layouts.files import RECORD, read_json
from layouts.orbax.reader import OrbaxReader
from layouts.orbax.tree import ARRAYS, BOX, METADATA, STRINGS, Leaf

SHARDING, CHUNKS = "_sharding", "array_metadatas"
_DICT = 2
_RICH = "value_metadata_tree"
"""The tree a second time, with the types of its nodes; Orbax goes without it when it is not there."""


def render(plan: Plan, reader: Reader, chunks: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The files by their path in the item. `chunks` are the shapes of stored chunks, by the names of targets.

    Raises:
        InputError: metadata of the input is damaged.
    """
    source = reader if isinstance(reader, OrbaxReader) else None
    first = {target.spec.name: _first_source(target) for target in plan.targets}
    files = {METADATA: json.dumps(_tree(plan, source, first))}
    if source is None:
        return files
    if (source.item / STRINGS).exists():
        files[STRINGS] = (source.item / STRINGS).read_text(encoding="utf-8")
    if shardings := _shardings(plan, source, first):
        files[SHARDING] = json.dumps(shardings)
    if arrays := _arrays(plan, source, first, chunks):
        files[f"{CHUNKS}/process_0"] = json.dumps({"array_metadatas": arrays})
    return files


def render_step(scanned: bool) -> str:
    """What stands beside the item: MaxText takes from it whether layers are stacked, or refuses a run that says otherwise."""
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    return json.dumps({"item_handlers": {"items": handler}, "custom_metadata": {"scan_layers": scanned}})


def stored_name(target: Target, reader: Reader) -> str:
    """The name of a target's array: its own, in a box where its first source is in one."""
    leaf = reader.leaves.get(_first_source(target)) if isinstance(reader, OrbaxReader) else None
    return f"{target.spec.name}.{BOX}" if leaf and leaf.boxed else target.spec.name


def _first_source(target: Target) -> str:
    piece = next(target.pieces(target.target.pattern.whole(target.sizes)), None)
    return piece.source if piece else target.spec.name


def _tree(plan: Plan, source: OrbaxReader | None, first: Mapping[str, str]) -> dict[str, Any]:
    old: Mapping[str, Any] = source.tree if source else {"use_ocdbt": True, "use_zarr3": True}
    leaves = source.leaves if source else {}
    made: dict[str, list[Any]] = {}
    for target in plan.targets:
        leaf = leaves.get(first[target.spec.name])
        made.setdefault(first[target.spec.name], []).append(_entry(target, leaf, source))
    entries: list[Any] = []
    for name, leaf in leaves.items():
        # Leaves stand in Orbax's own order, those that are new where their first source stood.
        entries += made.pop(name, []) if leaf.kind in ARRAYS else [leaf.entry]
    entries += [entry for rest in made.values() for entry in rest]
    tree = {str(tuple(str(key["key"]) for key in entry["key_metadata"])): entry for entry in entries}
    kept = {key: value for key, value in old.items() if key != _RICH or not any(t.moved for t in plan.targets)}
    custom = _custom_metadata(plan, source)
    flags = {"store_array_data_equal_to_fill_value": True, "custom_metadata": custom}
    return {"tree_metadata": tree, **{key: value for key, value in kept.items() if key != "tree_metadata"}, **flags}


def _entry(target: Target, leaf: Leaf | None, source: OrbaxReader | None) -> Mapping[str, Any]:
    name = target.spec.name
    if leaf is None or source is None:
        keys = [{"key": key, "key_type": _DICT} for key in name.split(".")]
        return {"key_metadata": keys, "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False}}
    if leaf.name == name and not target.moved:
        return leaf.entry
    value = dict(leaf.entry["value_metadata"])
    if "write_shape" in value:
        value["write_shape"] = _scaled(value["write_shape"], source.tensors[leaf.name].shape, target.spec.shape)
    return {"key_metadata": _keys(name, leaf), "value_metadata": value}


def _keys(name: str, leaf: Leaf) -> list[Mapping[str, Any]]:
    """Where a target hangs in the tree: below the deepest node of its first source that the two names share."""
    keys = list(leaf.entry["key_metadata"])
    box = keys[-1:] if leaf.boxed else []
    for depth in range(len(leaf.path) - len(box), 0, -1):
        shared = ".".join(map(str, leaf.path[:depth]))
        if name == shared:
            return keys[:depth] + box
        if name.startswith(shared + "."):
            below = name[len(shared) + 1 :].split(".")
            return keys[:depth] + [{"key": key, "key_type": _DICT} for key in below] + box
    return [{"key": key, "key_type": _DICT} for key in name.split(".")] + box


def _scaled(part: Sequence[int], old: Sequence[int], new: Sequence[int]) -> list[int]:
    """The part of an array that one device had, when the array grows or shrinks along its dimensions."""
    if len(part) != len(new):
        return list(new)
    return [-(-p * n // o) if o else n for p, o, n in zip(part, old, new, strict=True)]


def _custom_metadata(plan: Plan, source: OrbaxReader | None) -> Any:
    """The input's own entries stay; our record comes or goes with the layout that it describes."""
    found = source.custom_metadata if source else None
    if not plan.record and (source is None or source.record is None):
        return found
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{plan.source}: custom_metadata is no JSON object, so the layout cannot be recorded there")
    kept = {key: value for key, value in (found or {}).items() if key != RECORD}
    return kept | ({RECORD: dict(plan.record)} if plan.record else {}) or None


def _shardings(plan: Plan, source: OrbaxReader, first: Mapping[str, str]) -> dict[str, str]:
    """What `_sharding` says, by the base64 of the arrays' names."""
    if not (source.item / SHARDING).exists():
        return {}
    old = read_json(source.item / SHARDING)
    made = {}
    for target in plan.targets:
        text = old.get(_base64(_stored(source, first[target.spec.name])))
        if isinstance(text, str):
            made[_base64(stored_name(target, source))] = _fitting(text, target.spec.shape) if target.moved else text
    return made


def _fitting(text: str, shape: Sequence[int]) -> str:
    """A sharding for another shape: a dimension that no longer divides among its devices is not cut."""
    sharding = json.loads(text)
    spec = sharding.get("partition_spec")
    if not isinstance(spec, list):
        return text
    devices = dict(zip(sharding["axis_names"], sharding["shape"], strict=True))
    fits = []
    for size, axes in zip(shape, spec, strict=False):
        parts = 1
        for axis in [axes] if isinstance(axes, str) else axes or []:
            parts *= devices[axis]
        fits.append(axes if size % parts == 0 else None)
    return text if fits == spec else json.dumps({**sharding, "partition_spec": fits})


def _stored(source: OrbaxReader, name: str) -> str:
    return source.leaves[name].stored


def _base64(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _arrays(
    plan: Plan, source: OrbaxReader, first: Mapping[str, str], chunks: Mapping[str, tuple[int, ...]]
) -> list[Mapping[str, Any]]:
    """What Orbax keeps of arrays that were `jax.Array`s; all processes wrote the same of each, so one file is enough."""
    old: dict[str, Mapping[str, Any]] = {}
    for file in sorted((source.item / CHUNKS).glob("process_*")):
        for entry in read_json(file)["array_metadatas"]:
            old[entry["array_metadata"]["param_name"]] = entry["array_metadata"]
    made: list[Mapping[str, Any]] = []
    for target in plan.targets:
        name = target.spec.name
        if (was := old.get(_stored(source, first[name]))) is not None:
            part = _scaled(was["write_shape"], source.tensors[first[name]].shape, target.spec.shape)
            entry = {**was, "param_name": stored_name(target, source), "write_shape": part, "chunk_shape": list(chunks[name])}
            made.append({"array_metadata": entry})
    return made
