"""Which zarr arrays are stored so simply that their chunks can be read piece by piece: C order, little-endian, zstd or nothing.

Source: zarr 2 and 3 specifications (zarr-specs.readthedocs.io).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

try:
    import zstandard as zstd
except ImportError:  # then such chunks are decoded whole
    zstd = None  # type: ignore[assignment]

__all__ = ["Codec", "codec_of", "streamable", "zstd"]

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
        separator = metadata.get("dimension_separator", ".")
        return Codec(compressed=bool(compressor), shard=(), prefix=(), separator=separator)
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
    separator = encoding.get("configuration", {}).get("separator", "/")
    return Codec(compressed=bool(names), shard=shard, prefix=("c",), separator=separator)


def _is_little(dtype: Any) -> bool:
    return isinstance(dtype, str) and not dtype.startswith(">")


def streamable(metadata: Mapping[str, Any]) -> bool:
    """Whether chunks of an array with this zarr metadata can be read piece by piece."""
    codec = codec_of(metadata)
    return codec is not None and (zstd is not None or not codec.compressed)
