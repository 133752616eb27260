"""What manifests say of two checkpoints: digests that were recorded when one was made of the other, or when both were written.

In: two open checkpoints. Out: level `recorded`. It says that digests agree, and never that weights are equal: those of a side
whose manifest is believed are not read. A manifest is believed where nothing that is cheap to see speaks against it; it guards
against accidents alone. Else bytes decide.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from convert.commit.identity import input_digest
from convert.commit.inventory import differences
from convert.commit.manifest import CHUNKS, NAME, Digest
from convert.commit.recorded import Load, Manifest, check_spans, spans_of
from convert.errors import InputError, PlanError
from convert.options import Verification
from convert.progress import Progress, begin, ignore
from convert.verifier.bits.work import Scratch, Work, in_order
from convert.verifier.files.digests import digest_of, hold_strips
from convert.verifier.files.sealed import compare_manifest
from convert.verifier.sides import described_alike
from convert.verifier.verdict import Level
from layouts.disk.places import files_of, is_remote
from layouts.reader import Reader

UNREAD = "bits by recorded digests, not read"
"""What a verdict is about that rests on this level."""


@dataclass(frozen=True, kw_only=True)
class _Match:
    """Digests of the tensors of `reader`: `wanted`, and `have`, or None where these are to be read.

    `believed` are the sides whose tensors are not read. It has no slots, so that it keeps what it has counted.
    """

    words: str
    reader: Reader
    wanted: Mapping[str, Digest]
    have: Mapping[str, Digest] | None
    believed: tuple[tuple[Reader, Manifest], ...]

    @cached_property
    def both(self) -> list[str]:
        """The tensors of which both have a whole digest."""
        known = self.wanted if self.have is None else self.wanted.keys() & self.have.keys()
        return [name for name in sorted(self.reader.tensors) if name in known and self._whole(name)]

    def _whole(self, name: str) -> bool:
        if isinstance(self.wanted[name], str):
            return True
        try:
            check_spans(self.wanted[name], self.reader.tensors[name].shape)
        except ValueError:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.words}: {len(self.both)} of {len(self.reader.tensors)}"


def compare_recorded(one: Reader, other: Reader, options: Verification, progress: Progress, manifest_of: Load) -> Level | None:
    """Compare recorded digests if the user trusts them, else say which there are; None where there is no manifest."""
    try:
        return _compared(one, other, options, progress, manifest_of)
    except (InputError, OSError) as error:  # of manifests and what stands beside them; if it is of tensors, bits meet it again
        return _not_run(f"{error}; bytes are compared")


def _compared(one: Reader, other: Reader, options: Verification, progress: Progress, manifest_of: Load) -> Level | None:
    sides = [(reader, manifest_of(reader.path)) for reader in (one, other)]
    if not any(found for _, found in sides):
        return None
    matches = list(_matches(sides, options))
    best = max(matches, key=lambda match: (len(match.both), match.have is not None), default=None)
    if best is None:
        return _not_run("no manifest has digests of the tensors of the other side; bytes are compared")
    if not options.trust_digests:
        return _not_run(f"{best}; bytes are compared all the same, unless --trust-digests is given")
    if why := _why_not(best) or _unlike(best, options, progress):
        return _not_run(f"{why}; bytes are compared")
    told = f"{best.reader.path} was hashed, {best.believed[0][0].path} was not" if best.have is None else "neither was hashed"
    return Level(name="recorded", covered=f"{best}; {told}", compared=len(best.both))


def _not_run(why: str) -> Level:
    return Level(name="recorded", covered="", compared=0, not_run=why, asked=False)


def _matches(sides: list[tuple[Reader, Manifest | None]], options: Verification) -> Iterator[_Match]:
    """In which ways they speak of the same tensors. What the user says of a layout is no part of any record: bytes decide."""
    if any((options.family, options.source_layout, options.family_b, options.source_layout_b, options.scan_axis is not None)):
        return
    for (reader, own), (maker, found) in (sides, sides[::-1]):
        if found and found.hashed != CHUNKS and found.input == input_digest(reader):
            trusted = own if own and own.hashed != CHUNKS and not _changed(reader, own) else None
            yield _Match(
                words=f"the manifest of {maker.path} has digests of the tensors of {reader.path}, of which it was made",
                reader=reader,
                wanted=found.sources,
                have=_of_tensors(trusted) if trusted else None,
                believed=((maker, found), *(((reader, trusted),) if trusted else ())),
            )
    (one, first), (other, second) = sides
    if first and second and first.hashed == second.hashed != CHUNKS and _alike(one, other, options):
        yield _Match(
            words="both manifests have digests of the same tensors",
            reader=one,
            wanted=_of_tensors(first),
            have=_of_tensors(second),
            believed=((one, first), (other, second)),
        )


def _of_tensors(found: Manifest) -> dict[str, Digest]:
    return {name: entry.digest for name, entry in found.tensors.items()}


def _alike(one: Reader, other: Reader, options: Verification) -> bool:
    """Whether both have tensors of the same names, types and shapes, and store experts in them in the same way."""
    if one.format != other.format or one.tensors != other.tensors:
        return False
    try:
        first, second = described_alike(one, other, options)
    except (InputError, PlanError):
        return False
    return first.groups == second.groups


def _why_not(match: _Match) -> str:
    """Why recorded digests are not enough; empty if they are."""
    if len(match.both) < len(match.reader.tensors):
        return str(match)
    return next((f"{reader.path}: {why}" for reader, found in match.believed for why in _changed(reader, found)[:1]), "")


def _changed(reader: Reader, found: Manifest) -> list[str]:
    """What speaks against a manifest, as far as it can be seen without reading tensors."""
    have = {name: (spec.dtype, spec.shape) for name, spec in reader.tensors.items()}
    if have != {name: (entry.dtype, entry.shape) for name, entry in found.tensors.items()}:
        return [f"{NAME} is of other tensors"]
    return [*compare_manifest(reader, found).differences, *differences(reader.path, NAME, found.files), *_newer(reader)]


def _newer(reader: Reader) -> Iterator[str]:
    """Files that were written after the manifest, which is written last; a time is never a reason to believe."""
    if not is_remote(reader.path):
        last = os.stat(reader.path / NAME).st_mtime_ns
        for name, _, _ in files_of(reader.path, ()):
            if os.stat(reader.path / name).st_mtime_ns > last:
                yield f"{name} was written after {NAME}"


def _unlike(match: _Match, options: Verification, progress: Progress) -> str:
    """The first tensor whose digests differ, in words; empty if none does."""
    names = match.both
    if match.have is not None:
        return next((f"{name} has two recorded digests" for name in names if match.wanted[name] != match.have[name]), "")
    reader = match.reader
    begin(progress, "digests", sum(reader.tensors[name].nbytes for name in names))
    hold_strips(reader, names, options.memory)
    spans = [(name, *span) for name in names for span in spans_of(match.wanted[name])]
    look = partial(_differs, reader, Scratch())
    jobs = Work.in_strips(options.memory, options.jobs, reader).jobs
    for (name, rows, _), differs in zip(spans, in_order(look, spans, jobs), strict=True):
        if differs:
            return f"{name} of {reader.path} has another digest than the recorded one"
        spec = reader.tensors[name]
        progress(spec.nbytes * len(rows) // spec.shape[0] if rows else spec.nbytes)
    return ""


def _differs(reader: Reader, scratch: Scratch, span: tuple[str, range | None, str]) -> bool:
    name, rows, digest = span
    return digest_of(reader, name, rows, ignore, scratch) != digest
