"""The arrays of an Orbax item as TensorStore opens them: in a database or a directory each, zarr 2 or 3.

In: an item and names. Out: open arrays, their specs. It never writes.

Source: Orbax 0.12 `serialization/tensorstore_utils.py`, https://google.github.io/tensorstore.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from layouts.disk.faults import answer, told
from layouts.disk.files import LIMITS
from layouts.disk.places import kvstore_of
from layouts.errors import InputError
from layouts.orbax.codec import METADATA
from layouts.orbax.lengths import check_values
from layouts.tensors import DTYPES, TensorSpec

CODES = {name: code for code, name in DTYPES.items()}
"""TensorStore's (and NumPy's) names of element types -> safetensors' codes."""
NODES = 16 << 20
"""Bytes of OCDBT's tree that are kept."""
CHUNKS = 1 << 22
"""Chunks that an array may have; more is what damaged metadata says. Lists of them are held in memory."""

BEYOND = 64 << 20
"""Bytes by which a chunk may be larger than its array: the writer of a small array may have a usual size of chunks."""


def spec_of(item: Path, name: str, *, ocdbt: bool, zarr3: bool, complete: bool) -> dict[str, Any]:
    """TensorStore's spec of an array of an item."""
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


def make_context(cache: int, threads: int | None) -> Any:
    """What arrays share: a cache for decoded chunks, in bytes, one for the nodes of databases, and threads."""
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


def open_all(item: Path, specs: Mapping[str, Any]) -> dict[str, Any]:
    """All arrays, opened at once.

    Raises:
        InputError: one cannot be, or its metadata in a database is longer than any is.
    """
    context = make_context(0, None)
    for name, spec in specs.items():
        if spec["kvstore"]["driver"] == "ocdbt":
            with told(item, name):
                values = answer(ts.KvStore.open(spec["kvstore"], context=context))
            check_values(values, [(key := METADATA[spec["driver"]], LIMITS[key])], f"{item}: {name}")
    futures = {name: ts.open(spec, open=True, read=True, context=context) for name, spec in specs.items()}
    stores = {}
    for name, future in futures.items():
        with told(item, name):
            stores[name] = answer(future)
            _check_grid(item, name, stores[name])
            _check_chunk(item, name, stores[name])
    return stores


def _check_grid(item: Path, name: str, store: Any) -> None:
    shape, chunk = store.shape, store.chunk_layout.write_chunk.shape or store.shape
    count = math.prod(-(-size // max(1, step)) for size, step in zip(shape, chunk, strict=True))
    if count > CHUNKS:
        raise InputError(
            f"{item}: {name} {shape} would have {count:,} chunks of {chunk}; {CHUNKS:,} are the most that are read"
        )


def _check_chunk(item: Path, name: str, store: Any) -> None:
    """TensorStore decodes a chunk with what lies beyond the array; where memory cannot hold that, the process is gone."""
    whole, most = decoded_size(store), store.dtype.numpy_dtype.itemsize * math.prod(store.shape) + BEYOND
    if whole > most:
        chunk = tuple(store.chunk_layout.read_chunk.shape)
        raise InputError(
            f"{item}: {name} {store.shape} is stored in chunks of {chunk}, {whole:,} bytes each; no "
            f"chunk is that much larger than its array, so the metadata is damaged"
        )


def decoded_size(store: Any) -> int:
    """Bytes of what has to be decoded to read any element, with what of it lies beyond the array."""
    shape = store.chunk_layout.read_chunk.shape or store.shape
    return int(store.dtype.numpy_dtype.itemsize) * math.prod(map(int, shape))


def describe(item: Path, name: str, store: Any) -> TensorSpec:
    """Shape and element type of an array.

    Raises:
        InputError: an element type that this tool does not know.
    """
    if store.dtype.name not in CODES:
        raise InputError(f"{item}: {name} has element type {store.dtype.name}; known: {', '.join(CODES)}")
    return TensorSpec(name=name, dtype=CODES[store.dtype.name], shape=tuple(store.shape))


def chunk_of(store: Any) -> tuple[int, ...]:
    """The shape of what has to be decoded to read any element."""
    shape = store.chunk_layout.read_chunk.shape
    return tuple(map(min, shape, store.shape)) if shape else tuple(store.shape)


def read_by_chunks(store: Any, slices: Sequence[slice], chunk: Sequence[int], some: int) -> NDArray[Any]:
    """A block, chunk by chunk and a few of them at a time: TensorStore by itself would have all decoded before it copies any.

    Raises:
        ValueError: data is missing or damaged.
    """
    block = np.empty([part.stop - part.start for part in slices], store.dtype.numpy_dtype)
    reading: deque[tuple[tuple[slice, ...], Any]] = deque()
    for part in itertools.product(*(_steps(whole, step) for whole, step in zip(slices, chunk, strict=True))):
        inside = tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(part, slices, strict=True))
        reading.append((inside, store[part].read(order="C")))
        if len(reading) == some:
            _land(reading, block)
    while reading:
        _land(reading, block)
    return block


def _land(reading: deque[tuple[tuple[slice, ...], Any]], block: NDArray[Any]) -> None:
    inside, future = reading.popleft()
    block[inside] = answer(future)


def _steps(whole: slice, step: int) -> list[slice]:
    """The parts of a range that lie in one chunk each."""
    cuts = [whole.start, *range((whole.start // step + 1) * step, whole.stop, step), whole.stop]
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]
