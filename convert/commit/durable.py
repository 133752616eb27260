"""Small files and directories that are durable once a call returns; what lies in a store is, once it has answered."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from layouts.places import RemotePath


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: Path, text: str) -> None:
    """Write a small file durably."""
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:  # line ends are the text's own
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copy a side file's contents durably; permissions are the user's own, as for any new file."""
    if isinstance(target, RemotePath):
        target.write_bytes(source.read_bytes())
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, Path):
        shutil.copyfile(source, target)
    else:
        target.write_bytes(source.read_bytes())
    with target.open("rb") as file:
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file, a directory with all in it, or nothing."""
    if isinstance(path, RemotePath):
        path.remove()
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
