"""The JSON files that Orbax keeps beside the arrays of an item: the tree, the shardings, the chunks of sharded arrays. Pure.

In: a plan and its `Origin`. Out: texts. It never writes them.

What the input says of a leaf stays: that it is a `jax.Array`, its sharding, that it is a random key. A fused tensor takes over
what its first source had. Where the input has none (it is no Orbax checkpoint), leaves are NumPy arrays below dict keys.

Source: Orbax 0.12 `metadata/tree.py`, `metadata/sharding.py`, `metadata/array_metadata_store.py`.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from convert.errors import PlanError
from convert.orbax.origin import CHUNKS, SHARDING, Origin
from convert.planning.planner import Plan
from convert.planning.targets import Target
from layouts.disk.files import RECORD
from layouts.disk.names import key
from layouts.errors import InputError
from layouts.orbax.tree import ARRAYS, BOX, COMPLETE, METADATA, OWN, PROCESS, STRINGS, Leaf

_DICT = 2
_RICH = "value_metadata_tree"
"""The tree a second time, with the types of its nodes; Orbax goes without it when it is not there."""


def render(plan: Plan, origin: Origin, chunks: Mapping[str, tuple[int, ...]], *, kept: bool = False) -> dict[str, str]:
    """The files by their path in the item.

    `chunks` are the shapes of stored chunks, by the names of targets; with `kept`, the chunks are the input's own.

    Raises:
        InputError: metadata of the input is damaged.
    """
    first = {target.spec.name: _first_source(target, origin) for target in plan.targets}
    files = {METADATA: json.dumps(_tree(plan, origin, first, kept))}
    if origin.texts is not None:
        files[STRINGS] = origin.texts
    if shardings := _shardings(plan, origin):
        files[SHARDING] = json.dumps(shardings)
    if arrays := _arrays(plan, origin, first, chunks):
        files[f"{CHUNKS}/process_0"] = json.dumps({"array_metadatas": arrays})
    return files


def render_step(scanned: bool) -> str:
    """What stands beside the item: MaxText takes from it whether layers are stacked, or refuses a run that says otherwise."""
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    return json.dumps({"item_handlers": {"items": handler}, "custom_metadata": {"scan_layers": scanned}})


def stored_name(target: Target, origin: Origin) -> str:
    """The name of a target's array: its own, in a box where its first source is in one.

    Raises:
        InputError: it leads elsewhere; templates of records are input, and so is all that is rendered from them.
    """
    leaf = origin.leaves.get(_first_source(target, origin))
    return key(f"{target.spec.name}.{BOX}" if leaf and leaf.boxed else target.spec.name, "an array of the output")


def check_names(plan: Plan, origin: Origin) -> None:
    """See that no array takes the place of another, of Orbax's own files, or of a side file; a record can ask for that.

    Raises:
        InputError: a name leads out of the item.
        PlanError: two things would have one name, or one would lie in the other.
    """
    made = [stored_name(target, origin) for target in plan.targets]
    if len(set(made)) != len(made):
        twice = next(name for name in made if made.count(name) > 1)
        raise PlanError(f"{plan.source}: two arrays of the output would have the name {twice!r}; does the record fit it?")
    _check_apart({*made, *(leaf.stored for leaf in origin.leaves.values() if leaf.kind in ARRAYS)}, plan)
    own = {*OWN, *(() if origin.ocdbt else (name.split("/")[0] for name in made))}
    if not origin.ocdbt and (odd := next((name for name in made if _is_own(name.split("/")[0], OWN)), None)):
        raise PlanError(f"{plan.source}: an array of the output would have the name {odd!r}, which is Orbax's own; rename it")
    for name in plan.side_files:
        inside = _below(name, origin.place)
        if inside and _is_own(inside[0], own):
            raise PlanError(f"{plan.source / name} is no part of this checkpoint, but the output needs its name; remove it")


def _check_apart(names: set[str], plan: Plan) -> None:
    for name in names:
        folders = name.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            if (above := "/".join(folders[:depth])) in names:
                raise PlanError(f"{plan.source}: the array {name!r} of the output would lie in the array {above!r}; rename one")


def _is_own(first: str, own: Collection[str]) -> bool:
    return first in own or first.startswith(PROCESS)


def _below(name: str, place: Path) -> tuple[str, ...]:
    parts = PurePosixPath(name).parts
    return parts[len(place.parts) :] if parts[: len(place.parts)] == place.parts else ()


def _first_source(target: Target, origin: Origin) -> str:
    """The leaf of the origin that an array is like: that of its own name, else the first one that it is made of."""
    if target.spec.name in origin.leaves:
        return target.spec.name
    piece = next(target.pieces(target.target.pattern.whole(target.sizes)), None)
    return piece.source if piece else target.spec.name


def _tree(plan: Plan, origin: Origin, first: Mapping[str, str], chunks_kept: bool) -> dict[str, Any]:
    made: dict[str, list[Any]] = {}
    for target in plan.targets:
        leaf = origin.leaves.get(first[target.spec.name])
        made.setdefault(first[target.spec.name], []).append(_entry(target, leaf, origin))
    entries: list[Any] = []
    for name, leaf in origin.leaves.items():
        # Leaves stand in Orbax's own order, those that are new where their first source stood.
        entries += made.pop(name, []) if leaf.kind in ARRAYS else [leaf.entry]
    entries += [entry for rest in made.values() for entry in rest]
    tree = {str(tuple(str(key["key"]) for key in entry["key_metadata"])): entry for entry in entries}
    kept = {key: value for key, value in origin.tree.items() if key != _RICH or not any(t.moved for t in plan.targets)}
    # We store chunks of zeros, too; of chunks that are kept it is as the input says, or those it left out would be missed.
    complete = not chunks_kept or bool(origin.tree.get(COMPLETE))
    flags = {COMPLETE: complete, "custom_metadata": _custom_metadata(plan, origin)}
    return {"tree_metadata": tree, **{key: value for key, value in kept.items() if key != "tree_metadata"}, **flags}


def _entry(target: Target, leaf: Leaf | None, origin: Origin) -> Mapping[str, Any]:
    name = target.spec.name
    if leaf is None:
        keys = [{"key": key, "key_type": _DICT} for key in name.split(".")]
        return {"key_metadata": keys, "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False}}
    if leaf.name == name and not target.moved:
        return leaf.entry
    value = dict(leaf.entry["value_metadata"])
    if "write_shape" in value:
        value["write_shape"] = _scaled(value["write_shape"], origin.tensors[leaf.name].shape, target.spec.shape)
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


def _custom_metadata(plan: Plan, origin: Origin) -> Any:
    """The input's own entries stay; our record comes or goes with the layout that it describes."""
    found = origin.custom_metadata
    if not plan.record and not origin.recorded:
        return found
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{plan.source}: custom_metadata is no JSON object, so the layout cannot be recorded there")
    kept = {key: value for key, value in (found or {}).items() if key != RECORD}
    return kept | ({RECORD: dict(plan.record)} if plan.record else {}) or None


