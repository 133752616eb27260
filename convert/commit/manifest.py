"""`convert_manifest.json`: what was done, a digest of every tensor, and what it takes to restore the original files.

In: a plan and its digests. Out: the manifest's text; and from a manifest, what it says. It never decides what to write.

Neither safetensors nor Orbax notices a flipped bit; `convert --verify OUT` alone re-checks these digests. The digest is
xxh3-128 (xxhash): it runs at memory speed, where sha256 (1 GB/s a core) would cost more than the conversion. It guards against
accidents, not against an attacker.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.planning.planner import Plan
from layouts.errors import InputError
from layouts.files import CONFIG, INDEX, MANIFEST, read_json
from layouts.places import files_of, is_remote
from layouts.reader import Reader

NAME = MANIFEST
VERSION = 1
SOURCE = "source:"
"""What stands before the name of a source tensor where digests of sources and targets are kept together."""
TOOL = "1.0.0.dev0"
"""This tool's version, written into every manifest."""


Digest = str | Mapping[str, str]
"""xxh3-128, hex; of a large Orbax array: of each portion, by its span of the first dimension (`{"0:4": ..., "4:8": ...}`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """The files that a prefused checkpoint came from: shard name -> header, and texts that the conversion rewrites."""

    headers: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


CHUNKS = "stored chunks"
"""What digests are of where Orbax chunks were kept as they are: their bytes in the order of the grid, without decoding them."""


def render(plan: Plan, digests: Mapping[str, Digest], original: Original | None, *, of_chunks: bool = False) -> str:
    """The manifest of a finished conversion; it names no host, user or time, so that equal runs give equal bytes."""
    tensors = {
        target.spec.name: {
            "dtype": target.spec.dtype,
            "shape": list(target.spec.shape),
            "xxh3_128": digests[target.spec.name],
        }
        for target in plan.targets
    }
    content: dict[str, Any] = {
        "version": VERSION,
        "tool": TOOL,
        "action": plan.action,
        "format": plan.format,
        "family": plan.family,
        "layout": plan.layout,
        "record": plan.record,
        **({"computed": plan.computed} if plan.computed else {}),
        **({"hashed": CHUNKS} if of_chunks else {}),
        "tensors": tensors,
        "sources": _sources(plan, digests),
    }
    if original:
        content["original"] = {"headers": dict(original.headers), "texts": dict(original.texts)}
    return json.dumps(content, indent=1) + "\n"


def _sources(plan: Plan, digests: Mapping[str, Digest]) -> dict[str, Digest]:
    """Digests of the tensors that this was made from, in the order of their names.

    A tensor that is copied as it is has the digest of its copy. One that is taken apart into several (`--split`) has none here:
    it would have to be read twice, and the input's own manifest has it. Neither has a conversion that computed values.
    """
    if plan.computed:
        return {}  # what was hashed on the way are computed values, not what the input holds
    copied = {t.spec.name: digests[t.spec.name] for t in plan.targets if not t.moved}
    fused = {key.removeprefix(SOURCE): value for key, value in digests.items() if key.startswith(SOURCE)}
    return dict(sorted({**copied, **fused}.items()))


def read(path: Path) -> Mapping[str, Any] | None:
    """The manifest in a checkpoint's directory, if it has one.

    Raises:
        InputError: it is there but cannot be parsed.
    """
    if not (path / NAME).exists():
        return None
    manifest: Mapping[str, Any] = read_json(path / NAME)
    return manifest


def is_of(plan: Plan) -> bool:
    """Whether the output is there, complete, made by an equal plan, and no older than any file of the input.

    A directory that this tool made is complete; so its manifest speaks for it.
    """
    found = read(plan.out)
    if not isinstance(found, dict) or not isinstance(found.get("tensors"), dict):
        return False
    made = tuple(found.get(key) for key in ("action", "family", "layout", "record", "computed"))
    wanted = {target.spec.name: (target.spec.dtype, list(target.spec.shape)) for target in plan.targets}
    have = {name: (entry.get("dtype"), entry.get("shape")) for name, entry in found["tensors"].items()}
    if is_remote(plan.source):
        return False  # whose objects do not say when they were written
    newest = max(int(state) for _, _, state in files_of(plan.source))
    equal = (
        made == (plan.action, plan.family, plan.layout, json.loads(json.dumps(plan.record)), plan.computed) and have == wanted
    )
    return equal and (plan.out / NAME).stat().st_mtime_ns >= newest


def original_files(path: Path) -> Original | None:
    """What the manifest remembers of the original files, if it does."""
    manifest = read(path)
    original = manifest.get("original") if isinstance(manifest, dict) else None
    if original is None:
        return None
    try:
        headers, texts = dict(original["headers"]), dict(original["texts"])
    except (KeyError, TypeError, ValueError):
        headers, texts = {"?": None}, {}
    if not all(isinstance(text, str) for text in (*headers.values(), *texts.values())):
        raise InputError(f"{path / NAME}: 'original' should hold the headers and texts of files; remove it to go without")
    return Original(headers=headers, texts=texts)


def fingerprint(plan: Plan, options: Mapping[str, Any]) -> str:
    """Eight hex digits that tell one conversion from another: the plan, the options and the state of the input's files."""
    digest = hashlib.sha256(
        repr((TOOL, plan.action, plan.layout, plan.record, plan.computed, sorted(options.items()))).encode()
    )
    digest.update("\n".join(f"{t.spec.name} {t.source.key.text}" for t in plan.targets).encode())
    for file in files_of(plan.source):
        digest.update(repr(file).encode())
    return digest.hexdigest()[:8]


def original_of(plan: Plan, reader: Reader) -> Original | None:
    """What a later way back needs; a checkpoint that we made keeps what it remembers."""
    if plan.computed or (plan.format == "hf" and plan.record is None):
        return None
    if (reader.record or not reader.headers) and (kept := original_files(plan.source)):
        return kept
    if not reader.headers:
        return None
    texts = {name: (plan.source / name).read_bytes().decode() for name in (CONFIG, INDEX) if (plan.source / name).exists()}
    return Original(headers=reader.headers, texts=texts)
