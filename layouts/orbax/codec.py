"""Which zarr arrays are stored so simply that their chunks can be read piece by piece: C order, little-endian, zstd or nothing.

In: zarr metadata. Out: how its chunks are stored, or None. It never decodes.

And the pieces: parts of a stored value, one after another.

Source: zarr 2 and 3 specifications (zarr-specs.readthedocs.io).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layouts.disk.faults import answer

try:
    import zstandard as zstd
except ImportError:  # then such chunks are decoded whole
    zstd = None  # type: ignore[assignment]

__all__ = [
    "METADATA",
    "PIECE",
    "Codec",
    "Pieces",
    "codec_of",
    "fetch",
    "grid_shape",
    "key_form",
    "key_of",
    "pieces_of",
    "says_its_length",
    "streamable",
    "zstd",
]

PIECE = 1 << 20
"""Bytes of a stored chunk that are fetched at a time, and below which rows are read whole, although a part is wanted."""
METADATA: Mapping[str, str] = {"zarr": ".zarray", "zarr3": "zarr.json"}
"""The key of an array's own metadata, by TensorStore's driver."""
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """How chunks are stored: whether compressed, in shards of which shape (empty if in none), and under which key."""

    compressed: bool
    shard: tuple[int, ...]
    prefix: tuple[str, ...]
    separator: str


def codec_of(metadata: Mapping[str, Any]) -> Codec | None:
    """What a zarr array's metadata says, if it is of the simple kind that can be read piece by piece."""
    if "compressor" in metadata:
        compressor = metadata["compressor"]
        plain = metadata.get("order") == "C" and not metadata.get("filters") and _is_little(metadata["dtype"])
        if not plain or (compressor and compressor["id"] != "zstd"):
            return None
        prefix, separator = key_form(metadata)
        return Codec(compressed=bool(compressor), shard=(), prefix=prefix, separator=separator)
    codecs, shard = metadata.get("codecs") or [], ()
    encoding = metadata.get("chunk_key_encoding") or {"name": "default"}
    if encoding["name"] != "default":
        return None
    if codecs and codecs[0]["name"] == "sharding_indexed":
        inner = codecs[0]["configuration"]
        index = [codec["name"] for codec in inner.get("index_codecs", [])]
        if len(codecs) > 1 or inner.get("index_location", "end") != "end" or index != ["bytes", "crc32c"]:
            return None
        codecs, shard = inner["codecs"], tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
    names = [codec["name"] for codec in codecs if codec != _LITTLE and codec != {"name": "bytes"}]
    if names not in ([], ["zstd"]) or not codecs:
        return None
    prefix, separator = key_form(metadata)
    return Codec(compressed=bool(names), shard=shard, prefix=prefix, separator=separator)


def grid_shape(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of a stored chunk, which may hold smaller ones (`sharding_indexed`)."""
    found = metadata["chunks"] if "chunks" in metadata else metadata["chunk_grid"]["configuration"]["chunk_shape"]
    return tuple(map(int, found))


def key_form(metadata: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """What the keys of chunks begin with, and what stands between their numbers."""
    if "chunks" in metadata:
        return (), metadata.get("dimension_separator", ".")
    encoding = metadata.get("chunk_key_encoding") or {}
    return ("c",), encoding.get("configuration", {}).get("separator", "/")


def key_of(prefix: tuple[str, ...], separator: str, at: Sequence[int]) -> str:
    """The key of the chunk at this place of the grid."""
    return separator.join((*prefix, *map(str, at))) or "0"


def _is_little(dtype: Any) -> bool:
    return isinstance(dtype, str) and not dtype.startswith(">")


def streamable(metadata: Mapping[str, Any]) -> bool:
    """Whether chunks of an array with this zarr metadata can be read piece by piece."""
    codec = codec_of(metadata)
    return codec is not None and (zstd is not None or not codec.compressed)


def says_its_length(metadata: Mapping[str, Any]) -> bool:
    """Whether stored chunks are blosc's of plain values: TensorStore takes as much memory as such a chunk says.

    What is within a shard, or below another codec, is not looked at: blosc itself makes no more than 2 GiB of one.
    """
    if "compressor" in metadata:
        return bool((metadata["compressor"] or {}).get("id") == "blosc")
    names = [codec["name"] for codec in metadata.get("codecs") or () if codec["name"] != "transpose"]
    return names in (["bytes", "blosc"], ["bytes", "blosc", "crc32c"])


def fetch(kvstore: Any, key: str, part: slice) -> bytes:
    """A part of a stored value; nothing if there is no such value."""
    found = answer(kvstore.read(key, byte_range=part))
    return bytes(found.value) if found.state == "value" else b""


@dataclass(slots=True)
class Pieces:
    """What zstandard reads from; it can be begun again."""

    make: Any
    source: Iterator[bytes] | None = None

    def read(self, size: int = -1) -> bytes:  # noqa: ARG002
        """The next piece, whatever size is asked for; none at the end."""
        if self.source is None:
            self.source = self.make()
        return next(self.source, b"")

    def rewind(self) -> None:
        """Begin again."""
        self.source = None


def pieces_of(kvstore: Any, key: str, begin: int, end: int | None) -> Any:
    """The bytes of a stored value from `begin` to `end`, in pieces; to its end if that is not known."""

    def pieces() -> Iterator[bytes]:
        at = begin
        while end is None or at < end:
            stop = at + PIECE if end is None else min(end, at + PIECE)
            try:
                piece = fetch(kvstore, key, slice(at, stop))
            except ValueError as error:
                if end is not None or "OUT_OF_RANGE" not in str(error):
                    raise
                piece = _last(kvstore, key, at)
            if not piece:
                return
            yield piece
            at += len(piece)

    return pieces


def _last(kvstore: Any, key: str, at: int) -> bytes:
    """The rest of a value that ends within a piece."""
    try:
        return fetch(kvstore, key, slice(at, None))
    except ValueError as error:
        if "OUT_OF_RANGE" in str(error):
            return b""
        raise
