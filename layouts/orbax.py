"""Read Orbax checkpoints: a directory with `_METADATA`, and arrays that TensorStore reads.

The tree comes from `_METADATA`, shapes and element types from the arrays' own zarr metadata; no data is loaded and neither JAX
nor Orbax is imported. OCDBT (of one process or merged of many) or one directory per array, zarr 2 or 3: whatever is there.

Source: Orbax 0.12 (`metadata/tree.py`, `serialization/tensorstore_utils.py`), https://google.github.io/tensorstore.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from layouts.checkpoint import DTYPES, TensorSpec, bits, itemsize
from layouts.errors import InputError
from layouts.hf import RECORD, read_json
from layouts.orbax_codec import streamable
from layouts.orbax_stream import ChunkStreams
from layouts.orbax_tree import ARRAYS, METADATA, OWN, PROCESS, UNFINISHED, Leaf, find_item, read_leaves, read_strings
from layouts.places import kvstore_of, names_of

__all__ = ["Leaf", "OrbaxReader", "ReadLimits", "find_item"]

_CODES = {name: code for code, name in DTYPES.items()}
NODES = 16 << 20
"""Bytes of OCDBT's tree that are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """What reading may hold, in bytes.

    `cache` is for decoded chunks, `stream` the size above which a chunk is not decoded as a whole but piece by piece, as far
    as its codec can be. `threads` decode at a time.
    """

    cache: int = 256 << 20
    stream: int = 512 << 20
    threads: int | None = None


@dataclass(slots=True, kw_only=True)
class OrbaxReader:
    """An open Orbax checkpoint; see `layouts.checkpoint.Reader`. `chunks` is what one read has to decode: name -> shape.

    `grids` are the arrays' own zarr metadata; in a `complete` checkpoint every chunk was stored, also those of zeros alone.
    """

    path: Path
    item: Path
    leaves: Mapping[str, Leaf]
    tensors: Mapping[str, TensorSpec]
    chunks: Mapping[str, tuple[int, ...]]
    grids: Mapping[str, Mapping[str, Any]]
    streamable: Mapping[str, bool]
    compressed: Mapping[str, bool]
    strings: Mapping[str, str]
    tree: Mapping[str, Any]
    use_ocdbt: bool
    use_zarr3: bool
    complete: bool
    _specs: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    format: str = "orbax"
    limits: ReadLimits = field(default_factory=ReadLimits)
    _context: Any = None
    _stores: dict[str, Any] = field(default_factory=dict)
    _values: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, path: Path, item: Path) -> OrbaxReader:
        """Read the tree and the metadata of every array.

        Raises:
            InputError: something is missing or corrupt, or of a kind that this tool does not know.
        """
        tree = read_json(item / METADATA)
        leaves = read_leaves(item, tree)
        ocdbt, zarr3 = tree.get("use_ocdbt"), bool(tree.get("use_zarr3", False))
        use_ocdbt = (item / "manifest.ocdbt").exists() if ocdbt is None else bool(ocdbt)
        complete = bool(tree.get("store_array_data_equal_to_fill_value", False))
        specs = {
            name: _spec(item, leaf.stored, ocdbt=use_ocdbt, zarr3=zarr3, complete=complete)
            for name, leaf in leaves.items()
            if leaf.kind in ARRAYS
        }
        stores = _open_all(item, specs)
        metadata = {name: store.spec().to_json()["metadata"] for name, store in stores.items()}
        return cls(
            path=path,
            item=item,
            leaves=leaves,
            tensors={name: _describe(item, name, store) for name, store in stores.items()},
            chunks={name: _chunk(store) for name, store in stores.items()},
            grids=metadata,
            streamable={name: streamable(found) for name, found in metadata.items()},
            compressed={name: "zstd" in str(found) for name, found in metadata.items()},
            strings=read_strings(item, leaves),
            tree=tree,
            use_ocdbt=use_ocdbt,
            use_zarr3=zarr3,
            complete=complete,
            _specs=specs,
        )

    @property
    def custom_metadata(self) -> Any:
        """What the user gave Orbax to keep with the item."""
        return self.tree.get("custom_metadata")

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What this tool wrote into the item's `custom_metadata` about the layout."""
        found = self.custom_metadata
        return found.get(RECORD) if isinstance(found, dict) else None

    @property
    def side_files(self) -> list[str]:
        """Every file but those that Orbax makes for the arrays of the item and those of saves that never finished."""
        return sorted(self._other_files())

    def _other_files(self) -> Iterator[str]:
        own = {*OWN, *(leaf.stored.split("/")[0] for leaf in self.leaves.values() if not self.use_ocdbt)}
        item = self.item.relative_to(self.path).parts
        for name in names_of(self.path):
            folders = PurePosixPath(name).parts
            first = folders[len(item)] if folders[: len(item)] == item else ""
            if first not in own and not first.startswith(PROCESS) and not any(UNFINISHED in part for part in folders[:-1]):
                yield name

    def where(self, name: str) -> str:  # noqa: ARG002
        """The item that holds all arrays."""
        return self.item.name

    def chunk_bytes(self, name: str) -> int:
        """What reading any element of a tensor has to decode."""
        return math.prod(self.chunks[name]) * itemsize(self.tensors[name].dtype)

    def streams(self, name: str) -> bool:
        """Whether a tensor's chunks are read piece by piece."""
        return self.streamable[name] and self.chunk_bytes(name) > self.limits.stream

    def read(self, name: str, slices: tuple[slice, ...]) -> NDArray[Any]:
        """A block as a fresh array of bits; the chunks it lies in stay decoded in a bounded cache, or are streamed.

        Raises:
            InputError: the data is missing or cannot be decoded.
        """
        dtype = bits(self.tensors[name].dtype)
        try:
            store = self._store(name)
            if isinstance(store, ChunkStreams):
                return store.read(slices, dtype)
            block = np.asarray(store[slices].read(order="C").result())
        except ValueError as error:
            raise InputError(f"{self.item}: {name} cannot be read: {error}") from None
        return block.view(dtype)

    def values(self, name: str) -> Any:
        """What is stored for an array, by key, as TensorStore's key-value store has it: nothing is decoded."""
        with self._lock:
            self._context = self._context or _make_context(self._cache(), self.limits.threads)
            if name not in self._values:
                self._values[name] = ts.KvStore.open(self._specs[name]["kvstore"], context=self._context).result()
            return self._values[name]

    def _store(self, name: str) -> Any:
        with self._lock:
            store = self._stores.pop(name, None)
            if store is None:
                self._context = self._context or _make_context(self._cache(), self.limits.threads)
                store = ts.open(self._specs[name], context=self._context).result()
                if self.streams(name):
                    store = ChunkStreams.of(store)
                    self._forget_streams()
            self._stores[name] = store  # the last one used stands last
            return store

    def _forget_streams(self) -> None:
        """Of thousands of arrays, only those that are being read may hold a stream."""
        streams = [name for name, store in self._stores.items() if isinstance(store, ChunkStreams)]
        for name in streams[: -2 * (self.limits.threads or 4)]:
            del self._stores[name]

    def _cache(self) -> int:
        """A chunk that is read in parts must be decoded once, not once per part, and gate and up are read side by side."""
        whole = [self.chunk_bytes(name) for name in self.tensors if not self.streams(name)]
        return max(self.limits.cache, 2 * max(whole, default=0) + 4096)

    def release(self, name: str, slices: tuple[slice, ...]) -> None:
        """Nothing to do: blocks are the caller's own, and the cache is bounded."""

    def close(self) -> None:
        """Forget the open arrays and their cache; reading opens them again."""
        with self._lock:
            self._stores.clear()
            self._values.clear()
            self._context = None


def _spec(item: Path, name: str, *, ocdbt: bool, zarr3: bool, complete: bool) -> dict[str, Any]:
    base = kvstore_of(item)
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


def _make_context(cache: int, threads: int | None) -> Any:
    shared = {"limit": threads} if threads else {}
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": cache},
            "cache_pool#ocdbt": {"total_bytes_limit": NODES},
            "data_copy_concurrency": shared,
            "file_io_concurrency": shared,
            "gcs_request_concurrency": shared,
            "s3_request_concurrency": shared,
        }
    )


def _open_all(item: Path, specs: Mapping[str, Any]) -> dict[str, Any]:
    context = _make_context(0, None)
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
