"""Small files of a checkpoint, read with care: the one way in for all that is text or JSON.

In: a path. Out: what the file says. It never writes, never waits for a pipe or a device, and never reads more than the limit of
its kind.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from layouts.disk.pread import InputFile
from layouts.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "convert_manifest.json"
UNFINISHED = "unfinished"
"""The key of a manifest that only says, in a store, that its checkpoint is being written: no rename shows it at once there."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT calls the two files of a LoRA adapter."""
RECORD = "moe_layout"
"""The key under which our record stands in `config.json`."""
LIMITS: Mapping[str, int] = {CONFIG: 64 << 20, "zarr.json": 16 << 20, ".zarray": 16 << 20, "manifest.ocdbt": 64 << 20}
"""Bytes that a file of this name may have."""
LIMIT = 1 << 30
"""Bytes that others may have: an index, a manifest or a tree names each tensor, in some 200 bytes (5 million tensors)."""
HEADER = 100_000_000
"""Bytes of a shard's header: the limit of the format (safetensors 0.4, `MAX_HEADER_SIZE`)."""
DEPTH = 64
"""How deep JSON may be nested; trees of models are some 20 deep."""
_ESCAPE = re.compile(rb"\\u")  # where backslashes are many, quicker than `in`
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
"""What the system says of a file that is not there, or is none; all else is no fault of the checkpoint."""


def read_bytes(path: Path) -> bytes:
    """A small file.

    Raises:
        InputError: it is not there, is no regular file, or is larger than one of its kind may be.
        OSError: the system refuses, or the disk is failing.
    """
    if not isinstance(path, Path):  # in a store, where all are regular
        if path.longer_than(_limit(path)):
            raise InputError(f"{path}: it has more than {_limit(path):,} bytes, the most that a file of this kind may have")
        return bytes(path.read_bytes())
    try:
        file = InputFile.open(path)
    except OSError as error:
        if error.errno not in _ABSENT:
            raise
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        size = file.size
        _check_limit(path, size)
        data = bytearray(size)
        file.read(memoryview(data), 0)
        return bytes(data)


def _limit(path: Path) -> int:
    return LIMITS.get(path.name, LIMIT)


def _check_limit(path: Path, size: int) -> None:
    if size > (limit := _limit(path)):
        raise InputError(f"{path}: it has {size:,} bytes, and {limit:,} are the most that a file of this kind may have")


def read_json(path: Path) -> Any:
    """Parse a JSON file of the checkpoint.

    Raises:
        InputError: it cannot be read, or is not JSON; see `parsed`.
        OSError: the system refuses, or the disk is failing.
    """
    data = read_bytes(path)
    try:
        return parsed(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}; correct it, or download or copy it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        InputError: unreadable, not JSON, or no object.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(
            f"{path}: expected a JSON object, found {type(found).__name__}; correct it, or download or copy it again"
        )
    return found


def parsed(data: bytes) -> Any:
    """What JSON says, if all of its keys are different, it is not nested too deep, and its texts can be written again.

    Raises:
        ValueError, RecursionError: it is no such JSON.
    """
    found = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    escaped = _ESCAPE.search(data)
    for depth, level in enumerate(_levels(found)):
        if depth > DEPTH:
            raise ValueError(f"it is nested more than {DEPTH} deep")
        for text in (text for each in level for text in _texts(each)) if escaped else ():
            if "\0" in text or (not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)):
                raise ValueError(f"the text {text[:40]!r} has a NUL or half a letter in it")
    return found


def _levels(found: Any) -> Iterator[list[Any]]:
    """Objects and lists, by how deep they are nested."""
    level = [found] if isinstance(found, dict | list) else []
    while level:
        yield level
        inside = (each.values() if type(each) is dict else each for each in level)
        level = [child for children in inside for child in children if type(child) is dict or type(child) is list]


def _children(each: Any) -> Any:
    return each.values() if isinstance(each, dict) else each


def _texts(each: Any) -> Iterator[str]:
    yield from each if isinstance(each, dict) else ()
    yield from (child for child in _children(each) if isinstance(child, str))


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose keys stands twice.

    Raises:
        ValueError: one does.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def check_size(path: Path) -> None:
    """Refuse a file that others read as a whole, if it is larger than one of its kind may be; one that is not there passes.

    Raises:
        InputError: it is.
    """
    if path.is_file():
        _check_limit(path, path.stat().st_size)


def check_regular(folder: Path) -> None:
    """Refuse a directory that holds anything but files, directories and links to files: others open what it holds by name.

    Raises:
        InputError: there is such a thing; reading it could wait for ever.
        OSError: a directory cannot be listed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                check_regular(Path(entry.path))
            elif not entry.is_file() and not (entry.is_symlink() and _is_none(entry)):
                raise InputError(f"{entry.path}: not a regular file; put a copy of the data in its place")


def _is_none(entry: os.DirEntry[str]) -> bool:
    """Whether a link leads nowhere, or to a directory; who needs it says that it is missing."""
    try:
        return stat.S_ISDIR(entry.stat().st_mode)
    except OSError:
        return True


def manifest_record(path: Path) -> dict[str, Any]:
    """What the manifest says of the layout, by its name; nothing where there is none.

    Raises:
        InputError: it cannot be read, or says that the checkpoint is still being written.
    """
    found = read_object(path / MANIFEST) if (path / MANIFEST).is_file() else {}
    if UNFINISHED in found:
        raise InputError(f"{path}: a conversion into it has not finished, so that parts may be missing; run its command again")
    return {MANIFEST: found["record"]} if "record" in found else {}
