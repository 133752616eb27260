"""The header of a safetensors file as columns.

In: a file, or an object of a store. Out: a `Shard`. It never reads tensor data, and trusts no header before it was checked.

    {"__metadata__":{...},"NAME":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"NAME":...}

There may be 100,000 tensors, of few kinds. A header that is written so to the letter, as the safetensors library writes it, is
taken apart into columns (`plain`), and what is sound is a comparison of texts. All others, sound or not, go through the
format's own parser, because a plain JSON reading accepts what it refuses (overlaps, holes, wrong sizes); it says what is wrong,
too. `plain` takes a part of what that way takes, and finds the same; a test mutates headers to see it.

Source: https://github.com/huggingface/safetensors (format).
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.disk.files import HEADER, parsed
from layouts.disk.mistaken import cause
from layouts.disk.places import RemotePath
from layouts.disk.pread import InputFile
from layouts.disk.stored import stored_header
from layouts.errors import InputError
from layouts.tensors import DTYPES, Columns, Kind, TensorSpec, columns, total_bytes

RANK = 64
"""Dimensions of a tensor at most: NumPy has no more."""
METADATA = "__metadata__"
_FIRST = f'{{"{METADATA}":'
_TEXTS: Mapping[int, str] = {2: ":{", 3: "dtype", 4: ":", 6: ",", 7: "shape", 9: "data_offsets"}
"""What stands in an entry between its quotation marks, but for name (1), element type (5), shape (8) and offsets (10)."""
_STEP = 10
_SIZE = r"(?:0|[1-9][0-9]{0,17})"
_SHAPE = re.compile(rf":\[((?:{_SIZE}(?:,{_SIZE})*)?)\],")
_MOST = 1 << 40
"""Bytes of a tensor: sums of these stay far from 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file: its header as text, so that it can be written again byte for byte, and its tensors.

    `begins` (T,) is where each begins in the file. Tensors are in the order of their bytes.
    """

    name: str
    header: str
    tensors: Columns
    begins: NDArray[np.int64]
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """What a header says: `begins` (T,) is where each tensor begins among the `nbytes` of all."""

    tensors: Columns
    begins: NDArray[np.int64]
    nbytes: int
    metadata: Mapping[str, Any]


def read_shard(path: Path) -> Shard:
    """Parse one file's header.

    Raises:
        InputError: not a sound safetensors file; says why when the reason is a common one.
        OSError: the system refuses, or the disk is failing.
    """
    text, nbytes, whole = stored_header(path) if isinstance(path, RemotePath) else (*_header(path), nullcontext(path))
    found = plain(text)
    if found is None or found.nbytes != nbytes:
        found = _read(path, text, whole)
    begins = found.begins + 8 + len(text)
    return Shard(name=path.name, header=text.decode(), tensors=found.tensors, begins=begins, metadata=found.metadata)


def _read(path: Path, text: bytes, whole: AbstractContextManager[Any]) -> Plain:
    """A header that is written in another way than usual, or that is not sound: the format's own parser says which."""
    from safetensors import SafetensorError, safe_open  # seldom needed, and 10 ms to import

    try:
        with whole as file, safe_open(file, framework="np"):
            pass
        entries = parsed(text)
        if not isinstance(entries, dict):
            raise ValueError("the header is no object")
        metadata = entries.pop(METADATA, None) or {}
        if odd := next((name for name, entry in entries.items() if not _usual(entry)), None):
            raise ValueError(f"{odd} is told in another way than by dtype, shape and data_offsets")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a sound safetensors file: {error}{_common_cause(path)}") from None
    ordered = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
    tensors = columns({n: TensorSpec(name=n, dtype=e["dtype"], shape=tuple(e["shape"])) for n, e in ordered})
    for name, spec in tensors.items():
        if spec.dtype not in DTYPES:
            raise InputError(
                f"{path}: {name} has element type {spec.dtype}, which is not supported; known: {', '.join(DTYPES)}"
            )
        if len(spec.shape) > RANK:
            raise InputError(f"{path}: {name} has {len(spec.shape)} dimensions; {RANK} are the most")
    begins = np.array([entry["data_offsets"][0] for _, entry in ordered], np.int64)
    return Plain(tensors=tensors, begins=begins, nbytes=total_bytes(tensors), metadata=metadata)


