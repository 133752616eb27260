"""The digest of an array as it is stored: of the bytes of its chunks, which nobody decodes.

In: an array of an Orbax checkpoint, or some of its chunks. Out: xxh3-128, hex; and how much of a database nobody reads. It
never decodes.
Where chunks are kept, decoding them would be nearly all of the work. That the stored bytes are the same says more, not less.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from urllib.parse import unquote

import tensorstore as ts
import xxhash

from layouts.disk.faults import answer, told
from layouts.disk.places import files_of, kvstore_of
from layouts.errors import InputError
from layouts.orbax.chunks import Chunk, chunks_of, contents
from layouts.orbax.reader import OrbaxReader
from layouts.orbax.tree import DATABASE, PROCESS
from layouts.reader import Reader


def array_digest(reader: Reader, name: str, rows: range | None, told: Callable[[int], None]) -> tuple[str, int]:
    """The digest of an array, or of the chunks that begin in `rows` of its first dimension, and how many chunks these are.

    Raises:
        InputError: a chunk cannot be read, or this is no Orbax checkpoint.
    """
    if not isinstance(reader, OrbaxReader):
        raise InputError(f"{reader.path}: the manifest has digests of stored chunks, but this is no Orbax checkpoint")
    chunks = chunks_of(reader, name, rows)
    return stored_digest(reader, chunks, told), len(chunks)


def stored_digest(reader: OrbaxReader, chunks: Sequence[Chunk], told: Callable[[int], None]) -> str:
    """The digest of chunks, in this order. `told` is called with the bytes of each piece; it may raise to stop.

    Raises:
        InputError: a chunk cannot be read.
    """
    digest = xxhash.xxh3_128()
    for piece in contents(reader, chunks):
        digest.update(piece)
        told(len(piece))
    return digest.hexdigest()


def unread(reader: Reader) -> int:
    """Bytes of a database on a disk that nobody reads: those that its tree names no more, or under keys of no array.

    Raises:
        InputError: a node of the tree cannot be read.
    """
    if not isinstance(reader, OrbaxReader) or not reader.use_ocdbt:
        return 0
    named: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for place in _named(reader):
        _, folder, file, begin, nbytes = place.split(":")
        named[unquote(folder + file)].add((int(begin), int(begin) + int(nbytes)))
    data = (
        (name, size)
        for name, size, _ in files_of(reader.item)
        if name.startswith((PROCESS, *DATABASE[1:])) and not name.endswith(DATABASE[0])
    )
    return sum(size - _covered(named[name]) for name, size in data)


def _named(reader: OrbaxReader) -> Iterator[str]:
    """The places of all nodes and values of the tree, as TensorStore has them: kind, folder, file, begin, length."""
    arrays = {leaf.stored for leaf in reader.leaves.values()}
    with told(reader.item, "the tree of its database"):
        store = answer(ts.KvStore.open(kvstore_of(reader.item)))
        waiting = [answer(ts.ocdbt.dump(store))["versions"][-1]["root"].get("location")]
        while waiting:
            if (node := waiting.pop()) is None:  # of a database that is empty
                continue
            yield node
            for entry in answer(ts.ocdbt.dump(store, node))["entries"]:
                if "location" in entry:
                    waiting.append(entry["location"])
                elif "indirect_value" in entry and bytes(entry["key"]).decode().partition("/")[0] in arrays:
                    yield entry["indirect_value"]


def _covered(spans: set[tuple[int, int]]) -> int:
    """How many bytes lie in at least one of these."""
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
