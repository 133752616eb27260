"""Staging directories that somebody has prepared for us: links, pipes and files where ours would be, or within it."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from tests.hostile.variants import DOCUMENTED, PREFUSE, Change, Sandbox, Table, place, removed


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    table = Table("stage", [])
    for base in ("hf-staged", "ocdbt-staged", "dirs-staged"):
        for name, make in INSTEAD.items():
            table.add(name, base, _instead(make), PREFUSE, codes=DOCUMENTED - {1}, always=base == "hf-staged")
        for name, within in INSIDE.items():
            table.add(name, base, within, PREFUSE, codes=DOCUMENTED - {1}, always=base == "hf-staged")
    table.add("of another run, a link outside", "hf", _other_link, PREFUSE)
    table.add("of another run, a pipe", "hf", _other_pipe, PREFUSE)
    table.add("of another run, a file", "hf", lambda box: place(box, "@work/out.partial-0").touch(), PREFUSE)
    yield table


def _instead(make: Callable[[Sandbox, str], None]) -> Change:
    def change(box: Sandbox) -> None:
        name = box.stage.name
        shutil.rmtree(box.stage)
        make(box, name)

    return change


HELPER = ".convert_journal-1"
INSTEAD: dict[str, Callable[[Sandbox, str], None]] = {
    "a link outside": lambda box, name: os.symlink(box.canary, box.work / name),
    "a link to the input": lambda box, name: os.symlink(box.source, box.work / name),
    "a link to nothing": lambda box, name: os.symlink("nothing", box.work / name),
    "a link to itself": lambda box, name: os.symlink(name, box.work / name),
    "a file": lambda box, name: (box.work / name).touch(),
    "a pipe": lambda box, name: os.mkfifo(box.work / name),
    "a folder of others": lambda box, name: shutil.copytree(box.canary, box.work / name),
}


def _put(path: str, make: Callable[[Sandbox, Any], None]) -> Callable[[Sandbox], None]:
    """Something in the staging directory in the place of what is there."""

    def within(box: Sandbox) -> None:
        target = box.stage / path
        removed(target)
        make(box, target)

    return within


def _everywhere(box: Sandbox) -> None:
    """Each file of the output to be is a link to a canary of the same size."""
    for number, path in enumerate(sorted(path for path in (box.stage / "new").rglob("*") if path.is_file())):
        canary = box.canary / f"file{number}"
        shutil.move(path, canary)
        path.symlink_to(canary)


def _folders(box: Sandbox) -> None:
    """Each folder of the output to be is a link to a folder outside."""
    for path in sorted(path for path in (box.stage / "new").iterdir() if path.is_dir()):
        shutil.move(path, box.canary / path.name)
        path.symlink_to(box.canary / path.name)


def _hard(box: Sandbox) -> None:
    """Each file of the output to be has a second name, outside."""
    for number, path in enumerate(sorted(path for path in (box.stage / "new").rglob("*") if path.is_file())):
        os.link(path, box.canary / f"file{number}")


INSIDE: dict[str, Callable[[Sandbox], None]] = {
    "new is a link outside": _put("new", lambda box, path: path.symlink_to(box.canary)),
    "new is a link outside, and the journal knows it": lambda box: _known_link(box),
    "new is a link to nothing": _put("new", lambda box, path: path.symlink_to("nothing")),
    "new is a file": _put("new", lambda box, path: path.touch()),
    "new is a pipe": _put("new", lambda box, path: os.mkfifo(path)),
    "new is empty": _put("new", lambda box, path: path.mkdir()),
    "the journal is a link outside": _put(".convert_journal", lambda box, path: path.symlink_to(box.canary / "x.a/kept")),
    "the journal is a pipe": _put(".convert_journal", lambda box, path: os.mkfifo(path)),
    "the journal is a folder": _put(".convert_journal", lambda box, path: path.mkdir()),
    "the journal is zeros without end": _put(".convert_journal", lambda box, path: path.symlink_to("/dev/zero")),
    "a helper's journal is a link outside": _put(
        ".convert_journal-1", lambda box, path: path.symlink_to(box.canary / "x.a/kept")
    ),
    "a helper's journal is a pipe": _put(HELPER, lambda box, path: os.mkfifo(path)),
    "a helper's journal is zeros without end": _put(HELPER, lambda box, path: path.symlink_to("/dev/zero")),
    "the way is a link outside": _put(".convert_way", lambda box, path: path.symlink_to(box.canary / "x.a/kept")),
    "the way is a pipe": _put(".convert_way", lambda box, path: os.mkfifo(path)),
    "the way is no text": _put(".convert_way", lambda box, path: path.write_bytes(b"\xff\xfe")),
    "old is a link outside": _put("old", lambda box, path: path.symlink_to(box.canary)),
    "files are links outside": _everywhere,
    "folders are links outside": _folders,
    "files have names outside": _hard,
}


def _known_link(box: Sandbox) -> None:
    """As a run would have it that had begun there."""
    shutil.move(box.stage / "new", box.canary / "new")
    (box.stage / "new").symlink_to(box.canary / "new")


def _other_link(box: Sandbox) -> None:
    (box.work / "out.partial-0").symlink_to(box.canary)


def _other_pipe(box: Sandbox) -> None:
    os.mkfifo(box.work / "out.partial-0")
