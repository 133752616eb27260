"""Hash what a manifest has digests of once more, or decode it.

In: a checkpoint and its manifest. Out: what is not as it was, in words. It never opens what only the manifest names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import xxhash

from convert.commit import manifest
from convert.commit.processes import ALONE, Processes
from convert.commit.recorded import Manifest, spans_of
from convert.errors import InputError
from convert.options import Verification
from convert.progress import Progress, begin, ignore
from convert.verifier.bits.order import STRIP, hold
from convert.verifier.bits.work import Scratch, Work, in_order
from convert.verifier.share import joined
from convert.verifier.verdict import Level
from layouts.computing import open_originals
from layouts.language.pattern import strips
from layouts.reader import Reader, is_chunked
from layouts.side_files import ORIGINALS
from layouts.windows import lengths


@dataclass(slots=True)
class Stored:
    """Chunks that were hashed as they are stored, and their bytes."""

    chunks: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        return f"{self.chunks:,} chunks of {self.nbytes:,} bytes"


def hold_strips(reader: Reader, names: Iterable[str], memory: int) -> None:
    """Read these tensors strip by strip, within this memory."""
    if not is_chunked(reader):
        return
    specs = [spec for name in names if (spec := reader.tensors.get(name)) and spec.nbytes]
    hold(reader, {spec.name: lengths(next(strips(spec.shape, STRIP))) for spec in specs}, 1, memory)


def changed(
    reader: Reader, found: Manifest, stored: Stored, progress: Progress, options: Verification, processes: Processes
) -> tuple[str, ...]:
    """Each tensor that is not as the manifest has it, in words; several processes look at a part of them each."""
    where = {True: "the manifest", False: "the checkpoint"}
    lonely = sorted(found.tensors.keys() ^ reader.tensors.keys())
    own = _own(reader, sorted(found.tensors.keys() & reader.tensors.keys()), processes)
    begin(progress, "digests", _to_hash(reader, found, own, processes))
    work = Work.in_strips(options.memory, options.jobs, reader)
    lines = list(_changed(reader, found, own, stored, progress, work))
    lines, (stored.chunks, stored.nbytes) = joined(processes, lines, stored.chunks, stored.nbytes)
    return (*(f"{name} is only in {where[name in found.tensors]}" for name in lonely), *lines)


def originals(
    reader: Reader, found: Manifest, options: Verification, processes: Processes = ALONE
) -> tuple[int, tuple[str, ...]] | None:
    """How many originals of computed tensors a tree keeps, and which are not what was written; None if it keeps none.

    Those of a tree that was trained since are: what they are no longer is what its values were made of.
    """
    kept = open_originals(reader) if found.originals else None
    if kept is None:
        return None
    with closing(kept):
        entries = replace(found, tensors=found.originals, hashed=None)
        lines = changed(kept, entries, Stored(), ignore, options, processes)
        return len(found.originals.keys() & kept.tensors.keys()), tuple(f"{ORIGINALS}: {line}" for line in lines)


def _to_hash(reader: Reader, found: Manifest, own: Iterable[str], processes: Processes) -> int | None:
    """Bytes of these tensors; where chunks are hashed as they are stored, about this process's part of the files."""
    if found.hashed != manifest.CHUNKS:
        return sum(reader.tensors[name].nbytes for name in own)
    return sum(entry.size or 0 for entry in found.files.values()) // processes.count or None


def _own(reader: Reader, names: Iterable[str], processes: Processes) -> list[str]:
    """Of these tensors the ones that this process reads."""
    every = list(names)
    return every[processes.stretch([reader.tensors[name].nbytes for name in every])]


def _changed(
    reader: Reader, found: Manifest, names: Iterable[str], stored: Stored, progress: Progress, work: Work
) -> Iterator[str]:
    """Several at a time, each span of a tensor that has a digest of its own; progress is told from this thread alone."""
    look = partial(_look, reader, found, progress if work.jobs == 1 else ignore, Scratch())
    spans = [(name, *span) for name in names for span in _spans(reader, found, name)]
    for line, seen in in_order(look, spans, work.jobs):
        stored.chunks += seen.chunks
        stored.nbytes += seen.nbytes if seen.chunks else 0
        if work.jobs > 1:
            progress(seen.nbytes)
        if line:
            yield line


def _spans(reader: Reader, found: Manifest, name: str) -> list[tuple[range | None, str | None]]:
    """Those of a tensor; one without a digest, if there is another tensor in its place."""
    entry, spec = found.tensors[name], reader.tensors[name]
    return [*spans_of(entry.digest)] if (entry.dtype, entry.shape) == (spec.dtype, spec.shape) else [(None, None)]


def _look(
    reader: Reader, found: Manifest, progress: Progress, scratch: Scratch, span: tuple[str, range | None, str | None]
) -> tuple[str, Stored]:
    """What is wrong with a span of a tensor, in words, and what was hashed."""
    (name, rows, digest), seen = span, Stored()
    entry, spec = found.tensors[name], reader.tensors[name]
    if digest is None:
        line = f"{name} (in {reader.where(name)}) is {spec.dtype} {spec.shape}, and was {entry.dtype} {entry.shape}"
        return line, seen

    def told(nbytes: int) -> None:
        seen.nbytes += nbytes
        progress(nbytes)

    if found.hashed == manifest.CHUNKS:
        from layouts.orbax.digest import array_digest

        have, seen.chunks = array_digest(reader, name, rows, told)
    else:
        have = digest_of(reader, name, rows, told, scratch)
    where = f"{name}[{rows.start}:{rows.stop}]" if rows else name
    return "" if have == digest else f"{where} (in {reader.where(name)}) is not what was written", seen


def digest_of(reader: Reader, name: str, rows: range | None, progress: Progress, scratch: Scratch) -> str:
    """Of the values of a tensor, or of some rows of its first dimension."""
    spec = reader.tensors[name]
    digest = xxhash.xxh3_128()
    for slices in strips(spec.shape, STRIP, rows):
        scratch.rewind()
        block = reader.read(name, slices, scratch.empty)
        digest.update(np.asarray(block, order="C").data)
        progress(block.nbytes)
    return digest.hexdigest()


def decoded(reader: Reader, stored: Stored, progress: Progress, processes: Processes) -> Level:
    """Whether every array can be read whole; where digests are of values, it has been."""
    if not stored.chunks:
        covered = f"{len(reader.tensors)} tensors, read whole for their digests"
        return Level(name="decoded", covered=covered, compared=len(reader.tensors))
    problems = []
    own = _own(reader, reader.tensors, processes)
    begin(progress, "decoding", sum(reader.tensors[name].nbytes for name in own))
    for name in own:
        try:
            for slices in strips(reader.tensors[name].shape, STRIP):
                progress(reader.read(name, slices).nbytes)
        except InputError as error:
            problems.append(f"{name} (in {reader.where(name)}) cannot be decoded: {error}")
    covered = f"{len(reader.tensors)} arrays, read whole: {stored}"
    problems, _ = joined(processes, problems)
    return Level(name="decoded", covered=covered, compared=len(reader.tensors), differences=tuple(problems))
