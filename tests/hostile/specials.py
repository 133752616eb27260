"""Files that are no files: pipes, directories, links that lead away or nowhere, devices, holes, and what nobody may read."""

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.hostile.variants import (
    COMPARE,
    DIGESTS,
    DOCUMENTED,
    DRY,
    HF,
    PREFUSE,
    SPLIT,
    Change,
    Sandbox,
    Table,
    place,
    removed,
)

SHARD, INDEX, CONFIG = "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"
MANIFEST, STORED = "convert_manifest.json", "params.params.decoder.norm.scale"
FILES = (
    ("hf", SHARD, (PREFUSE,)),
    ("hf", INDEX, (PREFUSE,)),
    ("hf", CONFIG, (PREFUSE,)),
    ("hf", "tokenizer.json", (PREFUSE,)),
    ("hf", "original", (PREFUSE,)),
    ("hf-fused", MANIFEST, (SPLIT, DIGESTS)),
    ("maxtext", CONFIG, (HF,)),
    ("maxtext-fused", MANIFEST, (SPLIT,)),
    ("dirs", "_METADATA", (PREFUSE,)),
    ("dirs", "_sharding", (PREFUSE,)),
    ("dirs", "_strings.json", (PREFUSE,)),
    ("dirs", "array_metadatas", (PREFUSE,)),
    ("dirs", "array_metadatas/process_0", (PREFUSE,)),
    ("dirs", STORED, (PREFUSE,)),
    ("dirs", f"{STORED}/zarr.json", (PREFUSE,)),
    ("dirs", f"{STORED}/c", (PREFUSE,)),
    ("dirs", f"{STORED}/c/0", (PREFUSE, COMPARE)),
    ("zarr2", f"{STORED}/.zarray", (PREFUSE,)),
    ("zarr2", f"{STORED}/0", (PREFUSE,)),
    ("ocdbt", "@item/manifest.ocdbt", (PREFUSE, DRY)),
    ("ocdbt", "@item/d", (PREFUSE,)),
    ("ocdbt", "@item/ocdbt.process_0", (PREFUSE,)),
    ("ocdbt", "0/_CHECKPOINT_METADATA", (PREFUSE,)),
    ("ocdbt", "@item/commit_success.txt", (PREFUSE,)),
)
"""Base, file, and the commands that read it."""


def _device(name: str, path: Path, box: Sandbox) -> None:
    path.symlink_to(name)


def _loop(path: Path, box: Sandbox) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path, box: Sandbox) -> None:
    path.symlink_to("nothing")


def _away(path: Path, box: Sandbox) -> None:
    """To a copy of the thing itself, or of a folder with something in it, outside the input."""
    source = box.base / "in" / path.relative_to(box.source)
    copy = box.canary / "copy"
    shutil.copyfile(source, copy) if source.is_file() else shutil.copytree(source if source.exists() else box.canary, copy)
    path.symlink_to(copy)


def _above(path: Path, box: Sandbox) -> None:
    path.symlink_to(box.source)


def _empty(path: Path, box: Sandbox) -> None:
    path.touch()


def _hole(size: int, path: Path, box: Sandbox) -> None:
    path.touch()
    os.truncate(path, size)


def _locked_file(path: Path, box: Sandbox) -> None:
    path.touch(0o000)
    os.chmod(path, 0o000)


def _locked_folder(path: Path, box: Sandbox) -> None:
    path.mkdir()
    (path / "inside").touch()
    os.chmod(path, 0o000)


def _pipe(path: Path, box: Sandbox) -> None:
    os.mkfifo(path)


def _folder(path: Path, box: Sandbox) -> None:
    path.mkdir()


