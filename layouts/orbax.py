"""Read Orbax checkpoints: a directory with `_METADATA`, and arrays that TensorStore reads.

The tree comes from `_METADATA`, shapes and element types from the arrays' own zarr metadata; no data is loaded and neither JAX
nor Orbax is imported. OCDBT or one directory per array, zarr 2 or 3: whatever `_METADATA` says is there.

Source: Orbax 0.12 (`metadata/tree.py`, `serialization/tensorstore_utils.py`), https://google.github.io/tensorstore.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from layouts.checkpoint import DTYPES, TensorSpec, bits, itemsize
from layouts.errors import InputError
from layouts.hf import RECORD, read_json

METADATA = "_METADATA"
STRINGS = "_strings.json"
UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the names of directories that Orbax has not finished; they are no checkpoints and no part of one."""
ITEMS = ("items", "default", "model_params", "model", "params", "state")
"""Names of the item that holds the weights, most likely first, for steps with several items."""
ARRAYS = ("np.ndarray", "jax.Array", "scalar")
EMPTY: Mapping[str, Any] = {"Dict": {}, "List": [], "Tuple": (), "None": None, "NamedTuple": None}
_OWN = (METADATA, STRINGS, "_sharding", "manifest.ocdbt", "d", "ocdbt_data", "ocdbt_meta", "array_metadatas")
_CODES = {name: code for code, name in DTYPES.items()}
CACHE = 128 << 20
"""Bytes of decoded chunks that are kept, beside two of the largest."""
_NODES = 32 << 20
"""Bytes of OCDBT's tree that are kept."""

Key = str | int
"""A dict key or a list index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A node of the tree without children: an array, a scalar, a text or an empty container. `kind` is Orbax's value type."""

    path: tuple[Key, ...]
    kind: str

    @property
    def name(self) -> str:
        """The path as Orbax names arrays."""
        return ".".join(map(str, self.path))


def find_item(path: Path) -> Path | None:
    """The directory with `_METADATA`: `path` itself, an item of the step that `path` is, or of the one step below it.

    Raises:
        InputError: several steps, or several items none of which has a usual name.
    """
    if (path / METADATA).is_file():
        return path
    if (item := _item_of(path)) is not None:
        return item
    steps = {child: item for child in _folders(path) if (item := _item_of(child)) is not None}
    if len(steps) > 1:
        raise InputError(_several(path, steps))
    return next(iter(steps.values()), None)


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


