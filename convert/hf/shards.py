"""Plan the safetensors files of the output: which tensor stands where, to the byte. Pure.

In: targets. Out: names, headers and offsets of files. It never writes them.

A file is 8 bytes of header length, the JSON header padded with spaces to a multiple of 8, and the data. All is known before
anything is written, so blocks can be written in any order by any number of workers and give the same file.

Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.planning.planner import Target
from layouts.disk.names import part
from layouts.disk.written import indented
from layouts.hf.header import Plain, plain
from layouts.tensors import TensorSpec, itemsize

SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file to write: `head` (length and header) and the offset of each tensor from the start of the file."""

    name: str
    head: bytes
    offsets: Mapping[str, int]
    size: int


def pack(targets: Sequence[Target], *, limit: int, metadata: Mapping[str, str]) -> tuple[File, ...]:
    """Put the tensors into files of at most `limit` bytes of data, in the plan's order; a larger tensor gets its own file."""
    files: list[list[Target]] = [[]]
    filled = 0
    for target in targets:
        if files[-1] and filled + target.spec.nbytes > limit:
            files.append([])
            filled = 0
        files[-1].append(target)
        filled += target.spec.nbytes
    total = len(files)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
    return tuple(file_of(name, [t.spec for t in group], metadata) for name, group in zip(names, files, strict=True))


def file_of(name: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> File:
    """One file of these tensors, in their order but for the width of their types."""
    # Wide types first, so that every tensor starts at a multiple of its element size, as safetensors' own writer does it.
    ordered = sorted(specs, key=lambda spec: -itemsize(spec.dtype))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for spec in ordered:
        offsets[spec.name] = end
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return _with_head(name, text + b" " * (-len(text) % 8), offsets, end)


def restore(headers: Mapping[str, str], specs: Iterable[TensorSpec]) -> tuple[File, ...] | None:
    """The files of an original checkpoint, from the headers that its prefused form remembers: the same bytes again.

    None when the headers do not hold exactly these tensors, each once and without gaps: somebody has edited the checkpoint or
    what it remembers, which is input like any other and not to be trusted with a path or an offset.

    Raises:
        InputError: the name of a file is none.
    """
    wanted = {spec.name: spec for spec in specs}
    restored = []
    for name, header in headers.items():
        if not part(name, "the original files that convert_manifest.json remembers").endswith(".safetensors"):
            return None
        try:
            text = header.encode()
            found = plain(text)
            offsets, end = _offsets(json.loads(header), wanted) if found is None else (_begins(found, wanted), found.nbytes)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        restored.append(_with_head(name, text, offsets, end))
    return None if wanted else tuple(restored)


def _begins(found: Plain, wanted: dict[str, TensorSpec]) -> Mapping[str, int]:
    """Where the tensors of a header of the usual form are, and takes them out of those that are `wanted`.

    Raises:
        KeyError, ValueError: it has others.
    """
    names, kinds = found.tensors.names, found.tensors.kinds
    for name, number in zip(names, found.tensors.kind.tolist(), strict=True):
        spec = wanted.pop(name)
        if kinds[number] != (spec.dtype, spec.shape):
            raise ValueError(name)
    return dict(zip(names, found.begins.tolist(), strict=True))


def _offsets(header: Mapping[str, Any], wanted: dict[str, TensorSpec]) -> tuple[Mapping[str, int], int]:
    """The same of any header, and where the last one ends.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it has others, or is no header.
    """
    offsets, end = {}, 0
    entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
    for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        spec = wanted.pop(key)
        begin, end = end, end + spec.nbytes
        if (entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]) != (spec.dtype, spec.shape, [begin, end]):
            raise ValueError(key)
        offsets[key] = begin
    return offsets, end


def _with_head(name: str, header: bytes, offsets: Mapping[str, int], data: int) -> File:
    head = len(header).to_bytes(8, "little") + header
    shifted = {key: len(head) + offset for key, offset in offsets.items()}
    return File(name=name, head=head, offsets=shifted, size=len(head) + data)


def weight_map(files: Sequence[File]) -> dict[str, str]:
    """In which file each tensor is, sorted by name."""
    return dict(sorted((name, file.name) for file in files for name in file.offsets))


def index_text(total: int, files: Sequence[File]) -> str:
    """`model.safetensors.index.json` of `total` bytes as transformers writes it (sorted, indented)."""
    return indented({"metadata": {"total_size": total}, "weight_map": weight_map(files)}, 2) + "\n"
