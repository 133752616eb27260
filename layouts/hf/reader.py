"""Read Hugging Face checkpoints: a directory of safetensors files.

In: a directory. Out: a reader. It never writes, and never trusts a header before it was validated.

Headers are read in `layouts.hf.header`. Data is read into the caller's memory (see `layouts.disk.pread`), never mapped.

Source: https://github.com/huggingface/safetensors (format), transformers 5 (index file).
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from layouts.disk.files import CONFIG, INDEX, RECORD, manifest_record, read_object
from layouts.disk.places import RemotePath, is_remote
from layouts.disk.pread import Empty, Extent, Extents, InputFile, Ranged, read_block
from layouts.disk.stored import StoredFile
from layouts.errors import InputError
from layouts.hf.header import Shard, read_shard
from layouts.reader import ReadLimits
from layouts.shards import all_files, compare_index, model_files, read_index
from layouts.side_files import SideFiles, files_below, sort_files
from layouts.tensors import Columns, bits, joined, total_bytes
from layouts.windows import Windows


def is_checkpoint(path: Path) -> bool:
    """Whether the directory holds safetensors files or their index."""
    return (path / INDEX).exists() or bool(all_files(path))


@dataclass(slots=True, kw_only=True)
class HFReader:
    """An open Hugging Face checkpoint; see `layouts.reader.Reader`."""

    path: Path
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    records: Mapping[str, Any]
    tensors: Columns
    """Those of one shard behind those of the other."""
    format: str = "hf"
    remarks: tuple[str, ...] = ()
    _firsts: tuple[int, ...] = field(init=False)
    """Where the tensors of each shard begin among all."""
    _files: dict[str, Ranged] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _side: SideFiles | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        self._firsts = tuple(itertools.accumulate((len(shard.tensors) for shard in self.shards[:-1]), initial=0))

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
        tensors = _joined(path, shards)
        if index is not None:
            compare_index(path, index.weight_map, {name: shard.name for shard in shards for name in shard.tensors})
        config = read_object(path / CONFIG) if (path / CONFIG).exists() else {}
        records = recorded | _records(shards, expected=bool(config.get(RECORD)))
        said = index.remarks(total_bytes(tensors)) if index else ()
        return cls(path=path, shards=shards, config=config, records=records, tensors=tensors, remarks=said)

    @classmethod
    def of(cls, path: Path, shard: Shard) -> HFReader:
        """One file of a directory, and nothing else that is in it."""
        return cls(path=path, shards=(shard,), config={}, records={}, tensors=shard.tensors)

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
        return self._home(self.tensors.rows[name])[0].name

    def _home(self, row: int) -> tuple[Shard, int]:
        """The shard of a tensor, and its place in there."""
        number = bisect_right(self._firsts, row) - 1
        return self.shards[number], row - self._firsts[number]

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
        shard, row = self._home(self.tensors.rows[name])
        file = self._files.get(shard.name) or self._open(shard.name)
        return Extent(file, int(shard.begins[row]))

    def extents(self, names: Sequence[str]) -> Iterator[Extents]:
        """The same of many, file by file."""
        rows = np.fromiter(map(self.tensors.rows.__getitem__, names), np.intp, len(names))
        home = np.searchsorted(self._firsts, rows, side="right") - 1
        for number in np.bincount(home).nonzero()[0].tolist():
            shard, places = self.shards[number], (home == number).nonzero()[0]
            file = self._files.get(shard.name) or self._open(shard.name)
            yield Extents(file, places, shard.begins[rows[places] - self._firsts[number]])

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


def _joined(path: Path, shards: Sequence[Shard]) -> Columns:
    """The tensors of all.

    Raises:
        InputError: one stands in two of them.
    """
    if len(shards) == 1:
        return shards[0].tensors
    found = joined([shard.tensors for shard in shards])
    if len(found.rows) < len(found):
        home: dict[str, str] = {}
        for shard in shards:
            cut = ": it is cut for tensor parallelism; join the parts first" if "-TP-" in shard.name else ""
            for name in shard.tensors:
                if home.setdefault(name, shard.name) != shard.name:
                    raise InputError(f"{path}: {name} stands in both {home[name]} and {shard.name}{cut}")
    return found


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
