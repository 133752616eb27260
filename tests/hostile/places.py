"""Where input and output are: links, files, folders that are no checkpoints, one within the other."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.hostile.variants import DIGESTS, DOCUMENTED, DRY, ESCAPED, FORGED, PREFUSE, Change, Sandbox, Table

OVERWRITE = "--prefuse --overwrite {in} {out}"
REFUSALS = frozenset({2, 3, 4, 5, 6})


def _checkpoint(box: Sandbox, name: str = "out") -> None:
    shutil.copytree(box.base.parent / "hf-fused" / "in", box.work / name)


def _others(box: Sandbox) -> None:
    """A folder with somebody's files in it, which is no checkpoint."""
    (box.work / "out" / "photos").mkdir(parents=True)
    (box.work / "out" / "photos" / "one").write_text("precious")


def _link_to_others(box: Sandbox) -> None:
    (box.work / "out").symlink_to(box.canary)


def _link_to_input(box: Sandbox) -> None:
    (box.work / "out").symlink_to(box.source)


def _link_around(box: Sandbox) -> None:
    (box.work / "out").symlink_to("out")


def _dangling(box: Sandbox) -> None:
    (box.work / "out").symlink_to(box.canary / "not yet")


def _nested(box: Sandbox) -> None:
    """A checkpoint whose files are links outside."""
    _checkpoint(box)
    for number, path in enumerate(sorted(path for path in (box.work / "out").iterdir() if path.is_file())):
        shutil.move(path, box.canary / f"file{number}")
        path.symlink_to(box.canary / f"file{number}")


OUTPUTS: dict[str, Callable[[Sandbox], None]] = {
    "a file": lambda box: (box.work / "out").write_text("precious"),
    "a pipe": lambda box: os.mkfifo(box.work / "out"),
    "an empty folder": lambda box: (box.work / "out").mkdir(),
    "a folder of others": _others,
    "a checkpoint": _checkpoint,
    "a checkpoint of links": _nested,
    "a link to a folder": _link_to_others,
    "a link to the input": _link_to_input,
    "a link to itself": _link_around,
    "a link to nothing": _dangling,
    "a link to a device": lambda box: (box.work / "out").symlink_to("/dev/null"),
}


def _named(name: str, prepare: Callable[[Sandbox], None] = lambda box: None) -> Change:
    """An output that is called otherwise, or lies elsewhere."""

    def change(box: Sandbox) -> Sandbox:
        prepare(box)
        return replace(box, out_name=name)

    return change


def _file(box: Sandbox) -> None:
    (box.work / "file").touch()


def _closed(box: Sandbox) -> None:
    (box.work / "closed").mkdir()
    os.chmod(box.work / "closed", 0o500)


def _linked(box: Sandbox) -> None:
    (box.work / "link").symlink_to(box.source)


NAMES: dict[str, tuple[str, Callable[[Sandbox], None]]] = {
    "within the input": ("in/out", lambda box: None),
    "within the input, deeper": ("in/a/b/out", lambda box: None),
    "the input": ("in", lambda box: None),
    "the input by a detour": ("in/../in", lambda box: None),
    "within the input by a link": ("link/out", _linked),
    "below a file": ("file/out", _file),
    "in a closed folder": ("closed/out", _closed),
    "of 255 characters": ("o" * 255, lambda box: None),
    "of 300 characters": ("o" * 300, lambda box: None),
    "of 250 characters": ("o" * 250, lambda box: None),
    "of a device": ("dev", lambda box: (box.work / "dev").symlink_to("/dev")),
}


def _input(change: Callable[[Sandbox], None]) -> Change:
    return change


def _moved(box: Sandbox) -> None:
    """The input is a link to where it is."""
    shutil.move(box.source, box.canary / "in")
    box.source.symlink_to(box.canary / "in")


def _parts(box: Sandbox) -> None:
    """Each file of the input is a link, as in the Hugging Face cache."""
    for number, path in enumerate(sorted(path for path in box.source.rglob("*") if path.is_file())):
        shutil.move(path, box.canary / f"blob{number}")
        path.symlink_to(box.canary / f"blob{number}")


def _no_input(make: Callable[[Sandbox], None]) -> Change:
    def change(box: Sandbox) -> None:
        shutil.rmtree(box.source)
        make(box)

    return change


INPUTS: dict[str, Callable[[Sandbox], None]] = {
    "nothing": lambda box: None,
    "an empty folder": lambda box: box.source.mkdir(),
    "a file": lambda box: box.source.touch(),
    "a pipe": lambda box: os.mkfifo(box.source),
    "a link to itself": lambda box: box.source.symlink_to("in"),
    "a link to a device": lambda box: box.source.symlink_to("/dev/zero"),
    "the folder above all": lambda box: box.source.symlink_to(box.root),
}
NAMED = ("--prefuse {word} {out}", "--verify {word}", "--verify {in} {word} --no-gemm", "--prefuse {in} {word} --dry-run")
STRANGE = {
    "a store of no kind": "ftp://host/x",
    "a store of no name": "s3://",
    "a path with an escape": f"{ESCAPED}x",
    "a path with a line break": f"x\n{FORGED}",
    "a path that is no text": "a\udcff",
    "nothing": "",
    "a path of 5,000 characters": "x" * 5000,
}


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    outputs, inputs = Table("output", []), Table("input", [])
    for name, make in OUTPUTS.items():
        codes = DOCUMENTED if name.startswith("a checkpoint") else REFUSALS  # it may be what we would write
        outputs.add(name, "hf", make, PREFUSE, codes=codes)
        outputs.add(f"{name}, replaced", "hf", make, OVERWRITE, codes=DOCUMENTED - {1})
        outputs.add(f"{name}, replaced", "dirs", make, OVERWRITE, codes=DOCUMENTED - {1}, slow=True)
    for name, (path, prepare) in NAMES.items():
        for base in ("hf", "dirs"):
            outputs.add(f"called, {name}", base, _named(path, prepare), PREFUSE, OVERWRITE, codes=DOCUMENTED - {1})
    for base in ("hf", "dirs", "ocdbt"):
        inputs.add("a link", base, _input(_moved), PREFUSE, DRY)
        inputs.add("files that are links", base, _input(_parts), PREFUSE)
    for name, make in INPUTS.items():
        inputs.add(name, "hf", _no_input(make), PREFUSE, DIGESTS, DRY, codes=frozenset({3, 5}))
    for name, word in STRANGE.items():
        inputs.add(f"called, {name}", "hf", lambda box, word=word: replace(box, word=word), *NAMED)
    yield from (outputs, inputs)
