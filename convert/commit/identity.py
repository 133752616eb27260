"""What tells one input from another: its content, and what the system alone writes of its files.

In: an open checkpoint, a plan. Out: digests. It never takes a name, a size and a time for an identity: `cp -p`, tar and rsync
keep all three of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import xxhash

from convert.commit.inventory import read_in_pieces
from convert.commit.manifest import NAME
from convert.planning.planner import Plan
from convert.version import TOOL
from layouts.disk.files import CONFIG, INDEX
from layouts.disk.places import files_of, is_remote
from layouts.disk.written import quoted
from layouts.reader import Reader
from layouts.tensors import columns

_PIECE, _PIECES = 4096, 16
"""Of a file of data: bytes of a piece that is looked at, and how many of these, at even places from the first to the last."""
_SAMPLED = 4096
"""Files that are sampled at most, at even places among all: where each chunk is a file there are hundreds of thousands."""
_SPEAKING = (CONFIG, INDEX, NAME, "_METADATA", "_strings.json", "_sharding", "_CHECKPOINT_METADATA")
_FOLDERS = ("array_metadatas",)
"""Files that say what the data is, by name or by folder."""


class State(NamedTuple):
    """The state of an input: `content` of what can be seen of its bytes, `system` of what no user can set (ctime)."""

    content: str
    system: str


def state_of(path: Path, but: Collection[str] = ()) -> State:
    """The state of all files of an input `but` some (see `files_of`): names, sizes, times, a sample of their bytes.

    Inodes and devices are not among it: machines that share a file system need not agree on them, and neither does a machine
    with itself after a restart.
    """
    content, system = hashlib.sha256(), hashlib.sha256()
    files = list(files_of(path, but))
    step = max(1, len(files) // _SAMPLED)
    for number, (name, size, state) in enumerate(files):
        content.update(repr((name, size, state)).encode())
        if is_remote(path):
            continue
        system.update(repr(os.stat(path / name).st_ctime_ns).encode())
        if number % step == 0 or PurePosixPath(name).name in _SPEAKING:
            for piece in _sample(path / name, size):
                content.update(piece)
    return State(content.hexdigest(), system.hexdigest())


def _sample(path: Path, size: int) -> Iterator[bytes]:
    if size <= _PIECE * _PIECES:
        yield from read_in_pieces(path)
        return
    with path.open("rb", buffering=0) as file:
        for number in range(_PIECES):
            yield os.pread(file.fileno(), _PIECE, number * (size - _PIECE) // (_PIECES - 1))


def fingerprint(plan: Plan, options: Mapping[str, Any], state: State) -> str:
    """Sixteen hex digits that tell one conversion from another: the plan, its side files, the options, the input's state."""
    made = plan.action, plan.layout, plan.record, plan.computed, sorted({**(plan.mesh or {}), **plan.shardings}.items())
    digest = hashlib.sha256(repr((TOOL, *made, sorted(options.items()), *state)).encode())
    digest.update("\n".join(f"{t.spec.name} {t.source.key.text}" for t in plan.targets).encode())
    digest.update(_line(*plan.side_files))
    return digest.hexdigest()[:16]


def input_digest(reader: Reader) -> str:
    """The digest of all that an input says but of its data: headers, specs, config, index, metadata (xxh3-128, hex).

    Equal inputs have equal ones, wherever and whenever they were written.
    """
    digest = xxhash.xxh3_128()
    for name, header in sorted(reader.headers.items()):
        digest.update(_line(name, header))
    tensors = columns(reader.tensors)
    kinds = [f"{quoted(each.dtype)}, {list(each.shape)}" for each in tensors.kinds]
    ordered = sorted(zip(tensors.names, tensors.kind.tolist(), strict=True))
    digest.update("".join(f"[{quoted(name)}, {kinds[kind]}, {_chunk(reader, name)}]" for name, kind in ordered).encode())
    for name, _, _ in sorted(files_of(reader.path, reader.side_files.never)):
        path = PurePosixPath(name)
        if path.name in _SPEAKING or path.parent.name in _FOLDERS:
            digest.update(_line(name))
            for piece in read_in_pieces(reader.path / name):
                digest.update(piece)
    return digest.hexdigest()


def _chunk(reader: Reader, name: str) -> str:
    """The shape in which a tensor is read, as JSON."""
    return str(list(unit.shape)) if (unit := reader.unit(name)) else "null"


def _line(*words: Any) -> bytes:
    return json.dumps(words).encode()
