"""What a hostile checkpoint is: a sound one, and what was done to it. Tables of them are in the modules beside this one."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts._sandbox import DOCUMENTED, FORGED, REFUSED, Sandbox

Change = Callable[[Sandbox], object]
"""Does something to a sandbox that is laid out; it may give another `Sandbox` to go on with."""
Pointer = Sequence[str | int]

GONE = object()
"""In the place of a value: the key is removed."""
CANARY, ESCAPED = "CANARY", "\x1b[31m"
"""Stands for the absolute path of the sandbox's canaries; a text that colours a terminal."""
PREFUSE, SPLIT, ORBAX, HF = "--prefuse {in} {out}", "--split {in} {out}", "--to orbax {in} {out}", "--to hf {in} {out}"
DIGESTS, COMPARE = "--verify {in}", "--verify {in} {other} --no-gemm"
DRY, ITSELF = "--prefuse {in} {out} --dry-run", "--verify {in} {in} --no-gemm"
WRITTEN: Mapping[str, Sequence[str]] = {
    "hf": (PREFUSE,),
    "hf-fused": (SPLIT,),
    "hf-again": (PREFUSE,),
    "ocdbt": (PREFUSE,),
    "ocdbt-fused": (SPLIT,),
    "maxtext": (HF,),
    "maxtext-fused": (SPLIT,),
    "dirs": (PREFUSE,),
    "dirs-fused": (SPLIT,),
    "zarr2": (PREFUSE,),
    "zarr2-fused": (SPLIT,),
}
"""What is usually done with a base."""
WRONG: Mapping[str, Any] = {
    "null": None,
    "true": True,
    "minus one": -1,
    "a fraction": 0.5,
    "infinity": float("inf"),
    "huge": 10**400,
    "an empty text": "",
    "a text": "x",
    "a text that forges": f"{ESCAPED}\n{FORGED}",
    "a surrogate": "\ud800",
    "an empty list": [],
    "a list of objects": [{}],
    "an empty object": {},
    "an object in an object": {"a": {"b": []}},
}
"""Values that are of the wrong type almost everywhere."""
FEW = ("null", "minus one", "a text that forges", "a list of objects", "an object in an object")
USUAL = ("null", "a text that forges", "a list of objects")
"""Those that the default suite tries everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A hostile checkpoint and the commands that it is given to; `codes` are the exit codes that would be right.

    A `slow` one is for the long suite; the default one takes all that it shall `always` take, and some of the others.
    """

    name: str
    base: str
    change: Change
    commands: Sequence[str]
    codes: frozenset[int] = DOCUMENTED
    slow: bool = False
    always: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Collects the variants of a kind; their names begin with it."""

    kind: str
    found: list[Variant]

    def add(
        self,
        name: str,
        base: str,
        change: Change,
        *commands: str,
        codes: frozenset[int] = DOCUMENTED,
        slow: bool = False,
        always: bool = False,
    ) -> None:
        """One more; without commands, what is usually done with the base."""
        words = f"{self.kind}: {name}, in {base}"
        assert words not in {variant.name for variant in self.found}, words
        how = {"codes": codes, "slow": slow, "always": always}
        self.found.append(Variant(name=words, base=base, change=change, commands=commands or WRITTEN[base], **how))


def place(box: Sandbox, name: str) -> Path:
    """A file of the input; `@item/` begins those of an Orbax item, `@stage/` those of a staging directory."""
    for mark, folder in (("@item/", lambda: box.item), ("@stage/", lambda: box.stage), ("@work/", lambda: box.work)):
        if name.startswith(mark):
            return folder() / name.removeprefix(mark)
    return box.source / name


def filled(value: Any, box: Sandbox) -> Any:
    """A value in which the path of the canaries stands for itself."""
    if isinstance(value, str):
        return value.replace(CANARY, str(box.canary))
    if isinstance(value, list):
        return [filled(each, box) for each in value]
    if isinstance(value, dict):
        return {filled(key, box): filled(each, box) for key, each in value.items()}
    return value


def edit(name: str, pointer: Pointer, value: Any) -> Change:
    """Put a value into a JSON file; a function is given what stands there."""

    def change(box: Sandbox) -> None:
        path = place(box, name)
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(edited(tree, pointer, value, box)))

    return change


def edited(tree: Any, pointer: Pointer, value: Any, box: Sandbox) -> Any:
    """A tree in which something else stands in a place."""
    if not pointer:
        return filled(value(tree) if callable(value) else value, box)
    node = tree
    for key in pointer[:-1]:
        node = node[key]
    last: Any = pointer[-1]
    if value is not GONE:
        old = node[last] if isinstance(node, list) else node.get(last)
        node[last] = filled(value(old) if callable(value) else value, box)
    elif isinstance(node, list) or last in node:
        del node[last]
    return tree


def text(name: str, content: str | bytes | Callable[[bytes], bytes]) -> Change:
    """Write a file anew; a function is given what it holds."""

    def change(box: Sandbox) -> None:
        path = place(box, name)
        if callable(content):
            path.write_bytes(content(path.read_bytes()))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode(errors="surrogatepass") if isinstance(content, str) else content)

    return change


def removed(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    import shutil

    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def both(*changes: Change) -> Change:
    """One change after another."""

    def change(box: Sandbox) -> None:
        for each in changes:
            each(box)

    return change


def shard(name: str, header: Any, data: bytes = b"", size: int | None = None) -> Change:
    """A safetensors file with this header (bytes, or what JSON makes of it); `size` is the length that it states."""

    def change(box: Sandbox) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(filled(header, box)).encode()
        place(box, name).write_bytes((len(raw) if size is None else size).to_bytes(8, "little") + raw + data)

    return change


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def wrong(names: Iterable[str] = tuple(WRONG)) -> Iterator[tuple[str, Any]]:
    """Some of the wrong values, by their names."""
    return ((name, WRONG[name]) for name in names)


def rare(name: str) -> bool:
    """Whether this is a wrong value that only the long suite tries."""
    return name in WRONG and name not in USUAL


__all__ = ["DOCUMENTED", "FORGED", "REFUSED", "Sandbox"]
