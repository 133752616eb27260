"""The journal of a staging directory: a JSON object per line, each durable before the next.

The first line says what the journal is of; the others give the digests of finished tensors. Every process of a run has a
journal of its own, and the first one takes them over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = ".convert_journal"


def helpers(home: Path) -> list[Path]:
    """The journals of processes that help the first one."""
    return sorted(home.glob(f"{NAME}-*"))


def digests(path: Path) -> dict[str, str]:
    """All digests in a journal: name -> digest; none where there is no journal."""
    found: dict[str, str] = {}
    for line in read(path):
        if "inode" not in line:
            found.update(line)
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines; one cut short by a crash was not durable, and does not count."""
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def begin(path: Path, inode: int) -> None:
    """Write the first line: which directory this is the journal of."""
    append(path, {"inode": inode})


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Add a line, durably."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dict(entry)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def cut(path: Path, lines: int | None = None) -> None:
    """Cut a journal off behind so many lines, or behind the last whole one, for the next to follow."""
    if path.exists():
        kept = path.read_bytes().splitlines(keepends=True)[: len(read(path)) if lines is None else lines]
        os.truncate(path, sum(map(len, kept)))
