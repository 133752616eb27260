"""`convert_manifest.json`: what was done, a digest of every tensor, and what it takes to restore the original files.

In: a plan and its digests. Out: the manifest's text. It never decides what to write.

Neither safetensors nor Orbax notices a flipped bit; `convert --verify OUT` alone re-checks these digests, and the files. The
digest is xxh3-128 (xxhash): it runs at memory speed, where sha256 (1 GB/s a core) costs more than the conversion. It guards
against accidents, not against an attacker. `convert.commit.recorded` looks a manifest through.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from convert.commit.inventory import FileEntry
from convert.planning.across.computed import originals_of
from convert.planning.planner import Plan
from convert.version import TOOL
from layouts.disk.files import CONFIG, INDEX, MANIFEST, read_object
from layouts.disk.written import Entries, compact, indented
from layouts.errors import InputError
from layouts.reader import Reader
from layouts.tensors import TensorSpec

NAME = MANIFEST
VERSION = 2
SEAL = "xxh3_128"
"""Under which the digest of the manifest itself stands in it."""
SOURCE = "source:"
"""What stands before the name of a source tensor where digests of sources and targets are kept together."""

MADE = ("action", "format", "family", "layout", "record", "computed", "mesh", "sharding")
"""What a manifest says of the conversion, but for its tensors."""

Digest = str | Mapping[str, str]
"""xxh3-128, hex; of a large Orbax array: of each portion, by its span of the first dimension (`{"0:4": ..., "4:8": ...}`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """The files that a prefused checkpoint came from: shard name -> header, and texts that the conversion rewrites."""

    headers: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


CHUNKS = "stored chunks"
"""What digests are of where Orbax chunks were kept as they are: their bytes in the order of the grid, without decoding them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a manifest says beside the tensors: the input's digest (`identity.input_digest`), the output's files, options."""

    input: str
    files: Mapping[str, FileEntry]
    options: Mapping[str, int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    """The header of each shard; its digest goes into the manifest."""
    originals: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest says of the originals of computed tensors that the output keeps, as `entries` has it."""


def digest_of(shardings: Mapping[str, str]) -> str:
    """What tells one sharding file from another: as the mesh, it decides where chunks end (xxh3-128, hex)."""
    return xxhash.xxh3_128_hexdigest(json.dumps(shardings, sort_keys=True).encode())


def render(
    plan: Plan, digests: Mapping[str, Digest], original: Original | None, beside: Beside, *, of_chunks: bool = False
) -> str:
    """The manifest of a finished conversion; it names no host, user or time, so that equal runs give equal bytes."""
    content: dict[str, Any] = {
        "version": VERSION,
        "tool": TOOL,
        "action": plan.action,
        "format": plan.format,
        "family": plan.family,
        "layout": plan.layout,
        "record": plan.record,
        **({"computed": plan.computed} if plan.computed else {}),
        **({"mesh": dict(plan.mesh)} if plan.mesh else {}),
        **({"sharding": digest_of(plan.shardings)} if plan.shardings else {}),
        **({"left_out": dict(plan.left_out)} if plan.left_out else {}),
        **({"options": dict(beside.options)} if beside.options else {}),
        "input": beside.input,
        **({"content": plan.content} if plan.content else {}),
        **({"hashed": CHUNKS} if of_chunks else {}),
        "tensors": entries([target.spec for target in plan.targets], digests),
        "sources": _sources(plan, digests),
        **({"originals": dict(beside.originals)} if beside.originals else {}),
        "files": {name: entry.json() for name, entry in beside.files.items()},
        "headers": {name: hashed_text(header) for name, header in beside.headers.items()},
    }
    return sealed(content, original)


def entries(specs: Sequence[TensorSpec], digests: Mapping[str, Digest]) -> Entries:
    """What a manifest says of tensors."""
    known = defaultdict[tuple[str, tuple[int, ...]], int](itertools.count().__next__)
    return Entries(
        names=[spec.name for spec in specs],
        kind=[known[spec.dtype, spec.shape] for spec in specs],
        kinds=[{"dtype": dtype, "shape": shape} for dtype, shape in known],
        last=SEAL,
        values=[digests[spec.name] for spec in specs],
    )


def sealed(content: Mapping[str, Any], original: Original | None) -> str:
    """The text of a manifest: what it says, what a way back needs, and the digest of both."""
    kept = {"original": {"headers": dict(original.headers), "texts": dict(original.texts)}} if original else {}
    whole = {**content, **kept}
    return indented({**whole, SEAL: seal_of(whole)}, 1) + "\n"


def seal_of(content: Mapping[str, Any]) -> str:
    """The digest of all that a manifest says, but for this digest, in the order in which it stands there."""
    return hashed_text(compact({key: value for key, value in content.items() if key != SEAL}))


def hashed_text(text: str) -> str:
    """xxh3-128, hex."""
    return xxhash.xxh3_128_hexdigest(text.encode())


def _sources(plan: Plan, digests: Mapping[str, Digest]) -> dict[str, Digest]:
    """Digests of the tensors that this was made from, in the order of their names.

    A tensor that is copied as it is has the digest of its copy. One that is taken apart into several (`--split`) has none here:
    it would have to be read twice, and the input's own manifest has it. Neither has a conversion that computed values.
    """
    if plan.computed or plan.values:
        return {}  # what was hashed on the way are computed values, not what the input holds
    copied = {t.spec.name: digests[t.spec.name] for t in plan.targets if not t.moved}
    fused = {key.removeprefix(SOURCE): value for key, value in digests.items() if key.startswith(SOURCE)}
    return dict(sorted({**copied, **fused}.items()))


def read(path: Path) -> dict[str, Any] | None:
    """The manifest in a checkpoint's directory, if it has one.

    Raises:
        InputError: it is there but cannot be parsed.
    """
    return read_object(path / NAME) if (path / NAME).exists() else None


def original_files(path: Path) -> Original | None:
    """What the manifest remembers of the original files, if it does."""
    manifest = read(path)
    original = manifest.get("original") if manifest else None
    if original is None:
        return None
    try:
        headers, texts = dict(original["headers"]), dict(original["texts"])
    except (KeyError, TypeError, ValueError, AttributeError):
        headers, texts = {"?": None}, {}
    if not all(isinstance(text, str) for text in (*headers.values(), *texts.values())):
        raise InputError(f"{path / NAME}: 'original' should hold the headers and texts of files; remove it to go without")
    return Original(headers=headers, texts=texts)


def original_of(plan: Plan, reader: Reader) -> Original | None:
    """What a later way back needs; a checkpoint that we made keeps what it remembers."""
    if plan.merging:  # what the base remembers of names and files is as true of the output
        return original_files(plan.source) if plan.record else None
    comes_back = not plan.computed or plan.exact or originals_of(plan) or plan.action == "save"
    if not comes_back or (plan.format == "hf" and plan.record is None):
        return None
    if (reader.record or not reader.headers) and (kept := original_files(plan.source)):
        return kept
    return files_as_they_are(reader) if reader.headers else None


def files_as_they_are(reader: Reader) -> Original:
    """What it takes to make the files of a checkpoint again, but for the data."""
    texts = {name: (reader.path / name).read_bytes().decode() for name in (CONFIG, INDEX) if (reader.path / name).exists()}
    return Original(headers=reader.headers, texts=texts)