def _shardings(plan: Plan, origin: Origin) -> dict[str, str]:
    """What `_sharding` says, by the base64 of the arrays' names."""
    made = {}
    for target in plan.targets:
        if text := sharding_of(target, origin):
            made[_base64(stored_name(target, origin))] = _fitting(text, target.spec.shape) if target.moved else text
    return made


def sharding_of(target: Target, origin: Origin) -> str | None:
    """What the input says of the sharding of a target's first source, as JSON."""
    leaf = origin.leaves.get(_first_source(target, origin))
    text = origin.shardings.get(_base64(leaf.stored)) if leaf else None
    return text if isinstance(text, str) else None


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


def _base64(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _arrays(
    plan: Plan, origin: Origin, first: Mapping[str, str], chunks: Mapping[str, tuple[int, ...]]
) -> list[Mapping[str, Any]]:
    """What Orbax keeps of arrays that were `jax.Array`s."""
    made: list[Mapping[str, Any]] = []
    for target in plan.targets:
        name = target.spec.name
        leaf = origin.leaves.get(first[name])
        if leaf and (was := origin.arrays.get(leaf.stored)) is not None:
            part = _scaled(was["write_shape"], origin.tensors[first[name]].shape, target.spec.shape)
            entry = {**was, "param_name": stored_name(target, origin), "write_shape": part, "chunk_shape": list(chunks[name])}
            made.append({"array_metadata": entry})
    return made
