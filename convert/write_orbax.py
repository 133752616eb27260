"""Write a plan as an Orbax checkpoint, without Orbax: arrays by TensorStore, what stands beside them as JSON.

Orbax alone takes more memory than a small budget has, and it drops what it was not asked to restore: shardings, random keys.
So the arrays are written in batches as Orbax's processes write theirs, each batch a database of its own (OCDBT) that the item's
manifest then joins, or as a directory for each array. A finished batch is made durable and journalled: an interrupted run goes
on with the next one, and what it left of a batch is removed, so that no dead bytes stay in the output.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tensorstore as ts

from convert import manifest
from convert.chunks import Chunking
from convert.commit import Stage, copy_file, write_text
from convert.execute import SYNC, Budget, Progress
from convert.fill_arrays import Filler
from convert.malloc import keep_below
from convert.orbax_budget import FLYING, NODES, OrbaxBudget, orbax_budget
from convert.orbax_metadata import render, stored_name
from convert.planner import Plan, Target
from layouts.checkpoint import DTYPES, Reader
from layouts.orbax import OrbaxReader
from layouts.orbax_tree import PROCESS

DEFAULT_MEMORY = 2 << 30
_LEVEL = 1
"""zstd's: on bfloat16 weights higher ones take longer for the same size."""
_NODE = 64 << 10
"""Bytes of a node of a batch's tree: small, because each commit writes those that change anew."""


def write(
    plan: Plan,
    reader: Reader,
    stage: Stage,
    budget: Budget | OrbaxBudget,
    progress: Progress,
    original: manifest.Original | None = None,
) -> None:
    """Fill the staging directory; everything in it is durable on return. `original` are files that a way back restores.

    Raises:
        OSError: the disk is full or failing.
        InputError: data of the input cannot be read.
    """
    if isinstance(budget, Budget):
        budget = orbax_budget(max(DEFAULT_MEMORY, budget.peak), budget.jobs, plan, reader)
    keep_below(budget.mapped)
    place = reader.item.relative_to(reader.path) if isinstance(reader, OrbaxReader) else Path("0/items")
    item = _Item(path=stage.path.resolve() / place, reader=reader, budget=budget)
    digests = _fill(item, plan, stage, progress)
    item.join(len(list(_batches(plan.targets))))
    chunks = {target.spec.name: budget.chunking(target, reader).shape for target in plan.targets}
    for name, text in render(plan, reader, chunks).items():
        write_text(item.path / name, text)
    for name in plan.side_files:
        if name != manifest.NAME:
            copy_file(plan.source / name, stage.path / name)
    write_text(stage.path / manifest.NAME, manifest.render(plan, digests, original))


def _fill(item: _Item, plan: Plan, stage: Stage, progress: Progress) -> dict[str, str]:
    """Write all batches that no earlier run has finished; the digests of all."""
    if isinstance(item.reader, OrbaxReader):
        item.reader.close()
        item.reader.limits = item.budget.limits
    digests: dict[str, str] = {}
    item.path.mkdir(parents=True, exist_ok=True)
    for number, targets in enumerate(_batches(plan.targets)):
        if all(target.spec.name in stage.done for target in targets):
            digests |= {target.spec.name: stage.done[target.spec.name] for target in targets}
            progress(sum(target.spec.nbytes for target in targets))
            continue
        item.begin(number, targets)
        filler = Filler(reader=item.reader, budget=item.budget, progress=progress, open=item.create)
        fresh = filler.fill(targets)
        item.sync(number, targets)
        stage.record(fresh)
        digests |= fresh
    return digests


def _batches(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Neighbours, about `SYNC` bytes together: what a power cut can cost."""
    batch: list[Target] = []
    for target in targets:
        if batch and sum(each.spec.nbytes for each in batch) + target.spec.nbytes > SYNC:
            yield batch
            batch = []
        batch.append(target)
    if batch:
        yield batch


@dataclass(slots=True, kw_only=True)
class _Item:
    """The item's directory, and how its arrays are stored."""

    path: Path
    reader: Reader
    budget: OrbaxBudget
    _base: Path | None = None
    _context: Any = field(default=None)

    @property
    def ocdbt(self) -> bool:
        return self.reader.use_ocdbt if isinstance(self.reader, OrbaxReader) else True

    @property
    def zarr3(self) -> bool:
        return self.reader.use_zarr3 if isinstance(self.reader, OrbaxReader) else True

    def begin(self, number: int, targets: Sequence[Target]) -> None:
        """A new batch; what an interrupted run left of it goes."""
        for path in self._paths(number, targets):
            if path.exists():
                shutil.rmtree(path)
        self._base = self._paths(number, targets)[0] if self.ocdbt else self.path
        # No sync per write: a batch is synced as a whole.
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "cache_pool#ocdbt": {"total_bytes_limit": NODES},
                "data_copy_concurrency": {"limit": max(2, self.budget.jobs)},
                "file_io_concurrency": {"limit": max(2, self.budget.jobs)},
                "file_io_sync": False,
            }
        )

    def _paths(self, number: int, targets: Sequence[Target]) -> list[Path]:
        if self.ocdbt:
            return [self.path / f"{PROCESS}{number}"]
        return [self.path / stored_name(target, self.reader) for target in targets]

    def create(self, chunking: Chunking) -> Any:
        """The empty stored array of a tensor of the batch."""
        name = stored_name(chunking.target, self.reader)
        file = {"driver": "file", "path": f"{self._base}/"}
        kvstore: dict[str, Any] = {**file, "path": f"{self._base}/{name}/"}
        if self.ocdbt:
            kvstore = _database(f"{self._base}/") | {"path": f"{name}/"}
        spec = {"driver": "zarr3" if self.zarr3 else "zarr", "kvstore": kvstore, "store_data_equal_to_fill_value": True}
        return ts.open(
            spec | {"metadata": _metadata(chunking, self._compressed(chunking), zarr3=self.zarr3)},
            dtype=DTYPES[chunking.target.spec.dtype],
            shape=chunking.target.spec.shape,
            create=True,
            context=self._context,
        ).result()

    def _compressed(self, chunking: Chunking) -> bool:
        """As its first source is."""
        target = chunking.target
        source = next(target.pieces(target.target.pattern.whole(target.sizes)), None)
        return not isinstance(self.reader, OrbaxReader) or source is None or self.reader.compressed[source.source]

    def sync(self, number: int, targets: Sequence[Target]) -> None:
        """Make a batch durable."""
        self._context = None
        for path in self._paths(number, targets):
            for directory, _, files in os.walk(path, topdown=False):
                for name in [*files, "."]:
                    descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
                    try:
                        os.fsync(descriptor)
                    finally:
                        os.close(descriptor)

    def join(self, batches: int) -> None:
        """One manifest over the databases of all batches, whose values stay where they are."""
        if not self.ocdbt:
            return
        for path in (self.path / "manifest.ocdbt", self.path / "d"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": NODES}, "file_io_sync": True})
        whole = ts.KvStore.open(_database(f"{self.path}/"), context=context).result()
        transaction = ts.Transaction(atomic=True)
        for number in range(batches):
            one = ts.KvStore.open(_database(f"{self.path}/{PROCESS}{number}/"), context=context).result()
            one.experimental_copy_range_to(whole.with_transaction(transaction)).result()
        transaction.commit_async().result()


def _database(path: str) -> dict[str, Any]:
    return {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": path},
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
