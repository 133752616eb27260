"""Read Orbax checkpoints: trees of arrays, as MaxText trains and saves them.

Names, shapes and tree come from Orbax's own metadata. Data is read through TensorStore in slices, never a whole leaf, with a
cache because an unsharded leaf is one zarr chunk, which would else be decompressed again for every slice.

Source: layouts of files in orbax-checkpoint 0.12 (`_METADATA`, OCDBT or one directory per array, zarr 2 or 3).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from layouts.checkpoint import DTYPES, TensorSpec, bits
from layouts.errors import InputError

METADATA = "_METADATA"
RECORD = "moe_layout"
"""The key under which our record stands in the `custom_metadata` of `_METADATA`."""
CACHE = 1 << 30
"""Bytes of decompressed chunks to keep."""
_CODES = {name: code for code, name in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of the tree that holds numbers: its dotted name, and whether it is a Python scalar rather than an array."""

    name: str
    scalar: bool


def find_item(path: Path) -> Path | None:
    """The directory with Orbax's `_METADATA` at or below `path`: an item, a step with one, or a run with one step.

    Raises:
        InputError: there are several.
    """
    found = [file.parent for depth in ("", "*/", "*/*/") for file in sorted(path.glob(depth + METADATA))]
    if len(found) > 1:
        names = ", ".join(item.relative_to(path).as_posix() for item in found)
        raise InputError(f"{path}: several Orbax checkpoints lie here ({names}); give the directory of one step")
    return found[0] if found else None


@dataclass(slots=True, kw_only=True)
class OrbaxReader:
    """An open Orbax checkpoint; see `layouts.checkpoint.Reader`. `tree` has a `Leaf` where the checkpoint has numbers."""

    path: Path
    item: Path
    tree: Any
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    config: Mapping[str, Any] = field(default_factory=dict)
    format: str = "orbax"
    _context: Any
    _stores: dict[str, Any] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, path: Path, item: Path) -> OrbaxReader:
        """Read the metadata of the item.

        Raises:
            InputError: it is corrupt, or has a leaf of a kind that this tool does not know.
        """
        import orbax.checkpoint as ocp
        from etils import epath

        try:
            metadata = json.loads((item / METADATA).read_text())
            found = ocp.PyTreeCheckpointHandler().metadata(epath.Path(item.absolute())).tree
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{item}: not a sound Orbax checkpoint: {error}") from None
        specs: dict[str, TensorSpec] = {}
        tree = _walk(item, found, (), _kinds(metadata), specs)
        context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE}})
        return cls(path=path, item=item, tree=tree, metadata=metadata, tensors=specs, _context=context)

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What this tool wrote into the custom metadata about the layout."""
        return (self.metadata.get("custom_metadata") or {}).get(RECORD)

    @property
    def side_files(self) -> Sequence[str]:
        """Every file outside the item: step metadata, iterator states, whatever the user keeps there."""
        files = (p for p in sorted(self.path.rglob("*")) if p.is_file() and self.item not in p.parents)
        return [file.relative_to(self.path).as_posix() for file in files]

    def where(self, name: str) -> str:
        """The item's directory: Orbax decides in which file a tensor lies."""
        return f"{self.item.name}, {name}" if name not in self.tensors else self.item.name

    def read(self, name: str, slices: tuple[slice, ...]) -> NDArray[Any]:
        """Read and decompress a block; the result is the caller's own."""
        block = np.asarray(self._store(name)[slices].read().result(), order="C")
        return block.view(bits(self.tensors[name].dtype))

    def _store(self, name: str) -> Any:
        with self._lock:
            if name not in self._stores:
                self._stores[name] = ts.open(self._spec(name), read=True, context=self._context).result()
            return self._stores[name]

    def _spec(self, name: str) -> dict[str, Any]:
        base = self.item.absolute().as_posix()
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{base}/{name}/"}
        if self.metadata.get("use_ocdbt", True):
            kvstore = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{name}/"}
        driver = "zarr3" if self.metadata.get("use_zarr3") else "zarr"
        return {"driver": driver, "kvstore": kvstore, "recheck_cached_data": "open"}

    def release(self, name: str) -> None:
        """Nothing to do: blocks are the caller's own, and the cache has its bound."""

    def close(self) -> None:
        """Let go of the stores and of the cache with them."""
        self._stores.clear()


def _kinds(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Orbax's word for what each leaf is: `np.ndarray`, `jax.Array`, `scalar`, `string`, `None`, `Dict`, ..."""
    entries = metadata["tree_metadata"].values()
    return {".".join(k["key"] for k in e["key_metadata"]): e["value_metadata"]["value_type"] for e in entries}


def _walk(item: Path, node: Any, path: tuple[str, ...], kinds: Mapping[str, str], specs: dict[str, TensorSpec]) -> Any:
    """Copy the tree with a `Leaf` for everything that holds numbers, and collect their specs."""
    name = ".".join(path)
    if isinstance(node, Mapping):
        return {key: _walk(item, child, (*path, str(key)), kinds, specs) for key, child in node.items()}
    if isinstance(node, (list, tuple)):
        return [_walk(item, child, (*path, str(i)), kinds, specs) for i, child in enumerate(node)]
    if node is None:
        return None
    if kinds.get(name) not in ("np.ndarray", "jax.Array", "scalar"):
        raise InputError(f"{item}: {name} is a {kinds.get(name)}; only arrays and numbers can be converted")
    dtype = np.dtype(node.dtype).name
    if dtype not in _CODES:
        raise InputError(f"{item}: {name} has element type {dtype}, which is not supported")
    specs[name] = TensorSpec(name=name, dtype=_CODES[dtype], shape=tuple(node.shape))
    return Leaf(name, kinds[name] == "scalar")