def _usual(entry: Any) -> bool:
    """Whether an entry is an object of texts and lists: the format's own parser takes others as well."""
    return isinstance(entry, dict) and isinstance(entry.get("dtype"), str)


def _header(path: Path) -> tuple[bytes, int]:
    """The header as it stands in the file, and how many bytes are behind it.

    Raises:
        InputError: there is none, or one that the format does not allow.
        OSError: the system refuses, or the disk is failing.
    """
    with InputFile.open(path) as file:
        total = file.size
        head = bytearray(min(8, total))
        file.read(memoryview(head), 0)
        size = int.from_bytes(head, "little")
        if len(head) < 8 or size > min(HEADER, total - 8):
            why = "header too small" if len(head) < 8 else f"header too large ({size:,} bytes in a file of {total:,})"
            raise InputError(f"{path}: not a sound safetensors file: {why}{_common_cause(path)}")
        text = bytearray(size)
        file.read(memoryview(text), 8)
        return bytes(text), total - 8 - size


def _common_cause(path: Path) -> str:
    with suppress(OSError, AttributeError), path.open("rb") as file:  # a place in a store is not opened
        return f". {cause(file.read(40))}"
    return ". Download or copy it again"


def plain(text: bytes) -> Plain | None:
    """The columns of a header of this form; None if it is of another."""
    try:
        words = text.decode().rstrip(" ")
        metadata, at = _metadata(words)
    except (ValueError, RecursionError):
        return None
    texts = words[at:].split('"')  # without an escape among them, each quotation mark begins or ends a text
    count = len(texts) // _STEP
    if len(texts) % _STEP != 1 or not count or "\\" in words[at:] or np.frombuffer(text, np.uint8).min() < ord(" "):
        return None
    names, lengths = texts[1::_STEP], len({*texts[1::_STEP], METADATA})
    if lengths != count + 1 or texts[0] or any(texts[at::_STEP] != [word] * count for at, word in _TEXTS.items()):
        return None
    known = defaultdict[tuple[str, str], int](itertools.count().__next__)
    kind = np.fromiter(map(known.__getitem__, zip(texts[5::_STEP], texts[8::_STEP], strict=True)), np.intp, count)
    kinds = [each for each in itertools.starmap(_kind, known) if each]
    if len(kinds) < len(known):
        return None
    sizes = np.array([each.nbytes for each in kinds])[kind]
    ends = sizes.cumsum()
    # Each tensor begins where the one before ends: one text of offsets is sound, and it is written and compared.
    *inner, last = ends.tolist()
    sound = [":[0,", *[f'{end}]}},":[{end},' for end in inner], f"{last}]}}}}"]
    if '"'.join(texts[10::_STEP]) != "".join(sound):
        return None
    tensors = Columns(names=names, kinds=kinds, kind=kind)
    return Plain(tensors=tensors, begins=ends - sizes, nbytes=last, metadata=metadata)


def metadata_of(header: str) -> Mapping[str, Any]:
    """What a sound header says of itself; where that stands first, as usual, its tensors are not read again."""
    if header.startswith(f"{_FIRST}{{"):
        return dict(json.JSONDecoder().raw_decode(header, len(_FIRST))[0])
    if METADATA not in header and "\\" not in header:
        return {}
    return parsed(header.encode()).get(METADATA) or {}


def _metadata(words: str) -> tuple[Mapping[str, Any], int]:
    """What a header says of itself before its tensors, and where these begin.

    Raises:
        ValueError, RecursionError: it is not of this form.
    """
    if not words.startswith(_FIRST):
        return {}, words.index("{", 0, 1) + 1
    _, at = json.JSONDecoder().raw_decode(words, len(_FIRST))
    found = parsed(words[len(_FIRST) : at].encode())
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()) or words[at : at + 1] != ",":
        raise ValueError
    return found, at + 1


def _kind(dtype: str, shape: str) -> Kind | None:
    """Element type and shape of what is written so."""
    match = _SHAPE.fullmatch(shape)
    if not match or dtype not in DTYPES:
        return None
    kind = Kind(dtype, tuple(map(int, filter(None, match[1].split(",")))))
    small = len(kind.shape) <= RANK and math.prod(max(size, 1) for size in kind.shape) < _MOST
    return kind if small else None
