"""Read Orbax checkpoints: a directory with `_METADATA`, and arrays that TensorStore reads.

In: a directory and its item. Out: a reader. It never writes, and imports neither JAX nor Orbax.

The tree comes from `_METADATA`, shapes and element types from the arrays' own zarr metadata; no data is loaded. OCDBT (of one
process or merged of many) or one directory per array, zarr 2 or 3: whatever is there.

Source: Orbax 0.12 (`metadata/tree.py`, `serialization/tensorstore_utils.py`), https://google.github.io/tensorstore.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from layouts.disk.faults import answer, told
from layouts.disk.files import CONFIG, RECORD, check_regular, manifest_record, read_object
from layouts.disk.places import is_remote
from layouts.disk.pread import Empty
from layouts.orbax.arrays import chunk_of, decoded_size, describe, make_context, open_all, read_by_chunks, spec_of
from layouts.orbax.beside import files_beside
from layouts.orbax.codec import says_its_length, streamable
from layouts.orbax.lengths import check_chunks, check_metadata, check_stored, check_total, chunks_under
from layouts.orbax.stream import ChunkStreams
from layouts.orbax.tree import ARRAYS, COMPLETE, METADATA, Leaf, check_finished, find_item, read_leaves, read_strings
from layouts.reader import ReadLimits, ReadUnit
from layouts.side_files import SideFiles
from layouts.tensors import TensorSpec, bits, itemsize
from layouts.windows import Windows

__all__ = ["Leaf", "OrbaxReader", "find_item"]


@dataclass(slots=True, kw_only=True)
class OrbaxReader:
    """An open Orbax checkpoint; see `layouts.reader.Reader`. `chunks` is what one read has to decode: name -> shape.

    These end where the array does; `decoded` are the bytes of whole ones, as TensorStore decodes them.
    `grids` are the arrays' own zarr metadata; in a `complete` checkpoint every chunk was stored, also those of zeros alone.
    """

    path: Path
    item: Path
    leaves: Mapping[str, Leaf]
    tensors: Mapping[str, TensorSpec]
    chunks: Mapping[str, tuple[int, ...]]
    decoded: Mapping[str, int]
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
    windows: Windows = field(default_factory=Windows, compare=False)
    _context: Any = None
    _stores: dict[str, Any] = field(default_factory=dict)
    _values: dict[str, Any] = field(default_factory=dict)
    _seen: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _side: SideFiles | None = field(default=None, compare=False)

    @classmethod
    def open(cls, path: Path, item: Path) -> OrbaxReader:
        """Read the tree and the metadata of every array.

        Raises:
            InputError: something is missing or corrupt, or of a kind that this tool does not know.
        """
        check_finished(item)
        if not is_remote(item):
            check_regular(item)
        tree = read_object(item / METADATA)
        leaves = read_leaves(item, tree)
        ocdbt, zarr3 = tree.get("use_ocdbt"), bool(tree.get("use_zarr3", False))
        use_ocdbt = (item / "manifest.ocdbt").exists() if ocdbt is None else bool(ocdbt)
        complete = bool(tree.get(COMPLETE, False))
        specs = {
            name: spec_of(item, leaf.stored, ocdbt=use_ocdbt, zarr3=zarr3, complete=complete)
            for name, leaf in leaves.items()
            if leaf.kind in ARRAYS
        }
        check_metadata(item, [leaves[name] for name in specs], ocdbt=use_ocdbt, zarr3=zarr3)
        stores = open_all(item, specs)
        tensors = {name: describe(item, name, store) for name, store in stores.items()}
        metadata = {name: store.spec().to_json()["metadata"] for name, store in stores.items()}
        if not use_ocdbt:
            check_chunks(item, {name: leaves[name].stored for name in specs}, metadata, tensors)
        check_total(item, tensors.values())
        return cls(
            path=path,
            item=item,
            leaves=leaves,
            tensors=tensors,
            chunks={name: chunk_of(store) for name, store in stores.items()},
            decoded={name: decoded_size(store) for name, store in stores.items()},
            grids=metadata,
            streamable={name: streamable(found) for name, found in metadata.items()},
            compressed={name: "zstd" in str(found) for name, found in metadata.items()},
            strings=read_strings(item, leaves),
            config=read_object(path / CONFIG) if (path / CONFIG).is_file() else {},
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
    def records(self) -> Mapping[str, Any]:
        """What the manifest says."""
        return manifest_record(self.path) if self.record is not None else {}  # a run that goes on saves none

    @property
    def side_files(self) -> SideFiles:
        """Every file but those that Orbax makes for the arrays of the item and those of saves that never finished."""
        if self._side is None:
            own = () if self.use_ocdbt else (leaf.stored for leaf in self.leaves.values())
            self._side = files_beside(self.path, self.item, own)
        return self._side

    def where(self, name: str) -> str:  # noqa: ARG002
        """The item that holds all arrays."""
        return self.item.name

    @property
    def headers(self) -> Mapping[str, str]:
        """None: files are not made again from a tree."""
        return {}

    def unit(self, name: str) -> ReadUnit:
        """A chunk."""
        return ReadUnit(shape=self.chunks[name], nbytes=self.decoded[name], streamable=self.streamable[name])

    def extent(self, name: str) -> None:
        """None: chunks are decoded."""

    def extents(self, names: Sequence[str]) -> None:
        """None, too."""

    def hold(self, limits: ReadLimits, windows: Windows) -> None:
        """Begin anew: arrays are opened again, with a cache of another size."""
        self.close()
        self.limits, self.windows = limits, windows

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:  # noqa: ARG002
        """A block as an array of bits; the chunks it lies in stay decoded in a bounded cache, in windows, or are streamed.

        Raises:
            InputError: the data is missing or cannot be decoded.
        """
        spec = self.tensors[name]
        slices = tuple(slice(*part.indices(size)) for part, size in zip(slices, spec.shape, strict=True))
        held = self.windows.read(name, slices, itemsize(spec.dtype), self._load_window)
        return self._load(name, slices) if held is None else held

    def _load(self, name: str, slices: tuple[slice, ...], some: int = 0) -> NDArray[Any]:
        """The same, as it is stored; of a window, not more chunks at a time than `some`."""
        dtype = bits(self.tensors[name].dtype)
        with told(self.item, name):
            store = self._store(name)
            if isinstance(store, ChunkStreams):
                block = store.read(slices, dtype)
                self._forget_streams()
                return block
            self._check_lengths(name, slices)
            if not some:
                return np.asarray(answer(store[slices].read(order="C"))).view(dtype)
            return read_by_chunks(store, slices, self.chunks[name], some).view(dtype)

    def _check_lengths(self, name: str, slices: tuple[slice, ...]) -> None:
        """Look once at how long each chunk of a block is, where a database or the chunk itself may say what it likes."""
        if self.use_ocdbt or says_its_length(self.grids[name]):
            seen = self._seen.setdefault(name, set())
            fresh = [at for at in chunks_under(self.grids[name], slices) if at not in seen]
            check_stored(self.values(name), self.grids[name], self.tensors[name], fresh, self.item)
            seen.update(fresh)

    def _load_window(self, name: str, slices: tuple[slice, ...]) -> NDArray[Any]:
        within = tuple(slice(p.start, min(p.stop, size)) for p, size in zip(slices, self.tensors[name].shape, strict=True))
        return self._load(name, within, self.limits.at_once)

    def values(self, name: str) -> Any:
        """What is stored for an array, by key, as TensorStore's key-value store has it: nothing is decoded."""
        with self._lock:
            self._context = self._context or make_context(self._cache(), self.limits.threads)
            if name not in self._values:
                self._values[name] = answer(ts.KvStore.open(self._specs[name]["kvstore"], context=self._context))
            return self._values[name]

    def shard(self, name: str, key: str, form: Mapping[str, Any]) -> Any:
        """The chunks in a stored shard, by key: nothing is decoded but its index, of this `form` (in TensorStore's words)."""
        base = (self.values(name) + key).spec().to_json()
        return answer(ts.KvStore.open({"driver": "zarr3_sharding_indexed", "base": base, **form}, context=self._context))

    def _store(self, name: str) -> Any:
        with self._lock:
            store = self._stores.pop(name, None)
            if store is None:
                self._context = self._context or make_context(self._cache(), self.limits.threads)
                store = answer(ts.open(self._specs[name], context=self._context))
                if self.unit(name).streams(self.limits.stream):
                    store = ChunkStreams.of(store)
            self._stores[name] = store  # the last one used stands last
            return store

    def _forget_streams(self) -> None:
        """Of many arrays, only those that were read last may hold streams."""
        with self._lock:
            held = {name: len(store.streams) for name, store in self._stores.items() if isinstance(store, ChunkStreams)}
            for name in list(held)[:-1]:
                if sum(held.values()) > self.limits.streams:
                    del self._stores[name], held[name]

    def _cache(self) -> int:
        """A chunk that is read in parts must be decoded once, not once per part, and gate and up are read side by side."""
        units = map(self.unit, self.tensors)
        whole = [unit.nbytes for unit in units if not unit.streams(self.limits.stream)]
        return max(self.limits.cache, 2 * max(whole, default=0) + 4096)

    def close(self) -> None:
        """Forget the open arrays and their cache; reading opens them again."""
        with self._lock:
            self._stores.clear()
            self._values.clear()
            self.windows = Windows()
            self._context = None
