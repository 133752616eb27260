"""Prove that an output is still what was written: all of its files, and the digest of every tensor.

In: a checkpoint with its manifest. Out: a verdict of the levels `files`, `digests` and `manifest`. It never believes the
manifest more than that somebody has written it: names in it are not opened, and digests cover all of a tensor.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from convert.commit import manifest
from convert.commit.inventory import differences
from convert.commit.processes import ALONE, Processes
from convert.commit.recorded import Manifest, load, spans_of
from convert.errors import InputError, readable
from convert.options import Verification
from convert.progress import Progress, begin, ignore
from convert.verifier.bits.work import Scratch
from convert.verifier.control.altered import AlteredReader
from convert.verifier.control.choice import of_other, told
from convert.verifier.files.digests import Stored, changed, decoded, digest_of, hold_strips, originals
from convert.verifier.files.sealed import compare_manifest
from convert.verifier.share import agree, by_first
from convert.verifier.sides import check_said
from convert.verifier.stand import stood
from convert.verifier.verdict import EQUAL, Level, Trial, Verdict
from layouts.checkpoint import open_checkpoint
from layouts.disk.places import is_remote
from layouts.reader import Reader, is_chunked
from layouts.side_files import ORIGINALS

_HELD = Level(
    name="content", covered="", compared=0, not_run="--content compares what it holds with what the input held", asked=False
)


def verify_manifest(
    path: Path, progress: Progress | None = None, options: Verification | None = None, processes: Processes = ALONE
) -> Verdict:
    """Look at every file, hash every tensor again, and compare with the manifest that was written with them.

    Digests of stored chunks do not say that these can be decoded; with the option `decode`, it is tried.
    Several `processes` hash a part of the tensors each; all come to the same verdict.

    Raises:
        InputError: the checkpoint or its manifest is missing or corrupt.
    """
    with processes.together(), readable(path):
        return _verdict(path, processes.watched(progress or ignore), options or Verification(), processes)


def _verdict(path: Path, progress: Progress, options: Verification, processes: Processes) -> Verdict:
    found = load(path) if path.is_dir() else None
    if found is None:
        raise InputError(f"{path}: no {manifest.NAME} here, so there are no digests to check; give two checkpoints to compare")
    agree(processes, lambda: (found, options))
    begin(progress, "files")
    files = by_first(processes, lambda: _files(path, found))
    with closing(open_checkpoint(path)) as reader:
        agree(processes, lambda: list(reader.tensors.values()))
        check_said((reader,), options)
        hold_strips(reader, found.tensors, options.memory)
        itself = by_first(processes, lambda: compare_manifest(reader, found))
        files = by_first(processes, lambda: _with_unread(files, reader))
        stored = Stored()
        differ = changed(reader, found, stored, progress, options, processes)
        missing = (f"{ORIGINALS} is missing, and the manifest has digests of it",) if found.originals else ()
        kept, unlike = originals(reader, found, options, processes) or (0, missing)
        both = len(found.tensors.keys() & reader.tensors.keys()) + kept
        covered = _covered(found, stored, options, kept)
        digests = Level(name="digests", covered=covered, compared=both, differences=differ + unlike)
        levels = [files, digests, itself]
        levels += [decoded(reader, stored, progress, processes)] if options.decode else []
        levels += [_HELD] if found.content and not options.content else []
        verdict = Verdict(subject=str(path), levels=tuple(levels))
        return _attested(verdict, reader, found, options, progress, processes)


def _files(path: Path, found: Manifest) -> Level:
    count = sum(entry.count or 1 for entry in found.files.values())
    hashed = sum(entry.digest is not None for entry in found.files.values())
    return Level(
        name="files",
        compared=count,
        covered=f"{count} files by name and size, {hashed} of them, without tensors, by xxh3-128",
        differences=tuple(differences(path, manifest.NAME, found.files)),
    )


def _with_unread(files: Level, reader: Reader) -> Level:
    """With what nobody reads of a database; how much that is nobody knows in a store."""
    if not is_chunked(reader):
        return files
    from layouts.orbax.digest import unread

    count = None if is_remote(reader.path) else unread(reader)
    told = "" if count == 0 else f"; {'any' if count is None else f'{count:,}'} bytes that no tree names were not looked at"
    return replace(files, covered=files.covered + told)


def _attested(
    verdict: Verdict, reader: Reader, found: Manifest, options: Verification, progress: Progress, processes: Processes
) -> Verdict:
    """The verdict with what a report has besides, as far as that is asked for."""
    if options.self_test:
        digests = next(level for level in verdict.levels if level.name == "digests")
        verdict = replace(verdict, self_test=_self_test(reader, found, digests))
    if not (options.content or options.self_test):
        return verdict
    return stood(verdict, (reader,), options, progress, found.content, processes)


def _covered(found: Manifest, stored: Stored, options: Verification, kept: int) -> str:
    originals = f" and {kept} original{'s' * (kept > 1)} of computed ones" if kept else ""
    covered = f"{len(found.tensors)} tensors{originals}, xxh3-128"
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
    seen = any(digest_of(altered, flip.name, rows, ignore, Scratch()) != wanted for rows, wanted in spans_of(digest))
    return (Trial(flipped=flipped, seen=("digests",) if seen else (), unseen=() if seen else ("digests",)),)
