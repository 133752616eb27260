"""The tree of an Orbax item: where it is, which leaves it has, and what Orbax says about each. Data is not read here.

In: an item's directory. Out: its leaves. It never reads data.

Source: Orbax 0.12 `metadata/tree.py`, `metadata/value_metadata_entry.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts.disk.files import read_json
from layouts.disk.names import key
from layouts.errors import InputError

METADATA = "_METADATA"
STRINGS = "_strings.json"
STEP, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
"""What Orbax keeps beside the items of a step: what its user said of it, and that it is complete."""
UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the names of directories that Orbax has not finished; they are no checkpoints and no part of one."""
ITEMS = ("items", "default", "model_params", "model", "params", "state", "pytree")
"""Names of the item that holds the weights, most likely first, for steps with several items."""
ARRAYS = ("np.ndarray", "jax.Array", "scalar")
EMPTY = ("Dict", "List", "Tuple", "None", "NamedTuple")
BOX = "value"
COMPLETE = "store_array_data_equal_to_fill_value"
"""Whether chunks of zeros were stored as well, so that one that is not there has been lost."""
PROCESS = "ocdbt.process_"
"""Part of the names of the databases that the processes of a run wrote, below the one that joins them."""
DATABASE = ("manifest.ocdbt", "d", "ocdbt_data", "ocdbt_meta")
"""What an item's OCDBT database consists of, besides those of single processes."""
OWN = (METADATA, STRINGS, "_sharding", "array_metadatas", *DATABASE)
"""What Orbax makes for the arrays of an item, besides a directory for each array or process."""

Key = str | int
"""A dict key or a list index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A node of the tree without children: an array, a scalar, a text or an empty container.

    `kind` is Orbax's value type, and `entry` all that `_METADATA` says: `key_metadata` (the path, with the kind of each key: 1
    for an index, 2 for a name) and `value_metadata`.
    """

    path: tuple[Key, ...]
    kind: str
    entry: Mapping[str, Any]

    @property
    def boxed(self) -> bool:
        """Whether it is the `value` of a Flax variable or box, as NNX and partitioned Linen modules save arrays."""
        return self.kind in ARRAYS and len(self.path) > 1 and self.path[-1] == BOX

    @property
    def stored(self) -> str:
        """The path as Orbax names arrays."""
        return ".".join(map(str, self.path))

    @property
    def name(self) -> str:
        """The same without the box, so that the tables need not know of it."""
        return ".".join(map(str, self.path[:-1] if self.boxed else self.path))


def find_item(path: Path) -> Path | None:
    """The directory with `_METADATA`: `path` itself, an item of the step that `path` is, or of the one step below it.

    Raises:
        InputError: several steps, or several items none of which has a usual name.
    """
    if unfinished := next((part for part in (path.name, path.resolve().name, path.parent.name) if UNFINISHED in part), None):
        raise InputError(f"{path}: {unfinished} is what Orbax calls a directory that it has not finished; parts may be missing")
    if (path / METADATA).is_file():
        return path
    if (item := _item_of(path)) is not None:
        return item
    steps = {child: item for child in _folders(path) if (item := _item_of(child)) is not None}
    if len(steps) > 1:
        raise InputError(_several(path, steps))
    return next(iter(steps.values()), None)


def check_finished(item: Path) -> None:
    """In `gs://`, where nothing is renamed, Orbax says in a file that it has finished.

    Raises:
        InputError: it has not.
    """
    places = (item, item.parent)
    if str(item).startswith("gs://") and not any((place / COMMITTED).is_file() for place in places):
        raise InputError(
            f"{item}: no {COMMITTED} there or above: whoever wrote it has not finished, so that parts may be missing"
        )


def _item_of(step: Path) -> Path | None:
    found = [child for child in _folders(step) if (child / METADATA).is_file()]
    usual = [step / name for name in ITEMS if step / name in found]
    if len(found) > 1 and not usual:
        raise InputError(_several(step, found))
    return next(iter(usual or found), None)


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and UNFINISHED not in child.name)


def _several(path: Path, found: Iterable[Path]) -> str:
    names = ", ".join(sorted((child.name for child in found), key=lambda name: (len(name), name)))
    return f"{path} holds several checkpoints: {names}. Pick one and give its path, for instance {min(found)}"


def read_leaves(item: Path, tree: Any) -> dict[str, Leaf]:
    """The leaves by name, in their order.

    Raises:
        InputError: the tree is damaged, or has leaves of a kind that this tool does not know, or whose name leads elsewhere.
    """
    try:
        found = [_leaf(entry) for entry in tree["tree_metadata"].values()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{item / METADATA}: not an Orbax tree of a version that this tool knows: {error!r}") from None
    for leaf in found:
        if leaf.kind in ARRAYS:
            key(leaf.stored, item / METADATA)
    leaves = {leaf.name: leaf for leaf in found}
    if len(leaves) != len(found):
        raise InputError(f"{item / METADATA}: two leaves have the same dotted name")
    if odd := [leaf for leaf in found if leaf.kind not in (*ARRAYS, *EMPTY, "string")]:
        raise InputError(f"{item}: {odd[0].name} is a {odd[0].kind!r}, which this tool cannot carry over")
    return leaves


def _leaf(entry: Any) -> Leaf:
    keys = [(key["key"], key["key_type"]) for key in entry["key_metadata"]]
    if odd := [kind for _, kind in keys if isinstance(kind, list | dict)]:
        raise TypeError(f"key_type is {odd[0]!r}, which is no kind of a key")
    path = tuple(int(key) if kind == 1 else str(key) for key, kind in keys)
    return Leaf(path=path, kind=str(entry["value_metadata"]["value_type"]), entry=entry)


def read_strings(item: Path, leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """The leaves that are texts.

    Raises:
        InputError: one is missing.
    """
    names = [name for name, leaf in leaves.items() if leaf.kind == "string"]
    texts = read_json(item / STRINGS) if names else {}
    if lost := [name for name in names if name not in texts]:
        raise InputError(f"{item / STRINGS}: {lost[0]} is not there")
    return {name: str(texts[name]) for name in names}
