"""Make the tensors of an adapter's output, batch by batch, with their digests: one block of experts in memory at a time.

In: a plan and the open input. Out: bytes to whoever asked, digests. It never writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from convert.adapters.making import make, specs
from convert.adapters.plan import AdapterPlan
from convert.progress import Progress
from layouts.adapters.neutral import Bits
from layouts.hf import HFReader
from layouts.language.pattern import strips

_STRIP = 1 << 22
"""Elements of another tensor that are copied at a time."""


def _batches(plan: AdapterPlan, reader: HFReader) -> Iterator[tuple[tuple[str, ...], Iterator[tuple[str, int, Bits]]]]:
    """What becomes durable together: the names of its tensors, and their parts with the element that each begins at."""
    for making in plan.makings:
        names = tuple(spec.name for spec in specs(making, plan.way.target))
        yield names, ((name, 0, array) for name, array in make(reader, making, plan.way).items())
    for name, stored in plan.copied.items():
        yield (name,), parts(name, stored, reader)


def parts(name: str, stored: str, reader: HFReader) -> Iterator[tuple[str, int, Bits]]:
    """A tensor as it is stored, a strip at a time: its name, the byte that the strip begins at, the strip."""
    done = 0
    for slices in strips(reader.tensors[stored].shape, _STRIP):
        block = reader.read(stored, slices)
        yield name, done, block
        done += block.nbytes


def digests(
    plan: AdapterPlan, reader: HFReader, done: Mapping[str, str], write: Any, progress: Progress
) -> Iterator[dict[str, str]]:
    """Make every batch that is not `done`, hand its parts to `write`, and tell their digests."""
    for names, parts in _batches(plan, reader):
        if names and all(name in done for name in names):
            progress(sum(plan.specs[name].nbytes for name in names))
            continue
        hashes = {name: xxhash.xxh3_128() for name in names}
        for name, offset, block in parts:
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
            write(name, offset, data)
            hashes[name].update(data)
            progress(len(data))
        yield {name: found.hexdigest() for name, found in hashes.items()}
