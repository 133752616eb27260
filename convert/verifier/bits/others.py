"""The proof of what is no expert's: every such tensor of two checkpoints of one format is equal bit for bit, by name.

In: the tensors of two checkpoints. Out: level `others`. It never rounds.
"""

from __future__ import annotations

from convert.commit.processes import ALONE, Processes
from convert.progress import Progress, begin
from convert.verifier.bits.alike import differing
from convert.verifier.bits.order import STRIP
from convert.verifier.bits.work import Scratch, Work, in_order
from convert.verifier.share import joined
from convert.verifier.verdict import Level
from layouts.language.pattern import strips
from layouts.matching.describe import Description
from layouts.reader import Reader


def compare_others(
    readers: tuple[Reader, Reader],
    described: tuple[Description, Description],
    progress: Progress,
    memory: int,
    jobs: int | None,
    processes: Processes = ALONE,
) -> Level:
    """Compare every tensor that is no expert weight, by name; several processes a part of them each."""
    a, b = readers
    left, right = (set(each.verbatim) for each in described)
    lonely = [f"{name} is only in {(a if name in left else b).path}" for name in sorted(left ^ right)]
    alike = [name for name in sorted(left & right) if a.tensors[name] == b.tensors[name]]
    unlike = [_unlike(a, b, name) for name in sorted((left & right) - set(alike))]
    own = alike[processes.stretch([a.tensors[name].nbytes for name in alike])]
    begin(progress, "bits of other tensors", sum(a.tensors[name].nbytes for name in own))
    differences, (nbytes,) = joined(processes, *_compare(readers, own, progress, memory, jobs))
    sizes = (reader.tensors[name].nbytes for reader, names in ((a, left), (b, right)) for name in names)
    why = "" if any(sizes) else "neither has a tensor that is no expert's"
    return Level(
        name="others",
        covered=f"{len(left & right)} other tensors (attention, norms, routers, embeddings, dense and shared MLPs)",
        compared=nbytes,
        differences=(*lonely, *unlike, *differences),
        not_run=why,
        asked=not why,
    )


def _unlike(a: Reader, b: Reader, name: str) -> str:
    one, other = a.tensors[name], b.tensors[name]
    return f"{name}: {one.dtype} {one.shape} in one, {other.dtype} {other.shape} in the other"


def _compare(
    readers: tuple[Reader, Reader], names: list[str], progress: Progress, memory: int, jobs: int | None
) -> tuple[list[str], int]:
    """The differences between these tensors of the same shape and type, and the bytes that were looked at."""
    work = Work.in_strips(memory, jobs, *readers)
    scratch, nbytes, counts = Scratch(), 0, dict[str, int]()

    def compare(item: tuple[str, tuple[slice, ...]]) -> tuple[str, int, int]:
        scratch.rewind()
        one, other = (reader.read(*item, scratch.empty) for reader in readers)
        found = differing(one, other)
        return item[0], found.count if found else 0, other.nbytes

    parts = ((name, part) for name in names for part in strips(readers[0].tensors[name].shape, STRIP))
    for name, count, size in in_order(compare, parts, work.jobs):
        counts[name] = counts.get(name, 0) + count
        nbytes += size
        progress(size)
    return [f"{name}: {count} elements differ" for name, count in counts.items() if count], nbytes
