"""The parts of Orbax arrays that are written, hashed and journalled at once, and divided among processes. Pure.

In: targets and how they are cut. Out: portions and batches. It never reads or writes them.

A scanned `wi` of a large model is one array of hundreds of GB. It is cut along its first dimension, where the chunks end, so
that an interruption costs a portion of it, and several processes can share it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from convert.commit.manifest import Digest
from convert.orbax.chunks import Chunking
from convert.planning.targets import Target
from layouts.language.pattern import Box
from layouts.tensors import itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """An array, or `rows` of its first dimension."""

    chunking: Chunking
    rows: range | None = None

    @property
    def target(self) -> Target:
        """The array."""
        return self.chunking.target

    @property
    def key(self) -> str:
        """What it is called in the journal."""
        return self.target.spec.name if self.rows is None else f"{self.target.spec.name}[{self.rows.start}:{self.rows.stop}]"

    @property
    def nbytes(self) -> int:
        """Of the stored values, before compression."""
        whole = self.target.spec.nbytes
        return whole if self.rows is None else whole // self.target.spec.shape[0] * len(self.rows)

    def boxes(self) -> Iterator[Box]:
        """What is assembled and written, box by box."""
        return self.chunking.boxes(self.rows)

    def strips(self, limit: int) -> Iterator[Box]:
        """Boxes in storage order, of at most `limit` bytes."""
        count = max(1, limit // itemsize(self.target.spec.dtype))
        return self.target.target.pattern.strips(self.target.sizes, count, self.rows)


def cut(targets: Iterable[Target], chunking: Callable[[Target], Chunking], limit: int) -> Iterator[Portion]:
    """The portions of arrays, in order: of about `limit` bytes, where a chunk of the first dimension is not more."""
    for target in targets:
        cells = chunking(target)
        shape, groups = target.spec.shape, target.target.pattern.groups
        if target.spec.nbytes <= limit or not shape or len(groups[0]) > 1:
            yield Portion(chunking=cells)
            continue
        row, cell = target.spec.nbytes // shape[0], cells.cell[groups[0][0]]
        step = cell * max(1, limit // (row * cell))
        spans = [range(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
        yield from (Portion(chunking=cells, rows=span if len(spans) > 1 else None) for span in spans)


def batches(portions: Iterable[Portion], limit: int) -> Iterator[list[Portion]]:
    """Neighbours, about `limit` bytes together: what a power cut can cost."""
    batch: list[Portion] = []
    nbytes = 0
    for portion in portions:
        if batch and nbytes + portion.nbytes > limit:
            yield batch
            batch, nbytes = [], 0
        batch.append(portion)
        nbytes += portion.nbytes
    if batch:
        yield batch


def total(portions: Iterable[Portion]) -> int:
    """Bytes of them all."""
    return sum(portion.nbytes for portion in portions)


def by_array(portions: Iterable[Portion], found: Mapping[str, str]) -> dict[str, Digest]:
    """The digests of arrays, from those of their portions."""
    digests: dict[str, Digest] = {}
    parts: dict[str, dict[str, str]] = {}
    for portion in portions:
        name = portion.target.spec.name
        if portion.rows is None:
            digests[name] = found[portion.key]
        else:
            parts.setdefault(name, {})[f"{portion.rows.start}:{portion.rows.stop}"] = found[portion.key]
    return digests | parts
