"""Read Hugging Face checkpoints: a directory of safetensors files.

In: a directory. Out: a reader. It never writes, and never trusts a header before it was validated.

The safetensors parser validates every header before we trust it, because a plain JSON reading accepts what it refuses
(overlaps, holes, wrong sizes). Data is read into the caller's memory (see `layouts.disk.pread`), never mapped.

Source: https://github.com/huggingface/safetensors (format), transformers 5 (index file).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from layouts.disk.files import CONFIG, HEADER, INDEX, RECORD, manifest_record, parsed, read_object
from layouts.disk.places import RemotePath, is_remote
from layouts.disk.pread import Empty, Extent, InputFile, Ranged, read_block
from layouts.disk.stored import StoredFile, stored_header
from layouts.errors import InputError
from layouts.reader import ReadLimits
from layouts.shards import all_files, compare_index, model_files, read_index
from layouts.side_files import SideFiles, files_below, sort_files
from layouts.tensors import DTYPES, TensorSpec, bits
from layouts.windows import Windows

RANK = 64
"""Dimensions of a tensor at most: NumPy has no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file: its header as text, so that it can be written again byte for byte, and where data begins."""

    name: str
    header: str
    start: int
    offsets: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, Any]


def is_checkpoint(path: Path) -> bool:
    """Whether the directory holds safetensors files or their index."""
    return (path / INDEX).exists() or bool(all_files(path))


def read_shard(path: Path) -> Shard:
    """Parse one file's header.

    Raises:
        InputError: not a sound safetensors file; says why when the reason is a common one.
        OSError: the system refuses, or the disk is failing.
    """
    text, whole = stored_header(path) if isinstance(path, RemotePath) else (_header(path), nullcontext(path))
    try:
        with whole as file, safe_open(file, framework="np"):
            pass
        size, entries = len(text), parsed(text)
        if not isinstance(entries, dict):
            raise ValueError("the header is no object")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a sound safetensors file: {error}{_common_cause(path)}") from None
    metadata = entries.pop("__metadata__", None) or {}
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {n: TensorSpec(name=n, dtype=e["dtype"], shape=tuple(e["shape"])) for n, e in ordered}
    for name, spec in tensors.items():
        if spec.dtype not in DTYPES:
            raise InputError(
                f"{path}: {name} has element type {spec.dtype}, which is not supported; known: {', '.join(DTYPES)}"
            )
        if len(spec.shape) > RANK:
            raise InputError(f"{path}: {name} has {len(spec.shape)} dimensions; {RANK} are the most")
    offsets = {name: tuple(entry["data_offsets"]) for name, entry in ordered}
    return Shard(name=path.name, header=text.decode(), start=8 + size, offsets=offsets, tensors=tensors, metadata=metadata)


def _header(path: Path) -> bytes:
    """The header as it stands in the file.

    Raises:
        InputError: there is none, or one that the format does not allow.
        OSError: the system refuses, or the disk is failing.
    """
    with InputFile.open(path) as file:
        total = file.size
        head = bytearray(min(8, total))
        file.read(memoryview(head), 0)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or size > min(HEADER, total - 8):
            why = "header too small" if len(head) < 8 else f"header too large ({size:,} bytes in a file of {total:,})"
            raise InputError(f"{path}: not a sound safetensors file: {why}{_common_cause(path)}")
        text = bytearray(size)
        file.read(memoryview(text), 8)
        return bytes(text)


def _common_cause(path: Path) -> str:
    with suppress(OSError, AttributeError), path.open("rb") as file:  # a place in a store is not opened
        if file.read(40).startswith(b"version https://git-lfs"):
            return ". It is a git-lfs pointer: run 'git lfs pull' where it came from"
    return ". Download or copy it again"


@dataclass(slots=True, kw_only=True)
class HFReader:
    """An open Hugging Face checkpoint; see `layouts.reader.Reader`."""

    path: Path
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    records: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    format: str = "hf"
    remarks: tuple[str, ...] = ()
    _home: dict[str, Shard] = field(default_factory=dict)
    _files: dict[str, Ranged] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _side: SideFiles | None = field(default=None, compare=False)

    @classmethod
    def open(cls, path: Path) -> HFReader:
        """Read all headers and compare them with the index.

        Raises:
            InputError: a file is missing or corrupt, a tensor stands in two shards, or index and shards disagree.
        """
        recorded = manifest_record(path)
        index = read_index(path)
        names = model_files(path, index.weight_map if index else None)
        shards = tuple(read_shard(path / name) for name in names)
        home: dict[str, Shard] = {}
        for shard in shards:
            if (twice := next((name for name in shard.tensors if name in home), None)) is not None:
                cut = ": it is cut for tensor parallelism; join the parts first" if "-TP-" in shard.name else ""
                raise InputError(f"{path}: {twice} stands in both {home[twice].name} and {shard.name}{cut}")
            home |= dict.fromkeys(shard.tensors, shard)
        if index is not None:
            compare_index(path, index.weight_map, {name: shard.name for name, shard in home.items()})
        config = read_object(path / CONFIG) if (path / CONFIG).exists() else {}
        tensors = {name: shard.tensors[name] for name, shard in home.items()}
        records = recorded | _records(shards, expected=bool(config.get(RECORD)))
        said = index.remarks(sum(spec.nbytes for spec in tensors.values())) if index else ()
        return cls(path=path, shards=shards, config=config, records=records, tensors=tensors, remarks=said, _home=home)

    @classmethod
    def of(cls, path: Path, shard: Shard) -> HFReader:
        """One file of a directory, and nothing else that is in it."""
        own = shard.tensors
        return cls(path=path, shards=(shard,), config={}, records={}, tensors=own, _home=dict.fromkeys(own, shard))

    @property
    def record(self) -> Mapping[str, Any] | None:
        """What this tool wrote into `config.json` about the layout."""
        return cast("Mapping[str, Any] | None", self.config.get(RECORD))

    @property
    def side_files(self) -> SideFiles:
        """Every file but the shards and their index."""
        if self._side is None:
            own = {shard.name for shard in self.shards} | {INDEX}
            names = (name for name in files_below(self.path) if name not in own)
            remote = is_remote(self.path)  # no store says how large its objects are
            self._side = sort_files(names, lambda name: 0 if remote else os.stat(self.path / name).st_size)
        return self._side

    @property
    def headers(self) -> dict[str, str]:
        """The header of each shard, to the byte."""
        return {shard.name: shard.header for shard in self.shards}

    @property
    def windows(self) -> Windows:
        """None: nothing is decoded."""
        return Windows()

    def where(self, name: str) -> str:
        """The shard that holds a tensor."""
        return self._home[name].name

    def unit(self, name: str) -> None:  # noqa: ARG002
        """Any part can be read alone."""
        return

    def hold(self, limits: ReadLimits, windows: Windows) -> None:
        """Nothing to do: nothing is decoded."""

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block, read into memory that `empty` gives.

        Raises:
            InputError: the file is shorter than its header says.
            OSError: it cannot be read.
        """
        spec = self.tensors[name]
        spans = [range(*part.indices(size)) for part, size in zip(slices, spec.shape, strict=True)]
        shape = [len(span) for span in spans]
        try:
            out = empty(shape, bits(spec.dtype))
        except MemoryError:
            what = f"{shape} of {name} {spec.shape}, {spec.nbytes:,} bytes as a whole"
            raise MemoryError(f"{what}, in {self.where(name)}") from None
        read_block(self.extent(name), spec.shape, slices, out)
        return out

    def extent(self, name: str) -> Extent:
        """Where a tensor lies: an open file, and the offset of its first byte in it."""
        shard = self._home[name]
        file = self._files.get(shard.name) or self._open(shard.name)
        return Extent(file, shard.start + shard.offsets[name][0])

    def _open(self, shard: str) -> Ranged:
        """A file that is not open yet, unless another thread has just opened it."""
        with self._lock:
            if (file := self._files.get(shard)) is None:
                path = self.path / shard
                file = self._files[shard] = StoredFile.open(path) if isinstance(path, RemotePath) else InputFile.open(path)
        return file

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()


def _records(shards: Sequence[Shard], *, expected: bool) -> dict[str, Any]:
    """What the headers say of the layout; one without metadata says nothing, even where a record is `expected`."""
    found = {}
    for shard in shards:
        if RECORD in shard.metadata or (shard.metadata and expected):
            found[shard.name] = _parsed(shard.metadata.get(RECORD))
    return found


def _parsed(text: object) -> Any:
    """A record as it stands in a header; one that is no JSON agrees with nothing."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text
