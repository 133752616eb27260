"""Which of the safetensors files in a directory hold the model: those that the index names, or else those that are called so.

In: a directory, names of files, an index. Out: names. It never opens a file of tensors. What else lies there is an adapter, the
publisher's own form of the model, or another model, and no part of it.

Source: transformers 5, `utils/hub.py` and `modeling_utils.py` (names of files, and which of them is taken).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from layouts.disk.files import INDEX, read_object
from layouts.disk.mistaken import dangling
from layouts.disk.names import part
from layouts.errors import InputError
from layouts.side_files import OTHER_MODELS, is_any

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_CUT = re.compile(r"-TP-\d+")
_CALLED_SO = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""What transformers calls the files of a model."""


def all_files(path: Path) -> list[str]:
    """The names of all safetensors files directly in a place.

    Raises:
        OSError: it cannot be listed.
    """
    return sorted(file.name for file in path.iterdir() if file.name.endswith(".safetensors"))


def is_named(path: Path) -> bool:
    """Whether a place holds a model as transformers names its files, or an index."""
    return (path / INDEX).exists() or any(map(_CALLED_SO.fullmatch, all_files(path)))


def model_files(path: Path, weight_map: Mapping[str, str] | None) -> list[str]:
    """The names of the files that hold the model in a directory, as its index says, if it has one.

    Raises:
        InputError: a file is missing, or files that are called so are not the model.
    """
    present = all_files(path)
    if weight_map is None:
        names = unindexed(present)
        _check_one_set(path, names)
        _check_numbers(path, names)
    else:
        names = sorted(set(weight_map.values()))
    if lost := [name for name in names if not (path / part(name, path / INDEX)).is_file()]:
        if isinstance(path, Path) and (path / lost[0]).is_symlink():
            raise InputError(f"{path / lost[0]}: {dangling(path / lost[0])}; copy what it leads to, too (cp -rL)")
        if weight_map is None:
            raise InputError(f"{path / lost[0]}: no file, but called like one of the model; remove it")
        raise InputError(
            f"{path / INDEX}: {len(lost)} of {len(names)} shards that it names are missing, the first is {lost[0]!r}; "
            f"download or copy the rest"
        )
    parts = {_whole(name) for name in names if _whole(name) != name}
    if cut := [name for name in present if name not in names and _whole(name) in parts]:
        raise InputError(
            f"{path / cut[0]}: it is cut for tensor parallelism, and the index names other parts but not this one; join the "
            f"parts first"
        )
    if stale := [name for name in present if name not in names and _CALLED_SO.fullmatch(name)]:
        raise InputError(f"{path / stale[0]}: called like a shard, but the index does not name it; remove one or the other")
    return names


def _whole(name: str) -> str:
    """The name of a file without the number of its part, where it is cut for tensor parallelism (Grok-2: `-TP-003`)."""
    return _CUT.sub("-TP-", name)


def unindexed(names: Iterable[str]) -> list[str]:
    """Those of these files that are the model where no index says so.

    They are those that are called as transformers calls them. If none is, they are all but those that are known as others'.
    """
    names = sorted(names)
    called = [name for name in names if _CALLED_SO.fullmatch(name)]
    return called or [name for name in names if not is_any(name, OTHER_MODELS)] or names


class Index(NamedTuple):
    """What an index says: in which file each tensor is, and how many bytes all have together, if it says so."""

    weight_map: Mapping[str, str]
    total_size: Any

    def remarks(self, held: int) -> tuple[str, ...]:
        """That it states another size than the `held` bytes that the tensors have, if it does."""
        if self.total_size in (None, held):
            return ()
        return (f"{INDEX} states total_size {str(self.total_size)[:40]}, and its tensors have {held} bytes",)


def read_index(path: Path) -> Index | None:
    """The index of a directory; None where there is none.

    Raises:
        InputError: it says something else.
    """
    if not (path / INDEX).exists():
        return None
    found = read_object(path / INDEX)
    weight_map, beside = found.get("weight_map"), found.get("metadata")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise InputError(f"{path / INDEX}: expected an object 'weight_map' that says for each tensor in which file it is")
    return Index(weight_map, beside.get("total_size") if isinstance(beside, dict) else None)


def compare_index(path: Path, weight_map: Mapping[str, str], home: Mapping[str, str]) -> None:
    """See that an index and the files agree; both are tensor name -> file.

    Raises:
        InputError: they do not.
    """
    for name, shard in weight_map.items():
        if name not in home:
            raise InputError(f"{path}: the index puts {name} into {shard}, but it is not there")
        if home[name] != shard:
            raise InputError(f"{path}: the index puts {name} into {shard}, but it is in {home[name]}")
    if extra := sorted(home.keys() - weight_map.keys()):
        raise InputError(f"{path}: {extra[0]} is in {home[extra[0]]}, but not in the index ({len(extra)} such tensors)")


def _check_one_set(path: Path, names: Sequence[str]) -> None:
    """See that files which are called like a model's are one model's.

    Raises:
        InputError: there are two sets of them, and nothing says which one is the model.
    """
    sets: dict[str, str] = {}
    for name in filter(_CALLED_SO.fullmatch, names):
        found = _NUMBERED.fullmatch(name)
        sets.setdefault(found[3] if found else "", name)
    if len(sets) > 1:
        one, other = list(sets.values())[:2]
        raise InputError(
            f"{path}: {one} and {other} are of two sets of files, and no index says which is the model; remove one set"
        )


def _check_numbers(path: Path, names: Sequence[str]) -> None:
    """See that files which are numbered `-of-N` are N, since no index names them.

    Raises:
        InputError: some are missing.
    """
    found: dict[tuple[str, int], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (stem, count), numbers in found.items():
        first = min(min(numbers), 1)  # a few count from 0
        if lost := [number for number in range(first, first + count) if number not in numbers]:
            raise InputError(
                f"{path}: {len(lost)} of {count} shards are missing, the first is {stem}-{lost[0]:05}-of-{count:05}.safetensors"
                f": there is no index, but their names say how many there should be. Download or copy the rest"
            )
