"""The directory of an Orbax item that is written: databases of batches that one manifest joins, or a directory per array.

In: batches of portions. Out: stored arrays, joined and durable. It never reads the input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import tensorstore as ts

from convert.commit.below import files as files_below
from convert.commit.below import sync_all
from convert.commit.files import Folder
from convert.commit.store import StoreFolder
from convert.orbax.budget import FLYING, OrbaxBudget
from convert.orbax.chunks import Chunking
from convert.orbax.metadata import stored_name
from convert.orbax.origin import Origin
from convert.orbax.portions import Portion
from layouts.disk.faults import answer
from layouts.orbax.arrays import NODES
from layouts.orbax.chunks import LOCK
from layouts.orbax.tree import PROCESS
from layouts.tensors import DTYPES

_LEVEL = 1
"""zstd's: on bfloat16 weights higher ones take longer for the same size."""
_NODE = 64 << 10
"""Bytes of a node of a batch's tree: small, because each commit writes those that change anew."""
_JOINED = 1 << 13
"""Chunks whose names are joined at once: until these are written, they are in memory."""


@dataclass(slots=True, kw_only=True)
class Item:
    """The item's directory, open, and how its arrays are stored."""

    folder: Folder | StoreFolder
    origin: Origin
    budget: OrbaxBudget
    _base: str = ""
    _context: Any = field(default=None)

    def begin(self, number: int, batch: Sequence[Portion]) -> None:
        """A new batch; what an interrupted run left of it goes, or is written over by files of the same names."""
        whole = batch if self.origin.ocdbt else [portion for portion in batch if portion.rows is None]
        for name in self.names(number, whole):
            self.folder.remove(name)
        self._base = self.names(number, batch)[0] if self.origin.ocdbt else ""
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

    def names(self, number: int, batch: Sequence[Portion]) -> list[str]:
        """The directories of a batch."""
        if self.origin.ocdbt:
            return [f"{PROCESS}{number}"]
        return [stored_name(portion.target, self.origin) for portion in batch]

    def create(self, chunking: Chunking) -> Any:
        """The stored array of a tensor of the batch."""
        name = stored_name(chunking.target, self.origin)
        with self.folder.below(self._base or name, make=True):
            pass  # TensorStore would make it as well, but follow a link on the way
        kvstore = self._database(self._base) | {"path": f"{name}/"} if self.origin.ocdbt else self.folder.spec(name)
        spec = {"driver": "zarr3" if self.origin.zarr3 else "zarr", "kvstore": kvstore, "store_data_equal_to_fill_value": True}
        opening = ts.open(
            spec | {"metadata": _metadata(chunking, self._compressed(chunking), zarr3=self.origin.zarr3)},
            dtype=DTYPES[chunking.target.spec.dtype],
            shape=chunking.target.spec.shape,
            create=True,
            open=True,  # it is there where another portion of it has been written
            context=self._context,
        )
        return answer(opening)

    def _compressed(self, chunking: Chunking) -> bool:
        """As its first source is."""
        target = chunking.target
        source = next(target.pieces(target.target.pattern.whole(target.sizes)), None)
        return source is None or self.origin.compressed.get(source.source, True)

    def sync(self, number: int, batch: Sequence[Portion]) -> None:
        """Make a batch durable; a store is, once it has answered."""
        self._context = None
        if isinstance(self.folder, StoreFolder):
            return
        for name in self.names(number, batch):
            with self.folder.below(name) as written:
                sync_all(written, but=LOCK)  # another process is writing its portion, and renames this at any moment

    def join(self, batches: int) -> None:
        """One manifest over the databases of all batches, whose values stay where they are.

        An array in portions has its metadata in each of them, alike.
        """
        if not self.origin.ocdbt:
            files = () if isinstance(self.folder, StoreFolder) else files_below(self.folder)
            for left in [name for name, _ in files if name.endswith(LOCK)]:
                self.folder.remove(left)
            return
        for name in ("manifest.ocdbt", "d"):
            self.folder.remove(name)
        context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": NODES}, "file_io_sync": True})
        whole = answer(ts.KvStore.open(self._database(), context=context))
        transaction, copied = ts.Transaction(atomic=True), 0
        for number in range(batches):
            one = answer(ts.KvStore.open(self._database(f"{PROCESS}{number}"), context=context))
            for keys, count in _spans(sorted(answer(one.list()))):
                answer(one.experimental_copy_range_to(whole.with_transaction(transaction), keys))
                copied += count
                if copied >= _JOINED:
                    answer(transaction.commit_async())
                    transaction, copied = ts.Transaction(atomic=True), 0
        answer(transaction.commit_async())

    def _database(self, name: str = "") -> dict[str, Any]:
        return {
            "driver": "ocdbt",
            "base": self.folder.spec(name),
            # Metadata of arrays is kept in the tree, chunks are not.
            "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": _NODE, "manifest_kind": "single"},
            "target_data_file_size": FLYING,
            "cache_pool": "cache_pool#ocdbt",
        }


def _spans(keys: Sequence[bytes]) -> Iterator[tuple[Any, int]]:
    """Ranges that hold all of these keys, some in each, and how many."""
    for start in range(0, len(keys), _JOINED):
        span = keys[start : start + _JOINED]
        yield ts.KvStore.KeyRange(span[0], span[-1] + b"\0"), len(span)


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
