"""OCDBT's tree: where its manifest says that nodes are, how long they are, and how deep it is."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from tests.hostile.variants import COMPARE, DRY, PREFUSE, REFUSED, Change, Sandbox, Table

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
