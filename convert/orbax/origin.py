"""What an Orbax output takes over from its input.

In: an open checkpoint. Out: `Origin`, which has a default for inputs of another format. It never writes.
The defaults are those of MaxText: OCDBT, zarr 3, compressed, arrays below dict keys.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.options.values import positive
from layouts.disk.files import RECORD, read_bytes, read_json, read_object
from layouts.disk.places import place
from layouts.errors import InputError
from layouts.orbax.reader import OrbaxReader
from layouts.orbax.tree import STRINGS, Leaf, find_item
from layouts.reader import Reader
from layouts.tensors import TensorSpec

SHARDING, CHUNKS = "_sharding", "array_metadatas"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How the input is stored, and what Orbax keeps beside its arrays.

    `place` is the item in the checkpoint, `leaves` and `tensors` are by name. `texts` is the content of `_strings.json`.
    `shardings` are by the base64 of stored names, `arrays` (what Orbax keeps of a `jax.Array`) by stored name.
    """

    place: Path = Path("0/items")
    ocdbt: bool = True
    zarr3: bool = True
    tree: Mapping[str, Any] = field(default_factory=lambda: {"use_ocdbt": True, "use_zarr3": True})
    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    compressed: Mapping[str, bool] = field(default_factory=dict)
    texts: str | None = None
    shardings: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def custom_metadata(self) -> Any:
        """What the user gave Orbax to keep with the item."""
        return self.tree.get("custom_metadata")

    @property
    def recorded(self) -> bool:
        """Whether this tool's record is among it."""
        return isinstance(self.custom_metadata, dict) and RECORD in self.custom_metadata


def origin_of(reader: Reader) -> Origin:
    """What this checkpoint hands on; MaxText's defaults if it is no Orbax checkpoint.

    Raises:
        InputError: what stands beside the arrays is damaged.
    """
    if not isinstance(reader, OrbaxReader):
        return Origin()
    item = reader.item
    return Origin(
        place=item.relative_to(reader.path),
        ocdbt=reader.use_ocdbt,
        zarr3=reader.use_zarr3,
        tree=reader.tree,
        leaves=reader.leaves,
        tensors=reader.tensors,
        compressed=reader.compressed,
        texts=_text(item / STRINGS) if (item / STRINGS).exists() else None,
        shardings=read_object(item / SHARDING) if (item / SHARDING).exists() else {},
        arrays=_arrays(item),
    )


def _text(path: Path) -> str:
    """A small file as it is.

    Raises:
        InputError: it is too large, or no text.
    """
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: it is no text: {error.reason} at byte {error.start}") from None


def read_shardings(path: str | Path) -> tuple[dict[str, int], dict[str, str]]:
    """What devices said of the arrays that they saved: their mesh, and the sharding of each array by its name, in Orbax' JSON.

    `path` is a checkpoint, or its file `_sharding`. Source: orbax-checkpoint 0.12.8, `NamedShardingMetadata`:
    `{"sharding_type", "shape", "axis_names", "partition_spec"}`, as text, by the base64 of the name.

    Raises:
        InputError: there is no such file, it is damaged, or its arrays lie on several meshes.
    """
    file = _sharding_file(place(path))
    meshes, found = set(), {}
    try:
        for encoded, text in read_object(file).items():
            said = json.loads(text)
            if said["sharding_type"] == "NamedSharding":
                found[base64.b64decode(encoded, validate=True).decode()] = text
                meshes.add(tuple(sorted(zip(said["axis_names"], map(positive, said["shape"]), strict=True))))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file}: it does not say how arrays were sharded: {type(error).__name__}: {error}") from None
    if len(meshes) != 1:
        raise InputError(f"{file}: its arrays lie on {len(meshes) or 'no'} meshes, not on one; say which with --mesh")
    return dict(*meshes), found


def _sharding_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    item = find_item(path)
    if item is None or not (item / SHARDING).exists():
        raise InputError(f"{path}: no Orbax checkpoint with a file {SHARDING}; it has one if a sharded `jax.Array` was saved")
    return item / SHARDING


def _arrays(item: Path) -> dict[str, Mapping[str, Any]]:
    """All processes wrote the same of each array, so that one of their files is enough."""
    found: dict[str, Mapping[str, Any]] = {}
    if isinstance(item, Path) and os.path.lexists(folder := item / CHUNKS) and (folder.is_symlink() or not folder.is_dir()):
        raise InputError(f"{folder}: no directory, or a link to one; put what it stands for in its place")
    for file in sorted(_processes(item / CHUNKS)):
        for entry in read_json(file)["array_metadatas"]:
            found[entry["array_metadata"]["param_name"]] = entry["array_metadata"]
    return found


def _processes(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.name.startswith("process_")] if folder.is_dir() else []
