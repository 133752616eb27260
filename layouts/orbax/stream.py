"""Read a chunk that is too large to be decoded as a whole: its bytes are decompressed in order, a piece at a time.

In: an open array and a block. Out: the block. It never holds a decoded chunk.

Orbax stores an array that was not sharded as one chunk, however large it is, and TensorStore decodes chunks as a whole. A chunk
is its elements in C order, put through zstd, and zstd is a stream. Reading it from front to back takes a window of a few MB.
Going back starts from the beginning. So reading is right in any order, and fast in one.

Source: zarr 2 and 3 specifications (zarr-specs.readthedocs.io; `sharding_indexed` is the index at the end of a shard: offset
and size of each inner chunk as uint64, then a CRC), RFC 8878 for zstd.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.orbax.codec import PIECE, Codec, Pieces, codec_of, fetch, key_of, pieces_of, zstd

WINDOW = 8 << 20
"""Bytes that a stream holds: zstd's window (2 MB for what Orbax writes, level 3), two pieces, the end of the last run."""
_MISSING = (1 << 64) - 1


@dataclass(slots=True, kw_only=True)
class ChunkStreams:
    """An array whose chunks are read piece by piece. Threads take turns.

    `chunk` is the shape of a chunk. As many streams as the last read took are held, for reads to come back to.
    """

    kvstore: Any
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    width: int
    fill: bytes | None
    codec: Codec
    streams: dict[tuple[int, ...], _Stream] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, store: Any) -> ChunkStreams:
        """From an open TensorStore array whose metadata is `streamable`."""
        spec = store.spec().to_json()
        codec = codec_of(spec["metadata"])
        assert codec is not None
        # The stored chunk, not cut off at the end of the array: that is what zarr stores.
        chunk = tuple(store.chunk_layout.read_chunk.shape) if store.rank else ()
        return cls(
            kvstore=store.kvstore,
            shape=tuple(store.shape),
            chunk=chunk,
            width=store.dtype.numpy_dtype.itemsize,
            fill=None if not spec.get("fill_missing_data_reads", True) else bytes(store.dtype.numpy_dtype.itemsize),
            codec=codec,
        )

    def read(self, slices: Sequence[slice], dtype: np.dtype[Any]) -> NDArray[Any]:
        """A block of the array, of this element type (the bits of its own).

        Raises:
            ValueError: data is missing or damaged.
        """
        spans = [range(*part.indices(size)) for part, size in zip(slices, self.shape, strict=True)]
        out = np.empty([len(span) for span in spans], dtype)
        grid = [range(s.start // c, (s.stop - 1) // c + 1) if s else range(0) for s, c in zip(spans, self.chunk, strict=True)]
        with self._lock:
            for at in itertools.product(*grid):
                self._from_chunk(at, spans, out)
            for at in list(self.streams)[: -max(math.prod(map(len, grid)), 1)]:
                del self.streams[at]
        return out

    def _from_chunk(self, at: tuple[int, ...], spans: Sequence[range], out: NDArray[Any]) -> None:
        starts = [i * c for i, c in zip(at, self.chunk, strict=True)]
        parts = [range(max(s.start, b), min(s.stop, b + c)) for s, b, c in zip(spans, starts, self.chunk, strict=True)]
        into = out[tuple(slice(p.start - s.start, p.stop - s.start) for p, s in zip(parts, spans, strict=True))]
        inside = [range(p.start - b, p.stop - b) for p, b in zip(parts, starts, strict=True)]
        stream = self.streams.pop(at, None) or self._open(at)
        self.streams[at] = stream  # the last one used stands last
        depth, inner = self._run(inside)
        for point in itertools.product(*inside[: max(0, depth)]):
            first = math.prod(self.chunk[depth:]) * _flat(point, self.chunk[:depth])
            rows = inside[depth] if self.chunk else range(1)
            begin, end = first + rows.start * inner, first + rows.stop * inner
            row = into[tuple(i - s.start for i, s in zip(point, inside, strict=False))] if self.chunk else into.reshape(1)
            if row.flags.c_contiguous and row.size == end - begin:
                stream.read(begin * self.width, row.reshape(-1).view(np.uint8).data)
                continue
            block = np.empty((len(rows), *self.chunk[depth + 1 :]), out.dtype)
            stream.read(begin * self.width, block.reshape(-1).view(np.uint8).data)
            row[...] = block[(slice(None), *(slice(s.start, s.stop) for s in inside[depth + 1 :]))]

    def _run(self, inside: Sequence[range]) -> tuple[int, int]:
        """The axis along which the chunk is read in runs, and the elements of one step: axes behind it are read whole."""
        inner = 1
        for depth in range(len(self.chunk) - 1, 0, -1):
            whole = inner * self.chunk[depth]
            if len(inside[depth]) < self.chunk[depth] and whole * self.width > PIECE:
                return depth, inner
            inner = whole
        return 0, inner

    def _open(self, at: tuple[int, ...]) -> _Stream:
        codec, grid = self.codec, at
        per_shard = [s // c for s, c in zip(codec.shard, self.chunk, strict=True)] if codec.shard else []
        if per_shard:
            grid = tuple(i // n for i, n in zip(at, per_shard, strict=True))
        key = key_of(codec.prefix, codec.separator, grid)
        begin, nbytes = 0, None
        if per_shard:
            number = _flat([i % n for i, n in zip(at, per_shard, strict=True)], per_shard)
            index = fetch(self.kvstore, key, slice(-16 * math.prod(per_shard) - 4, None))
            begin, nbytes = np.frombuffer(index[16 * number : 16 * number + 16], "<u8").tolist() if index else (_MISSING, 0)
        elif not fetch(self.kvstore, key, slice(0, 1)):
            begin = _MISSING
        if begin == _MISSING:
            if self.fill is None:
                raise ValueError(f"chunk {key} is missing")
            begin, nbytes = 0, 0
        pieces = Pieces(pieces_of(self.kvstore, key, begin, None if nbytes is None else begin + nbytes))
        return _Stream(pieces=pieces, compressed=codec.compressed, size=math.prod(self.chunk) * self.width, empty=nbytes == 0)


def _flat(point: Sequence[int], shape: Sequence[int]) -> int:
    position = 0
    for i, size in zip(point, shape, strict=True):
        position = position * size + i
    return position


@dataclass(slots=True, kw_only=True)
class _Stream:
    """The decoded bytes of one chunk, from front to back; the end of the last run is kept, because the next may begin in it."""

    pieces: Pieces
    compressed: bool
    size: int
    empty: bool
    _source: Any = None
    _at: int = 0
    _kept: bytes = b""
    _rest: bytes = b""

    def read(self, begin: int, view: memoryview) -> None:
        """Fill `view` with the bytes from `begin`.

        Raises:
            ValueError: the chunk is damaged, or shorter than it should be.
        """
        end = begin + len(view)
        if self.empty:
            view[:] = bytes(len(view))
            return
        if self._source is None or begin < self._at - len(self._kept):
            self._restart()
        have = max(0, min(self._at, end) - begin)
        start = len(self._kept) - (self._at - begin)
        view[:have] = self._kept[start : start + have] if have else b""
        self._skip(begin)
        self._fill(view[have:])
        if end - begin > have:
            self._at = end
            self._kept = bytes(view[-PIECE:])

    def _restart(self) -> None:
        self.pieces.rewind()
        self._at, self._kept, self._rest = 0, b"", b""
        self._source = self.pieces
        if self.compressed:
            decompressor = zstd.ZstdDecompressor(max_window_size=1 << 31)
            self._source = decompressor.stream_reader(self.pieces, read_size=PIECE)  # type: ignore[arg-type]

    def _skip(self, begin: int) -> None:
        scratch = memoryview(bytearray(min(PIECE, max(0, begin - self._at))))
        while self._at < begin:
            part = scratch[: min(len(scratch), begin - self._at)]
            self._fill(part)
            self._at += len(part)

    def _fill(self, view: memoryview) -> None:
        while len(view):
            count = self._into(view)
            if not count:
                raise ValueError(f"a chunk ends before its {self.size} bytes are there")
            view = view[count:]

    def _into(self, view: memoryview) -> int:
        if self.compressed:
            try:
                return int(self._source.readinto(view))
            except zstd.ZstdError as error:
                raise ValueError(str(error)) from None
        if not self._rest:
            self._rest = self.pieces.read()
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
