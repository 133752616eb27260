"""Prove that an output is still what was written: all of its files, and the digest of every tensor.

In: a checkpoint with its manifest. Out: a verdict of the levels `files`, `digests` and `manifest`. It never believes the
manifest more than that somebody has written it: names in it are not opened, and digests cover all of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from convert.commit import manifest
from convert.commit.inventory import differences
from convert.commit.recorded import Manifest, load, spans_of
from convert.errors import InputError, readable
from convert.options import Verification
from convert.progress import Progress, ignore
from convert.verifier.bits.order import STRIP, hold
from convert.verifier.control.altered import AlteredReader
from convert.verifier.control.choice import of_other, told
from convert.verifier.files.sealed import compare_manifest
from convert.verifier.stand import stood
from convert.verifier.verdict import EQUAL, Level, Trial, Verdict
from layouts.checkpoint import open_checkpoint
from layouts.language.pattern import strips
from layouts.reader import Reader
from layouts.windows import lengths

_HELD = Level(
    name="content", covered="", compared=0, not_run="--content compares what it holds with what the input held", asked=False
)


@dataclass(slots=True)
class _Stored:
    """Chunks that were hashed as they are stored, and their bytes."""

    chunks: int = 0
    nbytes: int = 0

    def __str__(self) -> str:
        return f"{self.chunks:,} chunks of {self.nbytes:,} bytes"


def verify_manifest(path: Path, progress: Progress | None = None, options: Verification | None = None) -> Verdict:
    """Look at every file, hash every tensor again, and compare with the manifest that was written with them.

    Digests of stored chunks do not say that these can be decoded; with the option `decode`, it is tried.

    Raises:
        InputError: the checkpoint or its manifest is missing or corrupt.
    """
    with readable(path):
        return _verdict(path, progress or ignore, options or Verification())


def _verdict(path: Path, progress: Progress, options: Verification) -> Verdict:
    found = load(path) if path.is_dir() else None
    if found is None:
        raise InputError(f"{path}: no {manifest.NAME} here, so there are no digests to check; give two checkpoints to compare")
    count = sum(entry.count or 1 for entry in found.files.values())
    hashed = sum(entry.digest is not None for entry in found.files.values())
    files = Level(
        name="files",
        compared=count,
        covered=f"{count} files by name and size, {hashed} of them, without tensors, by xxh3-128",
        differences=tuple(differences(path, manifest.NAME, found.files)),
    )
    with closing(open_checkpoint(path)) as reader:
        _hold(reader, found.tensors, options.memory)
        itself = compare_manifest(reader, found)
        stored = _Stored()
        changed = tuple(_changed(reader, found, stored, progress))
        decoded = [_decoded(reader, stored, progress)] if options.decode else []
        both = found.tensors.keys() & reader.tensors.keys()
        digests = Level(name="digests", covered=_covered(found, stored, options), compared=len(both), differences=changed)
        trials = _self_test(reader, found, digests) if options.self_test else ()
        held = [_HELD] if found.content and not options.content else []
        verdict = Verdict(subject=str(path), levels=(files, digests, itself, *decoded, *held), self_test=trials)
        if not (options.content or options.self_test):
            return verdict
        return stood(verdict, (reader,), options, progress, found.content)


def _covered(found: Manifest, stored: _Stored, options: Verification) -> str:
    covered = f"{len(found.tensors)} tensors, xxh3-128"
    if stored.chunks and not options.decode:
        covered += f"; {stored} were not decoded; --decode reads them"
    return covered


def _self_test(reader: Reader, found: Manifest, digests: Level) -> tuple[Trial, ...]:
    """Whether the smallest tensor would be noticed with one bit flipped in memory."""
    flip = of_other(reader, list(found.tensors.keys() & reader.tensors.keys()))
    if digests.state != EQUAL or flip is None:
        return ()
    flipped = told(reader, flip)
    if found.hashed == manifest.CHUNKS:
        why = "these are digests of chunks as they are stored, which are not read as values"
        return (Trial(flipped=flipped, seen=(), untried={"digests": why}),)
    altered = AlteredReader(inner=reader, flips=(flip,))
    digest = found.tensors[flip.name].digest
    seen = any(_digest(altered, flip.name, rows, ignore) != wanted for rows, wanted in spans_of(digest))
    return (Trial(flipped=flipped, seen=("digests",) if seen else (), unseen=() if seen else ("digests",)),)


def _decoded(reader: Reader, stored: _Stored, progress: Progress) -> Level:
    """Whether every array can be read whole; where digests are of values, it has been."""
    if not stored.chunks:
        covered = f"{len(reader.tensors)} tensors, read whole for their digests"
        return Level(name="decoded", covered=covered, compared=len(reader.tensors))
    problems = []
    for name, spec in reader.tensors.items():
        try:
            for slices in strips(spec.shape, STRIP):
                progress(reader.read(name, slices).nbytes)
        except InputError as error:
            problems.append(f"{name} (in {reader.where(name)}) cannot be decoded: {error}")
    covered = f"{len(reader.tensors)} arrays, read whole: {stored}"
    return Level(name="decoded", covered=covered, compared=len(reader.tensors), differences=tuple(problems))


def _hold(reader: Reader, names: Iterable[str], memory: int) -> None:
    """Read these tensors strip by strip, within this memory."""
    specs = [spec for name in names if (spec := reader.tensors.get(name)) and spec.nbytes]
    hold(reader, {spec.name: lengths(next(strips(spec.shape, STRIP))) for spec in specs}, 1, memory)


def _changed(reader: Reader, found: Manifest, stored: _Stored, progress: Progress) -> Iterator[str]:
    """Each tensor that is not as the manifest has it, in words."""
    for name in sorted(found.tensors.keys() ^ reader.tensors.keys()):
        where = "the manifest" if name in found.tensors else "the checkpoint"
        yield f"{name} is only in {where}"
    for name in sorted(found.tensors.keys() & reader.tensors.keys()):
        entry, spec = found.tensors[name], reader.tensors[name]
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            yield f"{name} (in {reader.where(name)}) is {spec.dtype} {spec.shape}, and was {entry.dtype} {entry.shape}"
            continue
        for rows, digest in spans_of(entry.digest):
            if found.hashed == manifest.CHUNKS:
                have = _stored_digest(reader, name, rows, stored, progress)
            else:
                have = _digest(reader, name, rows, progress)
            if have != digest:
                where = f"{name}[{rows.start}:{rows.stop}]" if rows else name
                yield f"{where} (in {reader.where(name)}) is not what was written"


def _stored_digest(reader: Reader, name: str, rows: range | None, stored: _Stored, progress: Progress) -> str:
    """Of the chunks of a tensor as they are stored, or of those that begin in some rows of its first dimension."""
    from layouts.orbax.digest import array_digest

    def told(nbytes: int) -> None:
        stored.nbytes += nbytes
        progress(nbytes)

    digest, chunks = array_digest(reader, name, rows, told)
    stored.chunks += chunks
    return digest


def _digest(reader: Reader, name: str, rows: range | None, progress: Progress) -> str:
    """Of the values of a tensor, or of some rows of its first dimension."""
    spec = reader.tensors[name]
    digest = xxhash.xxh3_128()
    for slices in strips(spec.shape, STRIP, rows):
        block = reader.read(name, slices)
        digest.update(np.asarray(block, order="C").data)
        progress(block.nbytes)
    return digest.hexdigest()
