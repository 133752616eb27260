"""Write a plan as an Orbax checkpoint that Orbax itself saves, although it may be larger than memory.

Orbax is given a tree of lazy leaves. Our type handler writes each leaf chunk by chunk through TensorStore, within a budget
of its own; Orbax keeps writing the tree's metadata and does the commit. On disk it is an ordinary NumPy leaf.

Source: the public handler API of orbax-checkpoint 0.12 (`ocp.type_handlers`).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import xxhash

from convert import manifest
from convert.blocks import assemble
from convert.commit import Stage, copy_file, empty, sync_directory, write_text
from convert.execute import Budget, Progress
from convert.planner import Plan, Target
from layouts.checkpoint import itemsize, numpy_dtype
from layouts.orbax import RECORD, Leaf, OrbaxReader

CHUNK = 16 << 20
"""Bytes of a zarr chunk at most: an expert of most models is one chunk, so that a sharded restore reads only its part."""


@dataclass(slots=True)
class _Lazy:
    """A leaf that has a shape and an element type for Orbax, and writes itself in chunks."""

    target: Target
    shape: tuple[int, ...] = field(init=False)
    dtype: np.dtype[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.target.spec.shape
        self.dtype = numpy_dtype(self.target.spec.dtype)

    @property
    def chunk(self) -> tuple[int, ...]:
        """Shape of a chunk: one index of each leading dimension, a run of the next, all of the rest.

        A composed dimension is never cut, so that chunks are boxes of the pattern's axes.
        """
        groups = self.target.target.pattern.groups
        limit = max(1, CHUNK // itemsize(self.target.spec.dtype))
        inner = [math.prod(self.shape[i + 1 :]) for i in range(len(groups))]
        depth = next((i for i, g in enumerate(groups) if len(g) > 1 or inner[i] <= limit), len(groups) - 1)
        if not groups:
            return ()
        run = self.shape[depth] if len(groups[depth]) > 1 else max(1, min(self.shape[depth], limit // max(1, inner[depth])))
        return (1,) * depth + (run,) + self.shape[depth + 1 :]

    def boxes(self) -> Iterator[tuple[tuple[slice, ...], dict[str, range]]]:
        """Each chunk as slices of the stored tensor and as a box of its pattern, in storage order."""
        pattern, sizes = self.target.target.pattern, self.target.sizes
        starts = (range(0, size, step) for size, step in zip(self.shape, self.chunk, strict=True))
        for corner in itertools.product(*starts):
            ends = (min(at + step, size) for at, step, size in zip(corner, self.chunk, self.shape, strict=True))
            slices = tuple(slice(at, end) for at, end in zip(corner, ends, strict=True))
            box = pattern.whole(sizes)
            for group, cut in zip(pattern.groups, slices, strict=True):
                if len(group) == 1:
                    box[group[0]] = range(cut.start, cut.stop)
            yield slices, box


class _LazyHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    """Write lazy leaves, `jobs` at a time, each front to back so that its digest is that of its bytes in storage order."""

    def __init__(self, reader: OrbaxReader, jobs: int, progress: Progress) -> None:
        super().__init__()
        self._reader, self._jobs, self._progress = reader, jobs, progress
        self._lock, self._stop = threading.Lock(), threading.Event()
        self.digests: dict[str, str] = {}

    async def serialize(self, values: Sequence[_Lazy], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        """Start writing; Orbax waits for the returned future before it commits."""
        arguments = args or [ocp.SaveArgs()] * len(values)
        work = self._write_all(values, infos, arguments)
        return [ocp.future.CommitFutureAwaitingContractedSignals(work, name="lazy_leaves")]

    async def _write_all(self, values: Sequence[_Lazy], infos: Sequence[Any], args: Sequence[Any]) -> None:
        for info in infos:
            await info.await_path_creation()
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(self._jobs) as pool:
            calls = (loop.run_in_executor(pool, self._write, *each) for each in zip(values, infos, args, strict=True))
            try:
                await asyncio.gather(*calls)
            except BaseException:
                self._stop.set()
                raise

    def _write(self, lazy: _Lazy, info: Any, arg: Any) -> None:
        spec = ocp.type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=info.is_ocdbt_checkpoint,
            global_shape=lazy.shape,
            local_shape=lazy.chunk,
            dtype=lazy.dtype,
            process_index=0 if info.is_ocdbt_checkpoint else None,
            arg=arg,
        )
        store = ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context).result()
        digest, pending = xxhash.xxh3_128(), None
        for slices, box in lazy.boxes():
            if self._stop.is_set():
                return
            block = assemble(lazy.target, box, self._reader)
            digest.update(block.data)
            if pending:  # one chunk is compressed and written while the next is put together
                pending.result()
            shape = [cut.stop - cut.start for cut in slices]
            pending = store[slices].write(block.reshape(shape).view(lazy.dtype))
            with self._lock:
                self._progress(block.nbytes)
        if pending:
            pending.result()
        self.digests[lazy.target.spec.name] = digest.hexdigest()

    def memory_size(self, values: Sequence[_Lazy]) -> Sequence[tuple[int, int]]:
        """Bytes that Orbax should reckon with for these leaves: none, the handler keeps to its own budget."""
        return [(0, 0) for _ in values]


def write(plan: Plan, reader: OrbaxReader, stage: Stage, budget: Budget, progress: Progress) -> None:
    """Fill the staging directory; everything in it is durable on return. An interrupted item is begun anew.

    Raises:
        OSError: the disk is full or failing.
    """
    empty(stage.path)
    handler = _LazyHandler(reader, budget.jobs, progress)
    scratch = stage.path.absolute() / "_item"
    _save(scratch, _tree(plan, reader, handler), _custom_metadata(plan, reader), reader, handler)
    _move(scratch, stage.path / reader.item.relative_to(reader.path))
    for name in plan.side_files:
        if name != manifest.NAME:
            copy_file(plan.source / name, stage.path / name)
    _sync_files(stage.path)
    write_text(stage.path / manifest.NAME, manifest.render(plan, handler.digests, None))


def _save(path: Path, tree: Any, custom: Mapping[str, Any], reader: OrbaxReader, handler: _LazyHandler) -> None:
    scalars = ocp.type_handlers.ScalarHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Lazy, handler),
        (np.number, scalars),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none are saved, but Orbax warns where nothing could
    )
    own = ocp.PyTreeCheckpointHandler(
        use_ocdbt=reader.metadata.get("use_ocdbt", True),
        use_zarr3=bool(reader.metadata.get("use_zarr3")),
        type_handler_registry=registry,
    )
    with ocp.Checkpointer(own) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, custom_metadata=dict(custom) or None))


def _custom_metadata(plan: Plan, reader: OrbaxReader) -> dict[str, Any]:
    custom = {k: v for k, v in (reader.metadata.get("custom_metadata") or {}).items() if k != RECORD}
    return custom | ({RECORD: dict(plan.record)} if plan.record else {})


def _tree(plan: Plan, reader: OrbaxReader, handler: _LazyHandler) -> Any:
    """The tree of the output: the input's, with new leaves beside the old ones' places and the consumed ones gone."""
    targets = {target.spec.name: target for target in plan.targets}
    fresh: dict[str, list[str]] = {}
    for name in targets.keys() - reader.tensors.keys():
        fresh.setdefault(name.rpartition(".")[0], []).append(name)

    def build(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Leaf):
            return _leaf(targets[node.name], node, reader, handler)
        if isinstance(node, list):
            return [build(child, (*path, str(i))) for i, child in enumerate(node)]
        if not isinstance(node, Mapping):
            return node
        kept = {k: c for k, c in node.items() if not (isinstance(c, Leaf) and c.name not in targets)}
        built = {key: build(child, (*path, str(key))) for key, child in kept.items()}
        added = {name.rpartition(".")[2]: _Lazy(targets[name]) for name in sorted(fresh.get(".".join(path), []))}
        return built | added

    return build(reader.tree, ())


def _leaf(target: Target, leaf: Leaf, reader: OrbaxReader, handler: _LazyHandler) -> Any:
    if not leaf.scalar:
        return _Lazy(target)
    value = reader.read(leaf.name, ()).view(numpy_dtype(target.spec.dtype))
    handler.digests[leaf.name] = xxhash.xxh3_128(value.tobytes()).hexdigest()
    return value[()]


def _move(scratch: Path, item: Path) -> None:
    """Put the saved item where the input has it: a directory of its own, or the checkpoint's root."""
    if item.exists():
        for entry in scratch.iterdir():
            os.rename(entry, item / entry.name)
        scratch.rmdir()
        return
    item.parent.mkdir(parents=True, exist_ok=True)
    os.rename(scratch, item)


def _sync_files(path: Path) -> None:
    for directory, _, files in os.walk(path):
        for name in files:
            with open(os.path.join(directory, name), "rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(directory))
