"""How large what an item stores may be where it is read as a whole: metadata, manifests and nodes of databases, chunks.

In: an item's directory, its databases, what its arrays say of themselves. Out: nothing, or an error. It never reads more than a
byte, but for the nodes of a database that name others. A file of 8 GiB costs nothing where it is a hole, and as a chunk of
some kB it would be read into memory.
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import tensorstore as ts

from layouts.disk.faults import answer, told
from layouts.disk.files import LIMITS, check_size
from layouts.disk.places import is_remote, kvstore_of, names_of
from layouts.errors import InputError
from layouts.orbax.codec import METADATA, PIECE, Pieces, fetch, grid_shape, key_form, key_of, pieces_of, says_its_length, zstd
from layouts.orbax.tree import DATABASE, PROCESS, Leaf
from layouts.tensors import TensorSpec, itemsize

_BESIDE, _EACH = 64 << 10, 64
"""Bytes that a stored chunk may have besides twice those of its elements, and of each chunk in a shard: of frames and index."""
_RATIO, _ZEROS = 1 << 15, 16 << 30
"""Bytes that a stored one stands for at most (zstd: 128 KiB by 4 bytes), and bytes of zeros that may be left out anyway."""

_NODE = 128 << 20
"""Bytes of a database's node: Orbax has TensorStore divide one that has more than 100 MB (`max_decoded_node_bytes`)."""
_LEAF: Mapping[str, Any] = {"height": 0, "entries": ()}
"""What is taken of a node of values, which name no others."""
_HEAD, _CRC, _PLAIN, _ZSTD = 14, 4, b"\0\0", b"\0\1"
"""Bytes before and behind the body of a manifest or a node, and how the head ends: version 0, and whether there is zstd."""
_BLOSC = 16
"""Bytes of the head of a chunk in blosc: four of versions, then how long it decodes to as uint32 (c-blosc)."""
_UUID = 16
"""Bytes of the manifest before the one that says whether versions are in files of their own, which none would look at."""
_METADATA = (*METADATA.values(), ".zattrs")


def check_metadata(item: Path, leaves: Iterable[Leaf], *, ocdbt: bool, zarr3: bool) -> None:
    """Refuse metadata of arrays, or a database's manifest, that is larger than one may be.

    Raises:
        InputError: one is.
        OSError: the directory cannot be listed, or the store is failing.
    """
    if ocdbt:
        for folder in (child for child in item.iterdir() if child.name.startswith(PROCESS)) if not is_remote(item) else ():
            check_size(folder / DATABASE[0])
        check_nodes(item)
        return
    for leaf in leaves if not is_remote(item) else ():
        check_size(item / leaf.stored / ("zarr.json" if zarr3 else ".zarray"))


def check_nodes(item: Path) -> None:
    """Refuse a database that names a node which is longer than any or decodes to more, or one twice, or cannot be entered.

    A name says where a node lies and how long it is, and TensorStore believes it: 8 GiB of a hole are read, and a tree that
    names a node twice has no end for who lists it. Source: https://google.github.io/tensorstore/kvstore/ocdbt.

    Raises:
        InputError: it does, or it keeps its versions elsewhere, as none of Orbax's does.
        OSError: the disk or the store is failing.
    """
    where, base = item / DATABASE[0], kvstore_of(item)
    with told(item, DATABASE[0]):
        store = answer(ts.KvStore.open(base))
        check_values(store, [(DATABASE[0], LIMITS[DATABASE[0]])], str(item))
        numbered = _check_decoded(store, DATABASE[0], 0, LIMITS[DATABASE[0]], where)[_UUID : _UUID + 1] != b"\0"
        versions = [] if numbered else answer(ts.ocdbt.dump(store)).get("versions")
    if not versions:
        raise InputError(f"{where}: the versions of the database are not in it; Orbax writes none such")
    root = versions[-1]
    waiting, seen = [(root["root"].get("location"), root["root_height"])], set[str]()
    while waiting:
        node, height = waiting.pop()
        if node is None:  # of a database that is empty
            continue
        if node in seen:
            raise InputError(f"{where}: its tree names the node {node} twice: it is damaged")
        seen.add(node)
        _, folder, file, begin, nbytes = node.split(":")
        if int(nbytes) > _NODE:
            raise InputError(
                f"{where}: its tree names a node of {int(nbytes):,} bytes; {_NODE:,} are the most that one may have"
            )
        with told(item, f"the node {node}"):
            _check_decoded(store, unquote(folder + file), int(begin), _NODE, f"{where}: the node {node}", int(nbytes))
            found = answer(ts.ocdbt.dump(store, node)) if height else _LEAF
        if found["height"] != height:
            raise InputError(f"{where}: the node {node} is not where its tree says: it is damaged")
        waiting += [(entry["location"], height - 1) for entry in found["entries"]]
    with told(item, DATABASE[0]):
        answer(answer(ts.KvStore.open({"driver": "ocdbt", "base": base})).read("\0"))


