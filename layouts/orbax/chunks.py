"""The chunks of an array as they are stored: bytes under keys, which nobody decodes.

In: an array of an open checkpoint. Out: its stored chunks, as keys and bytes. It never decodes one.

Source: zarr 2 and 3 specifications (zarr-specs.readthedocs.io), for the keys.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorstore as ts

from layouts.disk.faults import answer, told
from layouts.errors import InputError
from layouts.orbax.codec import METADATA, PIECE, codec_of, grid_shape, key_form, key_of, pieces_of, zstd
from layouts.orbax.lengths import check_stored
from layouts.orbax.reader import OrbaxReader
from layouts.tensors import itemsize

_OTHERS = (*METADATA.values(), ".zattrs")
_ZSTD, _FRAME = b"\x28\xb5\x2f\xfd", 18
"""How a zstd frame begins, and the bytes of its header at most (RFC 8878, 3.1.1)."""
_AHEAD = 16
"""Chunks that are read ahead at most: one by one, small ones take longer to ask for than to hash."""
LOCK = ".__lock"
"""Ends the name of a file that TensorStore has not finished; one that is killed leaves it."""


class Chunk(NamedTuple):
    """A stored chunk: its place in a grid, and the array and the key that have it."""

    at: tuple[int, ...]
    name: str
    key: str


def key_at(metadata: Mapping[str, Any], at: tuple[int, ...]) -> str:
    """The key of the chunk at this place."""
    return key_of(*key_form(metadata), at)


def chunks_of(reader: OrbaxReader, name: str, rows: range | None = None) -> list[Chunk]:
    """All stored chunks of an array, in the order of the grid; with `rows`, those that begin in them along the first dimension.

    Raises:
        InputError: one lies beyond the grid, or has been lost: where every chunk was stored, one that is not there does not
            stand for zeros.
    """
    spec, metadata = reader.tensors[name], reader.grids[name]
    grid = grid_shape(metadata)
    counts = [range(-(-size // step)) for size, step in zip(spec.shape, grid, strict=True)]
    if rows is not None:
        counts[0] = range(-(-rows.start // grid[0]), -(-rows.stop // grid[0]))
    found = sorted(_listed(reader, name, counts[0] if rows is not None else None))
    if beyond := next((each for each in found if any(i not in of for i, of in zip(each.at, counts, strict=True))), None):
        raise InputError(f"{reader.item}: {name} holds {beyond.key!r}, which is beyond its grid of {tuple(map(len, counts))}")
    if len(found) != math.prod(map(len, counts)) and reader.complete:
        have = {chunk.at for chunk in found}
        lost = next(at for at in itertools.product(*counts) if at not in have)
        raise InputError(f"{reader.item}: {name} cannot be read: chunk {key_at(metadata, lost)} is missing")
    return found


def _listed(reader: OrbaxReader, name: str, first: range | None) -> Iterator[Chunk]:
    """The chunks in the order of their keys; with `first`, those that have one of these numbers in the first place."""
    rank, metadata = len(reader.tensors[name].shape), reader.grids[name]
    words, separator = key_form(metadata)
    ranges = [ts.KvStore.KeyRange()]
    if first is not None:
        last = separator if rank > 1 else ""
        ranges = [_beginning(separator.join((*words, str(number))) + last, exactly=rank == 1) for number in first]
    for part in ranges:
        with told(reader.item, name):
            keys = answer(reader.values(name).list(part))
        for raw in keys:
            if (key := raw.decode()) not in _OTHERS and not key.endswith(LOCK):
                yield Chunk(_place(reader, name, key, separator, len(words), rank), name, key)


def _place(reader: OrbaxReader, name: str, key: str, separator: str, begin: int, rank: int) -> tuple[int, ...]:
    """Where the chunk of a key is in the grid.

    Raises:
        InputError: it is no key of a chunk.
    """
    try:
        found = tuple(map(int, key.split(separator)[begin:][:rank]))
    except ValueError:
        found = ()
    if len(found) != rank or key_at(reader.grids[name], found) != key:
        raise InputError(f"{reader.item}: {name} holds {key!r}, which is no chunk of an array of {rank} dimensions")
    return found


def _beginning(text: str, *, exactly: bool) -> Any:
    """The keys that begin with a text, or are it."""
    return ts.KvStore.KeyRange(text, text + "\0" if exactly else text[:-1] + chr(ord(text[-1]) + 1))


def contents(reader: OrbaxReader, chunks: Sequence[Chunk]) -> Iterator[bytes]:
    """The bytes of stored chunks, one after another: small ones as a whole, some of them ahead, and large ones in pieces.

    Raises:
        InputError: they cannot be read.
    """
    name = ""
    try:
        reading: deque[Any] = deque()
        for chunk in chunks:
            name, size = chunk.name, _decoded(reader, chunk.name)
            if size > PIECE:
                yield from _landed(reader, reading, 0)
                yield from _looked_at(reader, chunk, pieces_of(reader.values(name), chunk.key, 0, None)())
                continue
            if reader.use_ocdbt:
                check_stored(reader.values(name), reader.grids[name], reader.tensors[name], [chunk.at], reader.item)
            reading.append((chunk, reader.values(name).read(chunk.key)))
            yield from _landed(reader, reading, min(_AHEAD, PIECE // max(1, size)))
        yield from _landed(reader, reading, 0)
    except (ValueError, TimeoutError) as error:
        with told(reader.item, name):
            raise error


def _decoded(reader: OrbaxReader, name: str) -> int:
    """Bytes of a stored chunk once it is decoded; what is stored is hardly more."""
    return math.prod(grid_shape(reader.grids[name])) * itemsize(reader.tensors[name].dtype)


def _landed(reader: OrbaxReader, reading: deque[tuple[Chunk, Any]], most: int) -> Iterator[bytes]:
    """What the first of these reads give, until no more than `most` are left."""
    while len(reading) > most:
        chunk, found = reading.popleft()
        yield from _looked_at(reader, chunk, iter([answer(found).value]))


def _looked_at(reader: OrbaxReader, chunk: Chunk, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The bytes of a stored chunk, which nobody decodes: that it begins as a chunk does, and how long it is, can be seen.

    Raises:
        InputError: it is cut off, empty, or something else.
    """
    codec, wanted = codec_of(reader.grids[chunk.name]), _decoded(reader, chunk.name)
    begin, length = b"", 0
    for piece in pieces:
        begin, length = begin or piece[:_FRAME], length + len(piece)
        yield piece
    if not length and wanted:
        problem = "it is empty"
    elif codec is None or not wanted:
        return
    elif codec.shard:
        _check_index(reader, chunk)
        return
    elif not codec.compressed and length != wanted:
        problem = f"it has {length:,} bytes instead of {wanted:,}"
    elif codec.compressed and not begin.startswith(_ZSTD):
        problem = "it does not begin as a zstd frame"
    elif codec.compressed and (size := _frame_size(begin)) not in (-1, wanted):
        problem = f"its frame is of {size:,} bytes instead of {wanted:,}"
    else:
        return
    raise InputError(f"{reader.item}: {chunk.name} is damaged: chunk {chunk.key}: {problem}")


def _check_index(reader: OrbaxReader, chunk: Chunk) -> None:
    """Let TensorStore read the index of a shard, which ends in a crc32c of itself.

    Raises:
        InputError: it is damaged, or cut off.
    """
    metadata = reader.grids[chunk.name]
    inner = metadata["codecs"][0]["configuration"]
    grid = [whole // part for whole, part in zip(grid_shape(metadata), inner["chunk_shape"], strict=True)]
    with told(reader.item, f"{chunk.name}: the index of shard {chunk.key}"):
        answer(reader.shard(chunk.name, chunk.key, {"grid_shape": grid, "index_codecs": inner["index_codecs"]}).list())


def _frame_size(begin: bytes) -> int:
    """The bytes that a zstd frame says it holds; -1 where it does not say so, 0 where its header is damaged."""
    if zstd is None:
        return -1
    try:
        return int(zstd.frame_content_size(begin))
    except zstd.ZstdError:
        return 0
