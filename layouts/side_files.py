"""Which files beside a model's tensors go with it into an output.

In: names of all files of a checkpoint but those that hold its tensors. Out: `SideFiles`, which has them in three lists. It
never opens a file. The tables below say which words tell what.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from layouts.disk.names import parts
from layouts.disk.places import is_remote, names_of, unlisted
from layouts.errors import InputError

NEVER_FOLDERS = frozenset({".git", ".cache", ".huggingface", "__pycache__"})
"""Folders of tools that fetch or run a checkpoint; nothing in them belongs to the model."""
NEVER = (".git", "*.incomplete", "*.lock")
"""What an unfinished download leaves, locks, and the file that a submodule of git has in the place of the folder."""
WEIGHT_FOLDERS = frozenset({"original", "metal"})
"""Folders at the top in which publishers keep the same weights in a form of their own."""
ORIGINALS = "convert_originals/originals.safetensors"
"""Where a tree that we made keeps the originals of tensors that were computed, by the names of the computed ones.

In a folder of its own: loaders that take every `*.safetensors` of a directory for the model do not look there.
"""
OTHER_MODELS = ("adapter_*", "consolidated*", "mmproj*")
"""What is called so belongs to an adapter, to the publisher's own form of the model, or to another model."""
WEIGHTS = (
    *OTHER_MODELS,
    *("*.safetensors", "*.gguf", "*.onnx", "*.onnx_data", "*.h5", "*.msgpack", "*.tflite", "*.distcp", "*.index.json"),
    *(f"*{word}*.{ending}" for word in ("model", "weights") for ending in ("bin", "pt", "pth", "ckpt", "npz")),
)
"""Weights in other forms, other weights, and indexes of their files: as large as the model, and not what was converted.

Endings that smaller things have as well (voices, states of dice, reference values) count only where the name says model.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFiles:
    """The files beside a model's tensors, by name from the checkpoint's directory: name -> bytes (0 in a store).

    `plain` files are carried over, `weights` only if they are asked for, and `never` (a folder ends in `/`) in no case.
    """

    plain: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    never: tuple[str, ...] = ()

    def chosen(self, *, copy_all: bool, gate: bool = True) -> tuple[dict[str, int], dict[str, int]]:
        """What is carried over, and what is left out because nobody has asked for it: name -> bytes.

        Without `gate` names are only told.

        Raises:
            InputError: what would be carried over has a name that no output may have.
        """
        taken = dict(sorted({**self.plain, **self.weights}.items())) if copy_all else dict(self.plain)
        for name in taken if gate else ():
            parts(name, "side files")
        return taken, {} if copy_all else dict(self.weights)


def sort_files(names: Iterable[str], size: Callable[[str], int], folders: frozenset[str] = WEIGHT_FOLDERS) -> SideFiles:
    """Sort files by their names; `folders` are those at the top that hold other forms of the weights.

    `size` is asked only for the bytes of what may be carried over.
    """
    plain, weights, never = dict[str, int](), dict[str, int](), set[str]()
    for name in sorted(names):
        first, _, below = name.partition("/")
        if (found := never_copied(name)) is not None:
            never.add(found)
        elif name == ORIGINALS:
            plain[name] = size(name)
        elif (below and first.lower() in folders) or is_any(name.rpartition("/")[2], WEIGHTS):
            weights[name] = size(name)
        else:
            plain[name] = size(name)
    return SideFiles(plain=plain, weights=weights, never=tuple(sorted(never)))


def never_copied(name: str) -> str | None:
    """What no output ever has of a path: the outermost such folder, or the file; None if all of it may be copied."""
    *folders, last = name.split("/")
    for depth, folder in enumerate(folders, 1):
        if folder.lower() in NEVER_FOLDERS:
            return "/".join(folders[:depth]) + "/"
    return name if is_any(last, NEVER) else None


def is_any(name: str, words: Iterable[str]) -> bool:
    """Whether a file is called as one of these words says; `*` stands for anything, and capitals for small letters.

    There are disks on which `.GIT` is `.git`.
    """
    name = name.lower()
    return any(fnmatchcase(name, word) for word in words)


def files_below(root: Path) -> Iterator[str]:
    """Every file below a directory, by its name from there; links to files count as files, as in the Hugging Face cache.

    Of a folder that is never copied, only its own name with `/`: what is in it is nobody's business.

    Raises:
        InputError: a link to a directory, or to nothing.
        OSError: a directory cannot be listed.
    """
    if is_remote(root):
        yield from names_of(root)
        return
    for directory, folders, files in os.walk(root, onerror=unlisted):
        here = Path(directory).relative_to(root)
        for folder in [folder for folder in folders if folder.lower() in NEVER_FOLDERS]:
            folders.remove(folder)
            yield f"{(here / folder).as_posix()}/"
        for name in folders + files:
            path = Path(directory, name)
            if path.is_file() or (name in files and is_any(name, NEVER)):
                yield (here / name).as_posix()
            elif path.is_symlink():
                raise InputError(f"{path}: a link to a directory or to nothing; put what it stands for in its place")