def _check_decoded(store: Any, key: str, begin: int, most: int, where: object, nbytes: int | None = None) -> bytes:
    """The beginning of a manifest or a node, which may not decode to more than `most` bytes: 50 kB may stand for gigabytes.

    It is made of its magic, its length as uint64, version and compression, the body, and a CRC.

    Raises:
        InputError: it does, or it is of another form, or not as long as `nbytes`.
        ValueError: it is not there.
    """
    head = fetch(store, key, slice(begin, begin + _HEAD))
    length, form = int.from_bytes(head[4:12], "little"), head[12:_HEAD]
    if form not in (_PLAIN, _ZSTD) or length > most or nbytes not in (None, length):
        raise InputError(f"{where} is {'damaged, or of a form that is not known' if head else 'missing'}")
    pieces = Pieces(pieces_of(store, key, begin + _HEAD, begin + length - _CRC))
    if form == _PLAIN or zstd is None:
        return pieces.read()[: _UUID + 1]
    source = zstd.ZstdDecompressor().stream_reader(pieces, read_size=PIECE, read_across_frames=True)  # type: ignore[arg-type]
    first, held = b"", 0
    try:
        while part := source.read(PIECE):
            first, held = first or part[: _UUID + 1], held + len(part)
            if held > most:
                raise InputError(f"{where} decodes to more than {most:,} bytes, which are the most that it may have")
    except zstd.ZstdError as error:
        raise InputError(f"{where} is damaged: {error}") from None
    return first


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


def check_values(found: Any, wanted: Iterable[tuple[str, int]], where: str) -> None:
    """Refuse values of a key-value store, by key, that are longer than these bytes. A database says of each how long it is.

    Raises:
        InputError: one is. Whatever else is wrong with a value, who reads it says so.
    """
    # The byte behind the last one: a database answers from its tree that there is none (30 microseconds each).
    asked = [(key, most, found.read(key, byte_range=slice(most, most + 1))) for key, most in wanted]
    for key, most, reading in asked:
        try:
            beyond = answer(reading).value
        except ValueError:
            continue
        if beyond:
            raise InputError(f"{where}: {key} has more than {most:,} bytes, which are the most that it may have")


def check_stored(
    found: Any, metadata: Mapping[str, Any], spec: TensorSpec, places: Iterable[tuple[int, ...]], where: object
) -> None:
    """The same of the stored chunks of an array at these places of its grid; and of blosc's, which says how long it decodes to.

    Raises:
        InputError: one is longer, or says that it decodes to something else.
        ValueError: one cannot be read.
    """
    width, keys = itemsize(spec.dtype), [key_of(*key_form(metadata), at) for at in places]
    check_values(found, ((key, _most(metadata, width)) for key in keys), f"{where}: {spec.name}")
    if not says_its_length(metadata):
        return
    for key in keys:
        head, decoded = fetch(found, key, slice(0, _BLOSC)), width * math.prod(grid_shape(metadata))
        if head and (said := int.from_bytes(head[4:8], "little")) != decoded:
            raise InputError(f"{where}: {spec.name}: {key} says that it decodes to {said:,} bytes; a chunk has {decoded:,}")


def chunks_under(metadata: Mapping[str, Any], slices: Sequence[slice]) -> Iterator[tuple[int, ...]]:
    """The places of the stored chunks that a block lies in."""
    spans = zip(slices, grid_shape(metadata), strict=True)
    return itertools.product(*(range(cut.start // step, -(-cut.stop // step)) for cut, step in spans))


def check_total(item: Path, tensors: Iterable[TensorSpec]) -> None:
    """Refuse arrays that are larger together than what is stored can stand for: 3 kB that say petabytes would take years.

    Chunks of zeros need not be stored. An optimizer that has not begun is all zeros, but its parameters lie beside it.

    Raises:
        InputError: they are.
        OSError: a directory cannot be listed.
    """
    wanted = sum(spec.nbytes for spec in tensors) - _ZEROS
    if wanted <= 0 or is_remote(item):
        return
    held = 0
    for size in _sizes(item):
        held += size
        if held * _RATIO >= wanted:
            return
    raise InputError(
        f"{item}: its arrays would have {wanted + _ZEROS:,} bytes, and the {held:,} bytes that are stored cannot stand for so "
        f"much: the metadata is damaged. Get the checkpoint again"
    )


def _sizes(item: Path) -> Iterator[int]:
    """Those of all files, each directory once, wherever links lead."""
    seen, waiting = set(), [os.fspath(item)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                try:
                    found = entry.stat()
                except FileNotFoundError:  # a link to nothing
                    continue
                if not stat.S_ISDIR(found.st_mode):
                    yield found.st_size
                elif (place := (found.st_dev, found.st_ino)) not in seen:
                    seen.add(place)
                    waiting.append(entry.path)


def _size(path: str) -> int:
    """Of a file; none of a link to nothing, which whoever needs it finds missing."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _most(metadata: Mapping[str, Any], width: int) -> int:
    """Bytes that a stored chunk may have."""
    grid = grid_shape(metadata)
    codecs = metadata.get("codecs") or [{}]
    inner = codecs[0].get("configuration", {}).get("chunk_shape", grid)
    elements, chunks = math.prod(grid), math.prod(grid) // max(1, math.prod(inner))
    return 2 * width * elements + _BESIDE + _EACH * int(chunks)
