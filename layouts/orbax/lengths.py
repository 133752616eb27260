"""How large files of an item may be that are read as a whole: metadata, manifests of databases, chunks in their own files.

In: an item's directory and what its arrays say of themselves. Out: nothing, or an error. It never opens a file.
A file of 8 GiB costs nothing where it is a hole, and as a chunk of some kB it would be read into memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layouts.disk.files import check_size
from layouts.disk.places import is_remote, names_of
from layouts.errors import InputError
from layouts.orbax.tree import DATABASE, PROCESS, Leaf
from layouts.tensors import TensorSpec, itemsize

_BESIDE, _EACH = 64 << 10, 64
"""Bytes that a stored chunk may have besides twice those of its elements, and of each chunk in a shard: of frames and index."""


_METADATA = ("zarr.json", ".zarray", ".zattrs")


def check_metadata(item: Path, leaves: Iterable[Leaf], *, ocdbt: bool, zarr3: bool) -> None:
    """Refuse metadata of arrays, or a database's manifest, that is larger than one may be.

    Raises:
        InputError: one is.
        OSError: the directory cannot be listed.
    """
    if is_remote(item):
        return
    if ocdbt:
        for folder in (item, *(child for child in item.iterdir() if child.name.startswith(PROCESS))):
            check_size(folder / DATABASE[0])
        return
    for leaf in leaves:
        check_size(item / leaf.stored / ("zarr.json" if zarr3 else ".zarray"))


def check_chunks(item: Path, stored: Mapping[str, str], grids: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
    """Refuse a file of an array that is larger than any encoding makes a chunk of it; `stored` are names of directories.

    Raises:
        InputError: one is.
        OSError: a directory cannot be listed.
    """
    for name, place in stored.items() if not is_remote(item) else ():
        most = _most(grids[name], itemsize(tensors[name].dtype))
        for file in names_of(item / place):
            size = 0 if file.endswith(_METADATA) else _size(os.path.join(item, place, file))
            if size > most:
                where = item / place / file
                raise InputError(f"{where}: it has {size:,} bytes, and {most:,} are the most that a chunk of {name} may have")


def _size(path: str) -> int:
    """Of a file; none of a link to nothing, which whoever needs it finds missing."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _most(metadata: Mapping[str, Any], width: int) -> int:
    """Bytes that a stored chunk may have."""
    grid = metadata["chunks"] if "chunks" in metadata else metadata["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = metadata.get("codecs") or [{}]
    inner = codecs[0].get("configuration", {}).get("chunk_shape", grid)
    elements, chunks = math.prod(map(int, grid)), math.prod(grid) // max(1, math.prod(inner))
    return 2 * width * elements + _BESIDE + _EACH * int(chunks)