FORMS: dict[str, Callable[[Path, Sandbox], None]] = {
    "a pipe": _pipe,
    "a folder": _folder,
    "a link to itself": _loop,
    "a link to nothing": _dangling,
    "a link outside": _away,
    "a link to the input": _above,
    "a link to zeros without end": partial(_device, "/dev/zero"),
    "a link to nothing at all": partial(_device, "/dev/null"),
    "a link to a terminal": partial(_device, "/dev/tty"),
    "a link to what it is told": partial(_device, "/dev/stdin"),
    "a link to its own memory": partial(_device, "/proc/self/mem"),
    "an empty file": _empty,
    "a hole of 8 GiB": partial(_hole, 8 << 30),
    "a file that may not be read": _locked_file,
    "a folder that may not be read": _locked_folder,
    "gone": lambda path, box: None,
}


HARMLESS = ("gone", "a folder", "an empty file", "a link to nothing at all", "a link to what it is told")
"""What a file may be if it need not be there; our stdin is empty."""
NEEDED = (SHARD, "_METADATA", STORED, *(f"{STORED}/{name}" for name in ("zarr.json", "c", "c/0", ".zarray", "0")))
NEEDED += ("@item/manifest.ocdbt", "@item/d", "@item/ocdbt.process_0")
"""Files without which tensors are missing: to convert the rest would be wrong."""
ALWAYS = ("a pipe", "a link to zeros without end")


def _becomes(name: str, form: Callable[[Path, Sandbox], None]) -> Change:
    def change(box: Sandbox) -> None:
        path = place(box, name)
        removed(path)
        form(path, box)

    return change


def _deep(box: Sandbox) -> None:
    """A folder whose path is longer than paths may be: whoever walks by path cannot enter, and must say so."""
    directory = os.open(box.source, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=directory)
        below = os.open("d" * 250, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)


def _beside(name: str, form: Callable[[Path, Sandbox], None]) -> Change:
    def change(box: Sandbox) -> None:
        form(box.source / name, box)

    return change


def _ring(path: Path, box: Sandbox) -> None:
    path.mkdir()
    (path / "up").symlink_to("..")


def _many(path: Path, box: Sandbox) -> None:
    path.mkdir()
    for number in range(2000):
        (path / str(number)).touch()


BESIDE: dict[str, tuple[Callable[[Path, Sandbox], None], frozenset[int]]] = {
    "a pipe": (_pipe, DOCUMENTED),
    "a link to itself": (_loop, DOCUMENTED),
    "a link to nothing": (_dangling, DOCUMENTED),
    "a link to zeros without end": (partial(_device, "/dev/zero"), DOCUMENTED),
    "a link to the input": (_above, DOCUMENTED),
    "a ring of links": (_ring, DOCUMENTED),
    "a link to the folder above all": (partial(_device, "/"), DOCUMENTED),
    "a hole of 8 GiB": (partial(_hole, 8 << 30), DOCUMENTED),
    "a file that may not be read": (_locked_file, DOCUMENTED - {0}),
    "a folder that may not be read": (_locked_folder, DOCUMENTED - {0}),
    "2,000 files": (_many, DOCUMENTED),
}
"""Besides the files of a checkpoint. What cannot be read cannot be copied: to leave it out silently would be wrong."""


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    files, beside = Table("no file", []), Table("no file beside", [])
    for base, name, commands in FILES:
        for words, form in FORMS.items():
            harmless = (words in HARMLESS and name not in NEEDED) or words == "a link outside" or name == "original"
            codes = DOCUMENTED if harmless else DOCUMENTED - {0}
            files.add(
                f"{name.removeprefix('@item/')} is {words}",
                base,
                _becomes(name, form),
                *commands,
                codes=codes,
                always=words in ALWAYS,
            )
    for base in ("hf", "dirs", "ocdbt", "maxtext"):
        for words, (form, codes) in BESIDE.items():
            beside.add(words, base, _beside("odd", form), codes=codes, slow="8 GiB" in words or "2,000" in words)
        beside.add("a path too long", base, _deep, codes=DOCUMENTED - {0})
    for words in ("a pipe", "a link to zeros without end", "a folder that may not be read"):
        form = BESIDE[words][0]
        beside.add(f"called like a shard, {words}", "hf", _beside("extra.safetensors", form), codes=DOCUMENTED - {0})
        beside.add(f"called like a step, {words}", "ocdbt", _beside("1", form), codes=DOCUMENTED)
    yield from (files, beside)
