"""OCDBT's tree: where its manifest says that nodes are, how long they are, and how deep it is."""

import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

from tests.hostile.variants import COMPARE, DRY, PREFUSE, REFUSED, Change, Sandbox, Table

_BLOCK = 128 << 10
"""Bytes of a block of zstd at most."""
ZEROS = "../" * 30 + "dev/zero"


def variants() -> Iterator[Table]:
    """All of them."""
    table = Table("node", [])
    for name, size in (("8 GiB", 8 << 30), ("900 MiB", 900 << 20), ("100 MB", 10**8)):
        table.add(
            f"of {name}, in a hole",
            "ocdbt",
            _forged(_root(nbytes=size), 9 << 30),
            PREFUSE,
            COMPARE,
            DRY,
            codes=REFUSED,
            slow="8" not in name,
        )
        table.add(f"of {name}", "ocdbt", _forged(_root(nbytes=size)), codes=REFUSED, slow=True)
    for name, change in {
        "of 2**62": _root(nbytes=1 << 62),
        "far away": _root(offset=1 << 62),
        "in a device": _root(file=f":{ZEROS}", nbytes=1 << 20),
        "at an absolute path": _root(file=":/etc/passwd"),
        "in a database above": _root(file="../../:d/x"),
        "that stands on itself 255 times": _root(height=255),
        "that stands on itself": _root(height=1),
    }.items():
        table.add(name, "ocdbt", _forged(change), PREFUSE, COMPARE, codes=REFUSED, slow="itself" not in name)
    table.add("that decodes to 1.5 GiB", "ocdbt", _bomb(_leaf, 1500), PREFUSE, COMPARE, codes=REFUSED, always=True)
    table.add("that decodes to 100 GiB", "ocdbt", _bomb(_leaf, 100_000), PREFUSE, DRY, codes=REFUSED, slow=True)
    table.add("of another version", "ocdbt", _bomb(bytes, 3, form=b"\x80\0\1"), codes=REFUSED, slow=True)
    table.add("of which half is there", "ocdbt", _bomb(lambda count: _leaf(count)[:-3], 1), codes=REFUSED, slow=True)
    table.add("there is none", "ocdbt", _forged(lambda tree: tree.update(versions=[])), codes=REFUSED)
    for name, change in {
        "that is said to hold much": _root(statistics=(1 << 63) - 1),
        "that may be large": lambda tree: tree["config"].update(max_decoded_node_bytes=(1 << 32) - 1),
        "that has to be small": lambda tree: tree["config"].update(max_decoded_node_bytes=1),
    }.items():
        table.add(name, "ocdbt", _forged(change), slow=True)
    yield table


def _root(*, file: str = "", offset: int = -1, nbytes: int = -1, height: int = -1, statistics: int = -1) -> Callable[..., None]:
    """Say something else of the root."""

    def change(tree: dict[str, Any]) -> None:
        version = tree["versions"][-1]
        kind, _, rest = version["root"]["location"].partition(":")
        was = rest.rsplit(":", 2)
        where = file or was[0], was[1] if offset < 0 else offset, was[2] if nbytes < 0 else nbytes
        version["root"]["location"] = ":".join(map(str, (kind, *where)))
        if height >= 0:
            version["root_height"] = height
        if statistics >= 0:
            version["root"]["statistics"] = dict.fromkeys(version["root"]["statistics"], statistics)

    return change


def _forged(change: Callable[..., object], size: int = 0) -> Change:
    """The manifests of all databases of an item with something else in them; files of nodes end in a hole, at `size`."""

    def forge(box: Sandbox) -> None:
        import tensorstore as ts

        for folder in (box.item, *box.item.glob("ocdbt.process_*")):
            tree = ts.ocdbt.dump(ts.KvStore.open(f"file://{folder}/").result()).result()
            change(tree)
            (folder / "manifest.ocdbt").write_bytes(ts.ocdbt.undump_manifest(tree))
            for file in (folder / "d").iterdir() if size else ():
                os.truncate(file, size)

    return forge


def _bomb(made: Callable[[int], bytes], count: int, form: bytes = b"\0\1") -> Change:
    """A root that holds what is made of a number, compressed, and has a sound length and CRC."""

    def forge(box: Sandbox) -> None:
        body = made(count)  # not before: others do not wait for it
        head = bytes.fromhex("0cdb20de") + struct.pack("<Q", 12 + len(form) + len(body) + 4) + form
        (box.item / "d" / "bomb").write_bytes(node := head + body + struct.pack("<I", _crc32c(head + body)))
        _forged(_root(file=":d/bomb", offset=0, nbytes=len(node), height=0))(box)

    return forge


def _leaf(count: int) -> bytes:
    """A node of `count` keys, each with a MiB of zeros beside it, in zstd (RFC 8878): of blocks that repeat a byte."""
    number = bytes([count & 127 | 128, count >> 7 & 127 | 128, count >> 14])
    keys = bytes(count - 1) + b"\x08" * count + b"".join(b"%08d" % i for i in range(count))
    start = b"\0\0" + number + keys + b"\x80\x80\x40" * count + bytes(count)
    blocks = [(0, part) for part in (start[at : at + _BLOCK] for at in range(0, len(start), _BLOCK))]
    blocks += [(1, b"\0")] * (count * (1 << 20) // _BLOCK)
    sizes = [len(part) if not repeats else _BLOCK for repeats, part in blocks]
    last = [0] * (len(blocks) - 1) + [1]
    rows = zip(last, sizes, blocks, strict=True)
    frame = [(end | repeats << 1 | size << 3).to_bytes(3, "little") + part for end, size, (repeats, part) in rows]
    return b"\x28\xb5\x2f\xfd\0\x58" + b"".join(frame)


def _crc32c(data: bytes) -> int:
    """Of the Castagnoli polynomial."""
    table = range(256)
    for _ in range(8):
        table = [(row >> 1) ^ (0x82F63B78 if row & 1 else 0) for row in table]
    found = 0xFFFFFFFF
    for byte in data:
        found = table[(found ^ byte) & 255] ^ (found >> 8)
    return found ^ 0xFFFFFFFF
