"""The digest of an array as it is stored: of the bytes of its chunks, which nobody decodes.

Where chunks are kept, decoding them would be nearly all of the work; and that these bytes are the same says more, not less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xxhash

from layouts.orbax.chunks import Chunk, contents
from layouts.orbax.reader import OrbaxReader


def stored_digest(reader: OrbaxReader, chunks: Sequence[Chunk], told: Callable[[int], None]) -> str:
    """xxh3-128 (hex) of chunks, in this order. `told` is called with the bytes of each piece; it may raise to stop.

    Raises:
        InputError: a chunk cannot be read.
    """
    digest = xxhash.xxh3_128()
    for piece in contents(reader, chunks):
        digest.update(piece)
        told(len(piece))
    return digest.hexdigest()
