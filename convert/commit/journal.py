"""The journal of a staging directory: a JSON object per line, each durable before the next.

The first line says what the journal is of, by inodes: of the staging directory (`home`) and of `new/` in it (`inode`). The
others give the digests of finished tensors. Every process of a run has a journal of its own, and the first one takes them over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from convert.commit.files import Folder

NAME = ".convert_journal"


def helpers(home: Folder) -> list[str]:
    """The journals of processes that help the first one."""
    return [name for name in home.names() if name.startswith(f"{NAME}-")]


def digests(home: Folder, name: str) -> dict[str, str]:
    """All digests in a journal: name -> digest; none where there is no journal."""
    found: dict[str, str] = {}
    for line in read(home, name):
        found.update({tensor: digest for tensor, digest in line.items() if isinstance(digest, str)})
    return found


def read(home: Folder, name: str) -> list[dict[str, Any]]:
    """The whole lines; one cut short by a crash was not durable, and does not count."""
    lines: list[dict[str, Any]] = []
    for line in (home.read(name) or b"").splitlines(keepends=True):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(found, dict) or not line.endswith(b"\n"):
            break
        lines.append(found)
    return lines


def append(home: Folder, name: str, entry: Mapping[str, Any]) -> None:
    """Add a line, durably."""
    home.append(name, f"{json.dumps(dict(entry))}\n".encode())


def cut(home: Folder, name: str, lines: int | None = None) -> None:
    """Cut a journal off behind so many lines, or behind the last whole one, for the next to follow."""
    if text := home.read(name):
        kept = text.splitlines(keepends=True)[: len(read(home, name)) if lines is None else lines]
        home.cut(name, sum(map(len, kept)))
