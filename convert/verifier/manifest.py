"""Prove that an output is still what was written: all of its files, and the digest of every tensor.

In: a checkpoint with its manifest. Out: a verdict of the levels `files` and `digests`. It never believes the manifest more than
that somebody has written it: names in it are not opened, and digests cover all of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import xxhash

from convert.commit import manifest
from convert.commit.inventory import differences
from convert.commit.recorded import Manifest, load, spans_of
from convert.errors import InputError, readable
from convert.progress import Progress, ignore
from convert.verifier.order import STRIP, hold
from convert.verifier.verdict import Level, Verdict
from layouts.checkpoint import open_checkpoint
from layouts.language.pattern import strips
from layouts.reader import Reader
from layouts.windows import lengths


def verify_manifest(path: Path, progress: Progress | None = None, memory: int = 2 << 30) -> Verdict:
    """Look at every file, hash every tensor again, and compare with the manifest that was written with them.

    Raises:
        InputError: the checkpoint or its manifest is missing or corrupt.
    """
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
    with readable(path):
        opened = open_checkpoint(path)
    with closing(opened) as reader:
        _hold(reader, found.tensors, memory)
        changed = tuple(_changed(reader, found, progress or ignore))
        both = found.tensors.keys() & reader.tensors.keys()
    digests = Level(name="digests", covered=f"{len(found.tensors)} tensors, xxh3-128", compared=len(both), differences=changed)
    return Verdict(subject=str(path), levels=(files, digests))


def _hold(reader: Reader, names: Iterable[str], memory: int) -> None:
    """Read these tensors strip by strip, within this memory."""
    specs = [spec for name in names if (spec := reader.tensors.get(name)) and spec.nbytes]
    hold(reader, {spec.name: lengths(next(strips(spec.shape, STRIP))) for spec in specs}, 1, memory)


def _changed(reader: Reader, found: Manifest, progress: Progress) -> Iterator[str]:
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
            if _digest(reader, name, rows, found.hashed, progress) != digest:
                where = f"{name}[{rows.start}:{rows.stop}]" if rows else name
                yield f"{where} (in {reader.where(name)}) is not what was written"


def _digest(reader: Reader, name: str, rows: range | None, hashed: str | None, progress: Progress) -> str:
    """Of a tensor, or of some rows of its first dimension: of its values, or of its chunks as they are stored."""
    if hashed == manifest.CHUNKS:
        from layouts.orbax.digest import array_digest

        return array_digest(reader, name, rows, progress)
    spec = reader.tensors[name]
    digest = xxhash.xxh3_128()
    for slices in strips(spec.shape, STRIP, rows):
        block = reader.read(name, slices)
        digest.update(np.asarray(block, order="C").data)
        progress(block.nbytes)
    return digest.hexdigest()
