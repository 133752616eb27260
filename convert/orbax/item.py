"""The directory of an Orbax item that is written: databases of batches that one manifest joins, or a directory per array.

In: batches of portions. Out: stored arrays, joined and durable. It never reads the input.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorstore as ts

from convert.commit.durable import remove
from convert.orbax.budget import FLYING, OrbaxBudget
from convert.orbax.chunks import Chunking
from convert.orbax.metadata import stored_name
from convert.orbax.origin import Origin
from convert.orbax.portions import Portion
from layouts.orbax.arrays import NODES
from layouts.orbax.chunks import LOCK
from layouts.orbax.tree import PROCESS
from layouts.places import is_remote, kvstore_of
from layouts.tensors import DTYPES

_LEVEL = 1
"""zstd's: on bfloat16 weights higher ones take longer for the same size."""
_NODE = 64 << 10
"""Bytes of a node of a batch's tree: small, because each commit writes those that change anew."""
_JOINED = 1 << 13
"""Chunks whose names are joined at once: until these are written, they are in memory."""


@dataclass(slots=True, kw_only=True)
class Item:
    """The item's directory, and how its arrays are stored."""

    path: Path
    origin: Origin
    budget: OrbaxBudget
    _base: Path | None = None
    _context: Any = field(default=None)

    def begin(self, number: int, batch: Sequence[Portion]) -> None:
        """A new batch; what an interrupted run left of it goes, or is written over by files of the same names."""
        whole = batch if self.origin.ocdbt else [portion for portion in batch if portion.rows is None]
        for path in self.paths(number, whole):
            remove(path)
        self._base = self.paths(number, batch)[0] if self.origin.ocdbt else self.path
        # No sync per write: a batch is synced as a whole.
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "cache_pool#ocdbt": {"total_bytes_limit": NODES},
                "data_copy_concurrency": {"limit": max(2, self.budget.jobs)},
                "file_io_concurrency": {"limit": max(2, self.budget.jobs)},
                "file_io_sync": False,
                "gcs_request_concurrency": {"limit": max(2, self.budget.jobs)},
                "s3_request_concurrency": {"limit": max(2, self.budget.jobs)},
            }
        )

    def paths(self, number: int, batch: Sequence[Portion]) -> list[Path]:
        """The directories of a batch."""
        if self.origin.ocdbt:
            return [self.path / f"{PROCESS}{number}"]
        return [self.path / stored_name(portion.target, self.origin) for portion in batch]

    def create(self, chunking: Chunking) -> Any:
        """The stored array of a tensor of the batch."""
        name = stored_name(chunking.target, self.origin)
        assert self._base is not None
        kvstore = _database(self._base) | {"path": f"{name}/"} if self.origin.ocdbt else kvstore_of(self._base / name)
        spec = {"driver": "zarr3" if self.origin.zarr3 else "zarr", "kvstore": kvstore, "store_data_equal_to_fill_value": True}
        return ts.open(
            spec | {"metadata": _metadata(chunking, self._compressed(chunking), zarr3=self.origin.zarr3)},
            dtype=DTYPES[chunking.target.spec.dtype],
            shape=chunking.target.spec.shape,
            create=True,
            open=True,  # it is there where another portion of it has been written
            context=self._context,
        ).result()

    def _compressed(self, chunking: Chunking) -> bool:
        """As its first source is."""
        target = chunking.target
        source = next(target.pieces(target.target.pattern.whole(target.sizes)), None)
        return source is None or self.origin.compressed.get(source.source, True)

    def sync(self, number: int, batch: Sequence[Portion]) -> None:
        """Make a batch durable; a store is, once it has answered."""
        self._context = None
        if is_remote(self.path):
            return
        for path in self.paths(number, batch):
            for directory, _, files in os.walk(path, topdown=False):
                for name in [*files, "."]:
                    if name.endswith(LOCK):
                        continue  # another process is writing its portion, and renames this at any moment
                    descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)

    def join(self, batches: int) -> None:
        """One manifest over the databases of all batches, whose values stay where they are.

        An array in portions has its metadata in each of them, alike.
        """
        if not self.origin.ocdbt:
            for left in () if is_remote(self.path) else self.path.rglob(f"*{LOCK}"):
                left.unlink()
            return
        for path in (self.path / "manifest.ocdbt", self.path / "d"):
            remove(path)
        context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": NODES}, "file_io_sync": True})
        whole = ts.KvStore.open(_database(self.path), context=context).result()
        transaction, copied = ts.Transaction(atomic=True), 0
        for number in range(batches):
            one = ts.KvStore.open(_database(self.path / f"{PROCESS}{number}"), context=context).result()
            for keys, count in _spans(sorted(one.list().result())):
                one.experimental_copy_range_to(whole.with_transaction(transaction), keys).result()
                copied += count
                if copied >= _JOINED:
                    transaction.commit_async().result()
                    transaction, copied = ts.Transaction(atomic=True), 0
        transaction.commit_async().result()


def _spans(keys: Sequence[bytes]) -> Iterator[tuple[Any, int]]:
    """Ranges that hold all of these keys, some in each, and how many."""
    for start in range(0, len(keys), _JOINED):
        span = keys[start : start + _JOINED]
        yield ts.KvStore.KeyRange(span[0], span[-1] + b"\0"), len(span)


def _database(path: Path) -> dict[str, Any]:
    return {
        "driver": "ocdbt",
        "base": kvstore_of(path),
        # Metadata of arrays is kept in the tree, chunks are not.
        "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": _NODE, "manifest_kind": "single"},
        "target_data_file_size": FLYING,
        "cache_pool": "cache_pool#ocdbt",
    }


def _metadata(chunking: Chunking, compressed: bool, *, zarr3: bool) -> dict[str, Any]:
    shape, chunk = list(chunking.target.spec.shape), [max(1, size) for size in chunking.shape]
    if not zarr3:
        compressor = {"id": "zstd", "level": _LEVEL} if compressed else None
        return {"shape": shape, "chunks": chunk, "compressor": compressor, "dimension_separator": "."}
    codecs: list[Any] = [{"name": "bytes", "configuration": {"endian": "little"}}]
    if compressed:
        codecs.append({"name": "zstd", "configuration": {"level": _LEVEL}})
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    return {"shape": shape, "chunk_grid": grid, "codecs": codecs}
