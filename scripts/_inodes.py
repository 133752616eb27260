"""Every inode below a directory, to be compared before and after: nothing is followed, opened or read that could answer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_HASHED = 8 << 20
"""Bytes up to which files are read; larger ones are holes, and what is written into them changes their times."""


class Inode(NamedTuple):
    """What tells whether somebody has touched it; reading changes none of this."""

    kind: int
    permissions: int
    links: int
    size: int
    number: int
    modified: int
    changed: int
    content: str


def inodes(root: Path) -> dict[str, Inode]:
    """All below a directory and itself (`.`), by their path from there, however deep."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return {".": _inode(".", descriptor), **dict(_below(descriptor, ""))}
    finally:
        os.close(descriptor)


def _below(directory: int, prefix: str) -> Iterator[tuple[str, Inode]]:
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        found = _inode(name, directory)
        yield prefix + name, found
        if found.kind == stat.S_IFDIR:
            with contextlib.suppress(PermissionError):
                below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
                try:
                    yield from _below(below, f"{prefix}{name}/")
                finally:
                    os.close(below)


def _inode(name: str, directory: int) -> Inode:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    kind, size = stat.S_IFMT(found.st_mode), found.st_size
    content = ""
    if kind == stat.S_IFLNK:
        content = os.readlink(name, dir_fd=directory)
    elif kind == stat.S_IFREG and size <= _HASHED:
        content = _digest(name, directory)
    mode, links, number = stat.S_IMODE(found.st_mode), found.st_nlink, found.st_ino
    return Inode(kind, mode, links, size, number, found.st_mtime_ns, found.st_ctime_ns, content)


def _digest(name: str, directory: int) -> str:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except PermissionError:
        return "not ours to read"
    with os.fdopen(descriptor, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def changes(before: Mapping[str, Inode], after: Mapping[str, Inode]) -> dict[str, str]:
    """What is not as it was: path -> `made`, `gone`, or the fields that differ."""
    found = {}
    for path in sorted(before.keys() | after.keys()):
        one, other = before.get(path), after.get(path)
        if one is None or other is None:
            found[path] = "made" if one is None else "gone"
        elif fields := [field for field in Inode._fields if getattr(one, field) != getattr(other, field)]:
            found[path] = ", ".join(fields)
    return found


def clear(path: Path) -> None:
    """Remove a directory with all in it, also what its owner may not enter."""
    if os.geteuid():
        for folder, folders, _ in os.walk(path):
            for name in folders:
                if not os.path.islink(os.path.join(folder, name)):
                    os.chmod(os.path.join(folder, name), 0o700)
    shutil.rmtree(path, ignore_errors=True)
