"""`convert_manifest.json`: what was done, a digest of every tensor, and what it takes to restore the original files.

Neither safetensors nor Orbax notices a flipped bit; `convert --verify OUT` alone re-checks these digests. The digest is
xxh3-128 (xxhash): it runs at memory speed, where sha256 (1 GB/s a core) would cost more than the conversion. It guards against
accidents, not against an attacker.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.planner import Plan
from layouts.hf import read_json

NAME = "convert_manifest.json"
VERSION = 1
TOOL = "1.0.0.dev0"
"""This tool's version, written into every manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """The files that a prefused checkpoint came from: shard name -> header, and texts that the conversion rewrites."""

    headers: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)


def render(plan: Plan, digests: Mapping[str, str], original: Original | None) -> str:
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
        "tensors": tensors,
    }
    if original:
        content["original"] = {"headers": dict(original.headers), "texts": dict(original.texts)}
    return json.dumps(content, indent=1) + "\n"


def read(path: Path) -> Mapping[str, Any] | None:
    """The manifest in a checkpoint's directory, if it has one.

    Raises:
        InputError: it is there but cannot be parsed.
    """
    if not (path / NAME).exists():
        return None
    manifest: Mapping[str, Any] = read_json(path / NAME)
    return manifest


def original_files(path: Path) -> Original | None:
    """What the manifest remembers of the original files, if it does."""
    manifest = read(path) or {}
    if "original" not in manifest:
        return None
    return Original(headers=manifest["original"]["headers"], texts=manifest["original"]["texts"])


def fingerprint(plan: Plan, options: Mapping[str, Any]) -> str:
    """Eight hex digits that tell one conversion from another: the plan, the options and the state of the input's files."""
    digest = hashlib.sha256(repr((TOOL, plan.action, plan.layout, plan.record, sorted(options.items()))).encode())
    digest.update("\n".join(f"{t.spec.name} {t.source.key.text}" for t in plan.targets).encode())
    for directory, folders, files in os.walk(plan.source):
        folders.sort()
        for file in sorted(files):
            status = os.stat(os.path.join(directory, file))
            digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:8]
