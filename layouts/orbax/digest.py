"""The digest of an array as it is stored: of the bytes of its chunks, which nobody decodes.

In: an array of an Orbax checkpoint, or some of its chunks. Out: xxh3-128, hex. It never decodes.
Where chunks are kept, decoding them would be nearly all of the work. That the stored bytes are the same says more, not less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xxhash

from layouts.errors import InputError
from layouts.orbax.chunks import Chunk, chunks_of, contents
from layouts.orbax.reader import OrbaxReader
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
