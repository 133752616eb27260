"""safetensors files whose header, or whose length, is not what it should be."""

import json
import os
from collections.abc import Iterator
from typing import Any

from tests.hostile.variants import (
    COMPARE,
    DRY,
    FEW,
    ITSELF,
    ORBAX,
    PREFUSE,
    REFUSED,
    SPLIT,
    Change,
    Sandbox,
    Table,
    place,
    rare,
    shard,
    text,
    wrong,
)

FILE = "model-00001-of-00002.safetensors"
EXPERT = "model.layers.0.mlp.experts.{}.{}_proj.weight"


def _entry(offsets: Any, shape: Any = (4,), dtype: Any = "U8", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


HEADERS: dict[str, tuple[Any, bytes, int | None]] = {
    "of nothing": (b"", b"", None),
    "of an empty object": ({}, b"", None),
    "of an empty object and data": ({}, b"data", None),
    "that is a list": ([], b"", None),
    "that is a text": ("x", b"", None),
    "that is no JSON": (b"\x00\x01\x02\x03", b"", None),
    "that is no UTF-8": (b'{"\xff": 1}', b"", None),
    "with a byte order mark": (b"\xef\xbb\xbf{}", b"", None),
    "that begins with a space": (b"  {}", b"", None),
    "with NUL behind it": (b"{}\0\0", b"", None),
    "longer than the file": ({}, b"", 1000),
    "of 100 MB": ({}, b"", 100_000_000),
    "of 2**63": ({}, b"", 1 << 63),
    "of 2**64 - 1": ({}, b"", (1 << 64) - 1),
    "of length nothing": ({}, b"", 0),
    "of one byte": ({}, b"", 1),
    "deep": (b'{"a":' * 100_000, b"", None),
    "deep lists": (b'{"a":' + b"[" * 200_000, b"", None),
    "of 50,000 tensors": ({f"t{i}": _entry([0, 0], [0]) for i in range(50_000)}, b"", None),
    "with metadata that is no text": ({"__metadata__": {"a": 1}, "t": _entry([0, 4])}, b"data", None),
    "with metadata that is a list": ({"__metadata__": [], "t": _entry([0, 4])}, b"data", None),
    "with metadata that is nothing": ({"__metadata__": None, "t": _entry([0, 4])}, b"data", None),
    "with data behind the tensors": ({"t": _entry([0, 4])}, b"data and more", None),
    "with less data than tensors": ({"t": _entry([0, 4])}, b"da", None),
    "with a hole": ({"t": _entry([0, 4]), "u": _entry([8, 12])}, b"x" * 12, None),
    "with a hole before": ({"t": _entry([4, 8])}, b"x" * 8, None),
    "with an overlap": ({"t": _entry([0, 4]), "u": _entry([2, 6])}, b"x" * 6, None),
    "with one place for two": ({"t": _entry([0, 4]), "u": _entry([0, 4])}, b"x" * 4, None),
    "with a span in reverse": ({"t": _entry([4, 0])}, b"data", None),
    "with a negative offset": ({"t": _entry([-4, 0])}, b"data", None),
    "with fractional offsets": ({"t": _entry([0.0, 4.0])}, b"data", None),
    "with offsets as text": ({"t": _entry(["0", "4"])}, b"data", None),
    "with one offset": ({"t": _entry([0])}, b"data", None),
    "with three offsets": ({"t": _entry([0, 4, 8])}, b"data", None),
    "with huge offsets": ({"t": _entry([0, 10**30])}, b"data", None),
    "with offsets at 2**64": ({"t": _entry([0, (1 << 64) - 1], [(1 << 64) - 1])}, b"data", None),
    "with a negative size": ({"t": _entry([0, 4], [-4])}, b"data", None),
    "with sizes that overflow": ({"t": _entry([0, 4], [1 << 32, 1 << 32, 4])}, b"data", None),
    "with a fractional size": ({"t": _entry([0, 4], [4.0])}, b"data", None),
    "with a size that is true": ({"t": _entry([0, 1], [True])}, b"d", None),
    "with a shape that is a number": ({"t": _entry([0, 4], 4)}, b"data", None),
    "with a shape that is nothing": ({"t": _entry([0, 4], None)}, b"data", None),
    "with rank 0": ({"t": _entry([0, 1], [])}, b"d", None),
    "with rank 40": ({"t": _entry([0, 4], [1] * 39 + [4])}, b"data", None),
    "with rank 65": ({"t": _entry([0, 4], [1] * 64 + [4])}, b"data", None),
    "with rank 10,000": ({"t": _entry([0, 4], [1] * 9_999 + [4])}, b"data", None),
    "with rank 40 and nothing in it": ({"t": _entry([0, 0], [0] * 40)}, b"", None),
    "with size 0 in a huge shape": ({"t": _entry([0, 0], [1 << 40, 1 << 20, 0])}, b"", None),
    "with an element type that is none": ({"t": _entry([0, 4], dtype="X8")}, b"data", None),
    "with an element type below a byte": ({"t": _entry([0, 2], dtype="F4")}, b"da", None),
    "with an element type in small letters": ({"t": _entry([0, 4], dtype="u8")}, b"data", None),
    "with an element type that is a number": ({"t": _entry([0, 4], dtype=8)}, b"data", None),
    "with an element type too wide": ({"t": _entry([0, 4], dtype="F64")}, b"data", None),
    "with more than is known": ({"t": _entry([0, 4], more=[1])}, b"data", None),
    "without an element type": ({"t": {"shape": [4], "data_offsets": [0, 4]}}, b"data", None),
    "with an entry that is a list": ({"t": [0, 4]}, b"data", None),
    "with an entry that is nothing": ({"t": None}, b"data", None),
    "that says a key twice": (b'{"t":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', b"data", None),
}
"""A header, the data behind it, and the length that is stated if it is another."""


def _other(header: Any, data: bytes, size: int | None) -> Change:
    return shard("other.safetensors", header, data, size)


def _alone(box: Sandbox) -> None:
    """Without an index, so that every file counts."""
    place(box, "model.safetensors.index.json").unlink(missing_ok=True)


def _with(change: Change) -> Change:
    def both(box: Sandbox) -> None:
        _alone(box)
        change(box)

    return both


def _experts(shape: list[int], count: int = 1, dtype: str = "U8") -> Change:
    """A checkpoint of experts of this shape, and nothing else."""

    def change(box: Sandbox) -> None:
        _alone(box)
        for file in box.source.glob("*.safetensors"):
            file.unlink()
        config = json.loads(place(box, "config.json").read_text())
        place(box, "config.json").write_text(json.dumps(config | {"num_experts": count}))
        names = [EXPERT.format(e, word) for e in range(count) for word in ("gate", "up", "down")]
        nbytes = 1
        for size in shape:
            nbytes *= size
        header = {name: _entry([at * nbytes, (at + 1) * nbytes], shape, dtype) for at, name in enumerate(names)}
        shard("model.safetensors", header, bytes(nbytes * len(names)))(box)

    return change


def _hole(count: int, n: int, k: int) -> Change:
    """So many experts in two tensors of zeros, which take no room on the disk."""

    def change(box: Sandbox) -> None:
        _experts([1])(box)
        config = json.loads(place(box, "config.json").read_text())
        place(box, "config.json").write_text(json.dumps(config | {"num_experts": count}))
        wi, wo = 2 * count * n * k, count * n * k
        shapes = {"gate_up_proj": ([0, wi], [count, 2 * n, k]), "down_proj": ([wi, wi + wo], [count, k, n])}
        header = {f"model.layers.0.mlp.experts.{name}": _entry(*shape) for name, shape in shapes.items()}
        shard("model.safetensors", header)(box)
        path = place(box, "model.safetensors")
        os.truncate(path, path.stat().st_size + wi + wo)

    return change


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    headers, experts, lengths = Table("header", []), Table("shape of experts", []), Table("length of a shard", [])
    for name, (header, data, size) in HEADERS.items():
        change = _other(header, data, size)
        headers.add(f"{name}, beside sound shards", "hf", _with(change))
        headers.add(f"{name}, instead of a shard", "hf", shard(FILE, header, data, size), PREFUSE, COMPARE, codes=REFUSED)
    for name, value in wrong(FEW):
        headers.add(f"whose metadata is {name}", "hf", _with(_other({"__metadata__": value}, b"", None)), slow=rare(name))
        record = json.dumps(value)
        headers.add(
            f"whose record is {name}",
            "hf-fused",
            _with(_other({"__metadata__": {"moe_layout": record}}, b"", None)),
            slow=rare(name),
        )
    for shape in ([], [0], [4], [0, 0], [0, 4], [4, 0], [1, 1], [4, 4, 4], [1] * 40, [0] * 64, [1 << 40, 0]):
        words = f"{len(shape)} sizes" if len(shape) > 3 else f"sizes {shape}"
        experts.add(words, "hf", _experts(shape), PREFUSE, ORBAX, DRY)
    experts.add("2,000 experts of nothing", "hf", _experts([0, 4], 2000), PREFUSE, slow=True)
    for count, n, k in ((1 << 30, 1, 1), (1 << 26, 1 << 6, 1 << 6)):
        experts.add(
            f"{count:,} experts of ({n}, {k}) in a hole",
            "hf",
            _hole(count, n, k),
            PREFUSE,
            SPLIT,
            DRY,
            ITSELF,
            codes=frozenset({3}),
        )
    for dtype in ("BOOL", "F8_E4M3", "I8", "F8_E8M0"):
        experts.add(f"of {dtype}", "hf", _experts([4, 4], dtype=dtype), PREFUSE, ORBAX)
    for left in (0, 1, 7, 8, 9, 100, -1):
        cut = text(FILE, lambda raw, left=left: raw[:left])
        lengths.add(f"cut to {left}" if left >= 0 else "one byte short", "hf", cut, PREFUSE, COMPARE, DRY, codes=REFUSED)
    lengths.add("one byte more", "hf", text(FILE, lambda raw: raw + b"\0"), codes=REFUSED)
    lengths.add("a git-lfs pointer", "hf", text(FILE, b"version https://git-lfs.github.com/spec/v1\n"), codes=REFUSED)
    lengths.add("the other shard's", "hf", _exchanged, codes=REFUSED)
    lengths.add("a shard is gone", "hf", lambda box: place(box, FILE).unlink(), PREFUSE, COMPARE, codes=REFUSED)
    lengths.add("a shard is gone, and the index", "hf", _with(lambda box: place(box, FILE).unlink()), codes=REFUSED)
    lengths.add("a shard that holds no experts is gone, and the index", "hf", _with(_lose_second), codes=REFUSED)
    lengths.add("all shards are gone", "hf", _no_shards, codes=REFUSED)
    yield from (headers, experts, lengths)


def _exchanged(box: Sandbox) -> None:
    one, other = place(box, FILE), place(box, FILE.replace("00001-", "00002-"))
    one.write_bytes(other.read_bytes())


def _lose_second(box: Sandbox) -> None:
    place(box, FILE.replace("00001-", "00002-")).unlink()


def _no_shards(box: Sandbox) -> None:
    for file in box.source.glob("*.safetensors"):
        file.unlink()