@dataclass(slots=True, kw_only=True)
class OrbaxReader:
    """An open Orbax checkpoint; see `layouts.checkpoint.Reader`. `chunks` is what one read has to decode: name -> shape."""

    path: Path
    item: Path
    leaves: Mapping[str, Leaf]
    tensors: Mapping[str, TensorSpec]
    chunks: Mapping[str, tuple[int, ...]]
    strings: Mapping[str, str]
    custom_metadata: Any
    use_ocdbt: bool
    use_zarr3: bool
    compressed: bool
    _specs: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    format: str = "orbax"
    _context: Any = None
    _stores: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, path: Path, item: Path) -> OrbaxReader:
        """Read the tree and the metadata of every array.

        Raises:
            InputError: something is missing or corrupt, or of a kind that this tool does not know.
        """
        tree = read_json(item / METADATA)
        leaves = _leaves(item, tree)
        ocdbt, zarr3 = tree.get("use_ocdbt"), bool(tree.get("use_zarr3", False))
        use_ocdbt = (item / "manifest.ocdbt").exists() if ocdbt is None else bool(ocdbt)
        complete = bool(tree.get("store_array_data_equal_to_fill_value", False))
        specs = {
            name: _spec(item, name, ocdbt=use_ocdbt, zarr3=zarr3, complete=complete)
            for name, leaf in leaves.items()
            if leaf.kind in ARRAYS
        }
        stores = _open_all(item, specs)
        tensors = {name: _describe(item, name, store) for name, store in stores.items()}
        return cls(
            path=path,
            item=item,
            leaves=leaves,
            tensors=tensors,
            chunks={name: _chunk(store) for name, store in stores.items()},
            strings=_strings(item, leaves),
            custom_metadata=tree.get("custom_metadata"),
            use_ocdbt=use_ocdbt,
            use_zarr3=zarr3,
            compressed=not stores or any("zstd" in json.dumps(s.spec().to_json()["metadata"]) for s in stores.values()),
            _specs=specs,
        )

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What this tool wrote into the item's `custom_metadata` about the layout."""
        return self.custom_metadata.get(RECORD) if isinstance(self.custom_metadata, dict) else None

    @property
    def side_files(self) -> list[str]:
        """Every file but those that Orbax makes for the arrays of the item and those of saves that never finished."""
        return sorted(self._other_files())

    def _other_files(self) -> Iterator[str]:
        own = {*_OWN, *(name.split("/")[0] for name in self.tensors if not self.use_ocdbt)}
        for directory, folders, files in os.walk(self.path):
            here = Path(directory)
            folders[:] = [name for name in folders if UNFINISHED not in name]
            if here == self.item:
                folders[:] = [name for name in folders if name not in own and not name.startswith("ocdbt.process_")]
                files = [name for name in files if name not in own]
            yield from ((here / name).relative_to(self.path).as_posix() for name in files)

    def where(self, name: str) -> str:  # noqa: ARG002
        """The item that holds all arrays."""
        return self.item.name

    def chunk_bytes(self, name: str) -> int:
        """What reading any element of a tensor has to decode and hold."""
        return math.prod(self.chunks[name]) * itemsize(self.tensors[name].dtype)

    def read(self, name: str, slices: tuple[slice, ...]) -> NDArray[Any]:
        """A block as a fresh array of bits; the chunks it lies in stay decoded in a bounded cache.

        Raises:
            InputError: the data is missing or cannot be decoded.
        """
        try:
            block = np.asarray(self._store(name)[slices].read(order="C").result())
        except ValueError as error:
            raise InputError(f"{self.item}: {name} cannot be read: {error}") from None
        return block.view(bits(self.tensors[name].dtype))

    def _store(self, name: str) -> Any:
        with self._lock:
            if name not in self._stores:
                # A checkpoint may hold an array as one chunk: read in parts, it must be decoded once, not once per part, and
                # gate and up are read side by side.
                largest = max(map(self.chunk_bytes, self.tensors), default=0)
                self._context = self._context or _make_context(CACHE + 2 * (largest if largest > CACHE // 4 else 0))
                self._stores[name] = ts.open(self._specs[name], context=self._context).result()
            return self._stores[name]

    def release(self, name: str, slices: tuple[slice, ...]) -> None:
        """Nothing to do: blocks are the caller's own, and the cache is bounded."""

    def close(self) -> None:
        """Forget the open arrays and their cache; reading opens them again."""
        with self._lock:
            self._stores.clear()
            self._context = None


def _leaves(item: Path, tree: Any) -> dict[str, Leaf]:
    try:
        found = [_leaf(entry) for entry in tree["tree_metadata"].values()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{item / METADATA}: not an Orbax tree of a version that this tool knows: {error!r}") from None
    leaves = {leaf.name: leaf for leaf in found}
    if len(leaves) != len(found):
        raise InputError(f"{item / METADATA}: two leaves have the same dotted name")
    if odd := [leaf for leaf in found if leaf.kind not in (*ARRAYS, *EMPTY, "string")]:
        raise InputError(f"{item}: {odd[0].name} is a {odd[0].kind!r}, which this tool cannot carry over")
    return leaves


def _leaf(entry: Any) -> Leaf:
    keys = ((key["key"], key["key_type"]) for key in entry["key_metadata"])
    path = tuple(int(key) if kind == 1 else str(key) for key, kind in keys)
    return Leaf(path=path, kind=entry["value_metadata"]["value_type"])


def _spec(item: Path, name: str, *, ocdbt: bool, zarr3: bool, complete: bool) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{item.resolve()}/"}
    kvstore: dict[str, Any] = {**base, "path": f"{base['path']}{name}/"}
    if ocdbt:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/", "cache_pool": "cache_pool#ocdbt"}
    return {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": kvstore,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        # Where every chunk was stored, one that is not there has been lost; it does not stand for zeros.
        "fill_missing_data_reads": not complete,
    }


def _make_context(cache: int) -> Any:
    return ts.Context({"cache_pool": {"total_bytes_limit": cache}, "cache_pool#ocdbt": {"total_bytes_limit": _NODES}})


def _open_all(item: Path, specs: Mapping[str, Any]) -> dict[str, Any]:
    context = _make_context(0)
    futures = {name: ts.open(spec, open=True, read=True, context=context) for name, spec in specs.items()}
    stores = {}
    for name, future in futures.items():
        try:
            stores[name] = future.result()
        except ValueError as error:
            raise InputError(f"{item}: {name} cannot be opened: {error}") from None
    return stores


def _describe(item: Path, name: str, store: Any) -> TensorSpec:
    if store.dtype.name not in _CODES:
        raise InputError(f"{item}: {name} has element type {store.dtype.name}; known: {', '.join(_CODES)}")
    return TensorSpec(name=name, dtype=_CODES[store.dtype.name], shape=tuple(store.shape))


def _chunk(store: Any) -> tuple[int, ...]:
    shape = store.chunk_layout.read_chunk.shape
    return tuple(map(min, shape, store.shape)) if shape else tuple(store.shape)


def _strings(item: Path, leaves: Mapping[str, Leaf]) -> dict[str, str]:
    names = [name for name, leaf in leaves.items() if leaf.kind == "string"]
    texts = read_json(item / STRINGS) if names else {}
    if lost := [name for name in names if name not in texts]:
        raise InputError(f"{item / STRINGS}: {lost[0]} is not there")
    return {name: str(texts[name]) for name in names}
