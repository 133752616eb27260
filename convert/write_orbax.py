"""Write a plan as an Orbax checkpoint: Orbax itself writes the tree and commits, this module fills the arrays.

Every array is a lazy leaf of the tree that Orbax saves. Its handler opens the array as Orbax's own handler for NumPy arrays
does and fills it chunk by chunk, so that memory is bounded however large an array is; on disk it is an ordinary array.
An interrupted run starts over: Orbax has no notion of half an item.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from convert import manifest
from convert.commit import Stage, copy_file, empty, write_text
from convert.execute import Budget, Progress
from convert.fill_arrays import Filler, LazyArray, LazyScalar, handlers
from convert.planner import Plan, Target
from layouts.errors import InputError
from layouts.hf import RECORD
from layouts.orbax import EMPTY, Key, Leaf, OrbaxReader

WORK = "convert_item"
"""Where Orbax saves below the staging directory; the item is moved to its place when it is complete."""
WITH_ITEM = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax leaves in an item saved by itself; the output has the input's, or none."""


def write(plan: Plan, reader: OrbaxReader, stage: Stage, budget: Budget, progress: Progress) -> None:
    """Fill the staging directory; everything in it is durable on return.

    Raises:
        OSError: the disk is full or failing.
        InputError: data of the input cannot be read.
    """
    # Orbax cannot go on with half an item, so what an interrupted run left is removed, its temporary directories included.
    empty(stage.path)
    work = stage.path.resolve() / WORK
    tree, targets = _tree(plan, reader)
    filler = Filler(targets=targets, reader=reader, budget=budget, progress=progress)
    with filler.running():
        _save(work, tree, reader, filler, _custom_metadata(plan, reader))
    for name in WITH_ITEM:
        (work / name).unlink(missing_ok=True)
    _place(work, stage.path / reader.item.relative_to(reader.path))
    for name in plan.side_files:
        if name != manifest.NAME:
            copy_file(plan.source / name, stage.path / name)
    _sync(stage.path)
    write_text(stage.path / manifest.NAME, manifest.render(plan, filler.digests, None))


def _save(work: Path, tree: Any, reader: OrbaxReader, filler: Filler, custom_metadata: Any) -> None:
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=reader.use_ocdbt,
        use_zarr3=reader.use_zarr3,
        use_compression=reader.compressed,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(*handlers(filler)),
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(work, args=ocp.args.PyTreeSave(tree, custom_metadata=custom_metadata))


def _custom_metadata(plan: Plan, reader: OrbaxReader) -> Any:
    """The input's own entries stay; our record comes or goes with the layout that it describes."""
    found = reader.custom_metadata
    if not plan.record and reader.record is None:
        return found
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{reader.item}: custom_metadata is no JSON object, so the layout cannot be recorded there")
    kept = {key: value for key, value in (found or {}).items() if key != RECORD}
    return kept | ({RECORD: dict(plan.record)} if plan.record else {}) or None


def _tree(plan: Plan, reader: OrbaxReader) -> tuple[Any, dict[str, Target]]:
    """The tree to save, and the target of each array in it by the name that Orbax gives it."""
    leaves: dict[tuple[Key, ...], Any] = {}
    targets = {target.spec.name: target for target in plan.targets}
    for target in plan.targets:
        leaf = reader.leaves[next(target.pieces(target.target.pattern.whole(target.sizes))).source]
        kind = LazyScalar if leaf.kind == "scalar" else LazyArray
        leaves[_path(target.spec.name, leaf)] = kind(name=target.spec.name, spec=target.spec)
    for name, leaf in reader.leaves.items():
        if leaf.kind in EMPTY:
            leaves[leaf.path] = EMPTY[leaf.kind]
        elif leaf.kind == "string":
            leaves[leaf.path] = reader.strings[name]
    return _nest(leaves, reader), targets


def _path(name: str, leaf: Leaf) -> tuple[Key, ...]:
    """Where a target hangs in the tree: below the deepest node of its first source that the two names share."""
    for depth in range(len(leaf.path), 0, -1):
        shared = ".".join(map(str, leaf.path[:depth]))
        if name == shared:
            return leaf.path[:depth]
        if name.startswith(shared + "."):
            return (*leaf.path[:depth], *name[len(shared) + 1 :].split("."))
    return tuple(name.split("."))


def _nest(leaves: Mapping[tuple[Key, ...], Any], reader: OrbaxReader) -> Any:
    """Dicts and lists from paths."""
    if () in leaves:
        return leaves[()]
    below: dict[Key, dict[tuple[Key, ...], Any]] = {}
    for path, value in leaves.items():
        below.setdefault(path[0], {})[path[1:]] = value
    nested = {key: _nest(inner, reader) for key, inner in below.items()}
    if not all(isinstance(key, int) for key in nested):
        return nested
    if sorted(nested, key=int) != list(range(len(nested))):
        raise InputError(f"{reader.item}: a list in the tree has gaps: it has entries {list(nested)}")
    return [nested[i] for i in range(len(nested))]


def _place(work: Path, item: Path) -> None:
    """Move the finished item to where the input has it; when that is the checkpoint itself, its entries move up."""
    if item == work.parent or item.resolve() == work.parent:
        for entry in work.iterdir():
            os.rename(entry, item / entry.name)
        work.rmdir()
        return
    item.parent.mkdir(parents=True, exist_ok=True)
    os.rename(work, item)


def _sync(path: Path) -> None:
    """Make all files durable: the arrays were written without a sync each, which costs more than one at the end."""
    for directory, _, files in os.walk(path):
        for name in files:
            with open(os.path.join(directory, name), "rb") as file:
                os.fsync(file.fileno())
