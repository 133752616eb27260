"""Arrays: zarr's metadata, the chunks, and OCDBT's databases."""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.variants import (
    COMPARE,
    DIGESTS,
    DOCUMENTED,
    DRY,
    ESCAPED,
    FEW,
    FORGED,
    ITSELF,
    PREFUSE,
    SPLIT,
    Change,
    Pointer,
    Sandbox,
    Table,
    edit,
    place,
    rare,
    text,
    wrong,
)

NORM, WI = "params.params.decoder.norm.scale", "params.params.decoder.layers.moe_block.wi_0"
CODEC = ("codecs", 0, "configuration")
ZARR3: dict[str, tuple[Pointer, Any]] = {
    "a huge shape in chunks of one": ((), lambda old: _resized(old, [10**9], [1])),
    "a huge shape in huge chunks": ((), lambda old: _resized(old, [1 << 40], [1 << 40])),
    "a shape at 2**62": (("shape",), [1 << 62]),
    "a shape beyond 2**64": (("shape",), [1 << 70]),
    "a shape in which all overflows": (("shape",), [1 << 40, 1 << 40, 1 << 40]),
    "a shape below zero": (("shape",), [-1]),
    "a shape of nothing": (("shape",), [0]),
    "rank 0": (("shape",), []),
    "rank 40": ((), lambda old: _resized(old, [1] * 40, [1] * 40)),
    "a fractional shape": (("shape",), [16.5]),
    "chunks of nothing": (("chunk_grid", "configuration", "chunk_shape"), [0]),
    "chunks below zero": (("chunk_grid", "configuration", "chunk_shape"), [-4]),
    "huge chunks": (("chunk_grid", "configuration", "chunk_shape"), [1 << 50]),
    "chunks that no memory holds": (("chunk_grid", "configuration", "chunk_shape"), [1 << 40]),
    "chunks that some memory holds": (("chunk_grid", "configuration", "chunk_shape"), [1 << 30]),
    "chunks of another rank": (("chunk_grid", "configuration", "chunk_shape"), [4, 4]),
    "a grid that is none": (("chunk_grid", "name"), "odd"),
    "codecs without end": (("codecs",), lambda old: old * 1000),
    "a codec that is none": (("codecs", 0, "name"), "odd"),
    "no codec": (("codecs",), []),
    "huge shards": ((*CODEC, "chunk_shape"), [1 << 50]),
    "shards of nothing": ((*CODEC, "chunk_shape"), [0]),
    "an index without codecs": ((*CODEC, "index_codecs"), []),
    "an index at the start": ((*CODEC, "index_location"), "start"),
    "a type that is none": (("data_type",), "odd"),
    "a type that is wider": (("data_type",), "float64"),
    "a type that is text": (("data_type",), "string"),
    "a fill value of NaN": (("fill_value",), "NaN"),
    "keys of version 2": (("chunk_key_encoding",), {"name": "v2", "configuration": {"separator": "."}}),
    "keys with a point": (("chunk_key_encoding",), {"name": "default", "configuration": {"separator": "."}}),
    "keys of another kind": (("chunk_key_encoding",), {"name": "odd"}),
    "version 9": (("zarr_format",), 9),
    "a group": (("node_type",), "group"),
    "attributes": (("attributes",), {f"{ESCAPED}\n{FORGED}": ["x" * 100_000]}),
    "names of dimensions": (("dimension_names",), [f"{ESCAPED}"]),
}
ZARR2: dict[str, tuple[Pointer, Any]] = {
    "a huge shape in chunks of one": ((), lambda old: old | {"shape": [10**9], "chunks": [1]}),
    "a huge shape in huge chunks": ((), lambda old: old | {"shape": [1 << 40], "chunks": [1 << 40]}),
    "a shape below zero": (("shape",), [-1]),
    "rank 0": ((), lambda old: old | {"shape": [], "chunks": []}),
    "rank 40": ((), lambda old: old | {"shape": [1] * 40, "chunks": [1] * 40}),
    "chunks of nothing": (("chunks",), [0]),
    "chunks below zero": (("chunks",), [-1]),
    "huge chunks": (("chunks",), [1 << 50]),
    "chunks that no memory holds": (("chunks",), [1 << 40]),
    "chunks that some memory holds": (("chunks",), [1 << 30]),
    "a huge shape in huge chunks of zlib": (
        (),
        lambda old: old | {"shape": [1 << 40], "chunks": [1 << 40], "compressor": {"id": "zlib", "level": 1}},
    ),
    "a compressor that is none": (("compressor",), {"id": "odd"}),
    "a compressor without a name": (("compressor",), {}),
    "another compressor": (("compressor",), {"id": "zlib", "level": 1}),
    "blosc": (("compressor",), {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1}),
    "filters": (("filters",), [{"id": "delta"}]),
    "the other order": (("order",), "F"),
    "no order": (("order",), "X"),
    "a type that is none": (("dtype",), "odd"),
    "a wider type": (("dtype",), "<f8"),
    "the other byte order": (("dtype",), ">u2"),
    "a structured type": (("dtype",), [["a", "<u2"], ["b", "<u2"]]),
    "a separator that is none": (("dimension_separator",), "x"),
    "a separator that makes folders": (("dimension_separator",), "/"),
    "version 9": (("zarr_format",), 9),
}
CHUNKS: dict[str, Any] = {
    "nothing": b"",
    "one byte": b"\0",
    "garbage": bytes(range(256)) * 4,
    "half": lambda raw: raw[: len(raw) // 2],
    "without its end": lambda raw: raw[:-1],
    "with more behind": lambda raw: raw + b"more",
    "a flipped byte": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 0xFF]) + raw[len(raw) // 2 + 1 :],
    "a frame that says it is huge": b"\x28\xb5\x2f\xfd\xe0" + (1 << 50).to_bytes(8, "little") + b"\x01\x00\x00",
    "a frame with a huge window": b"\x28\xb5\x2f\xfd\x00\xf8" + b"\x01\x00\x00",
    "a frame of zeros to no end": b"\x28\xb5\x2f\xfd\x00\x58" + b"\x02\x00\x10\x00" * 100_000,
}
RELAID = "--prefuse --layout interleaved {in} {out}"
STATED = ("chunk_grid", "codecs", "data_type", "fill_value", "shape", "zarr_format", "node_type", "chunk_key_encoding")


def _resized(old: dict[str, Any], shape: list[int], chunk: list[int]) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": chunk}}
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    return old | {"shape": shape, "chunk_grid": grid, "codecs": codecs}


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    three, two, chunks, databases = (Table(kind, []) for kind in ("zarr 3", "zarr 2", "chunk", "database"))
    for name, (pointer, value) in ZARR3.items():
        for array, words in ((NORM, name), (WI, f"{name}, an expert's")):
            sized = _fitted(value, array)
            three.add(words, "dirs", edit(f"{array}/zarr.json", pointer, sized), PREFUSE, DRY)
        three.add(f"{name}, compared", "dirs", edit(f"{NORM}/zarr.json", pointer, value), COMPARE, ITSELF)
    for word in STATED:
        for name, value in wrong(FEW):
            three.add(f"{word} is {name}", "dirs", edit(f"{NORM}/zarr.json", (word,), value), slow=rare(name))
    for name, (pointer, value) in ZARR2.items():
        two.add(name, "zarr2", edit(f"{NORM}/.zarray", pointer, value), PREFUSE, COMPARE, ITSELF)
    _all_experts(three)
    for name, content in CHUNKS.items():
        for base, array, file in (("dirs", NORM, "c/0"), ("dirs", WI, "c/0/0/0/0"), ("zarr2", WI, "0.0.0.0")):
            codes = frozenset({3, 6}) if name not in ("with more behind",) else frozenset({0, 3})
            change = text(f"{array}/{file}", content)
            # Chunks that are kept are copied without a look into them: their digests are of what is stored.
            lost = frozenset({3}) if content == b"" else DOCUMENTED
            chunks.add(f"{array.rpartition('.')[2]}, {name}", base, change, PREFUSE, RELAID, codes=lost)
            chunks.add(f"{array.rpartition('.')[2]}, {name}, compared", base, change, COMPARE, codes=codes | {1})
    _layouts(chunks)
    _databases(databases)
    yield from (three, two, chunks, databases)


def _all_experts(table: Table) -> None:
    """Experts that are alike, and huge along one axis: what is not stored stands for zeros, so that 3 kB say petabytes."""
    for name, axis, size, chunk in (
        ("chunks of one", "n", 10**9, 1),
        ("huge chunks", "n", 1 << 40, 1 << 40),
        ("chunks of rows", "n", 1 << 50, 1 << 20),
        ("huge chunks of rows", "k", 1 << 40, 1 << 40),
        ("a stack of layers", "l", 1 << 40, 1 << 40),
        ("no end of them", "e", 1 << 40, 1 << 40),
    ):

        def change(box: Sandbox, axis: str = axis, size: int = size, chunk: int = chunk) -> None:
            edit("_METADATA", ("store_array_data_equal_to_fill_value",), False)(box)
            sizes, chunks = {"e": 3, "l": 2, "k": 16, "n": 8} | {axis: size}, dict.fromkeys("elkn", 1) | {axis: chunk}
            for word, axes in (("wi_0", "elkn"), ("wi_1", "elkn"), ("wo", "elnk")):
                shape, grid = [sizes[each] for each in axes], [chunks[each] for each in axes]
                edit(f"{WI.replace('wi_0', word)}/zarr.json", (), partial(_resized, shape=shape, chunk=grid))(box)
                shutil.rmtree(box.source / WI.replace("wi_0", word) / "c")

        codes = frozenset({3})
        table.add(f"all experts are huge, in {name}", "dirs", change, PREFUSE, RELAID, DRY, COMPARE, ITSELF, codes=codes)


def _fitted(value: Any, array: str) -> Any:
    """The same for the rank of an expert's array, where it is a shape of rank 1."""
    if array == WI and isinstance(value, list) and len(value) == 1 and isinstance(value[0], int):
        return [3, 2, 16, value[0]]
    return value


def _layouts(table: Table) -> None:
    """Files that are in the way of chunks, or beside them."""

    def touched(*names: str) -> Change:
        def change(box: Sandbox) -> None:
            for name in names:
                path = box.source / NORM / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"odd")

        return change

    for name, files in {
        "a key beyond the grid": ("c/7",),
        "a key below zero": ("c/-1",),
        "a key that is a word": ("c/x",),
        "a key of 5,000 digits": ("c/" + "/".join(["9" * 200] * 5),),
        "a key of another rank": ("c/0.0", "1/0/0"),
        "a key with an escape": (f"c/{ESCAPED}",),
        "a lock": ("c/0.__lock",),
        "metadata of the other version": (".zarray", ".zattrs"),
        "500 keys": tuple(f"c/{i}" for i in range(1, 500)),
    }.items():
        table.add(name, "dirs", touched(*files), PREFUSE, COMPARE)


def _databases(table: Table) -> None:
    """OCDBT: its manifest and the files with values and nodes; the joined database and that of the one process."""
    files = {
        "the manifest": "manifest.ocdbt",
        "a node": "d/*",
        "a process's manifest": "ocdbt.process_0/manifest.ocdbt",
        "a value": "ocdbt.process_0/d/*",
    }
    contents = {name: CHUNKS[name] for name in CHUNKS if name not in ("a frame with a huge window",)}
    for where, pattern in files.items():
        for name, content in contents.items():
            change = _each(pattern, content)
            table.add(f"{where} is {name}", "ocdbt", change, PREFUSE, COMPARE)
            table.add(f"{where} is {name}", "ocdbt-fused", change, SPLIT, DIGESTS)
        for base in ("ocdbt", "maxtext-fused"):
            codes = DOCUMENTED if "process's" in where else frozenset({3})
            table.add(f"{where} is gone", base, _each(pattern, None), codes=codes)
    table.add("it is another's", "ocdbt", _swapped, PREFUSE, COMPARE)
    for name, key, size in (
        ("a chunk", "params.params.decoder.decoder_norm.scale/0", 1 << 20),
        ("a chunk of an expert", "params.params.decoder.layers.moe_block.wi_0/0.0.0.0", 1 << 20),
        ("metadata", "params.params.decoder.layers.moe_block.wi_0/.zarray", 17 << 20),
    ):
        table.add(f"{name} is longer than any", "ocdbt", _longer(key, size), PREFUSE, RELAID, COMPARE, codes=frozenset({3}))
    for name, value in wrong(("null", "true", "a text", "an empty object")):
        table.add(f"directories, and the mark is {name}", "dirs", edit("_METADATA", ("use_ocdbt",), value), slow=rare(name))
        table.add(
            f"a database, and the mark is {name}", "ocdbt", edit("@item/_METADATA", ("use_ocdbt",), value), slow=rare(name)
        )
    table.add("a database, and the mark of zarr 3 is wrong", "ocdbt", edit("@item/_METADATA", ("use_zarr3",), True))


def _longer(key: str, size: int) -> Change:
    """A value of a database with spaces behind it; the database is sound, and says how long the value is."""

    def change(box: Sandbox) -> None:
        import tensorstore as ts

        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{box.item}/"}).result()
        store.write(key, store.read(key).result().value + b" " * size).result()

    return change


def _each(pattern: str, content: Any) -> Change:
    def change(box: Sandbox) -> None:
        for path in sorted(box.item.glob(pattern)):
            if content is None:
                path.unlink()
            else:
                text(path.relative_to(box.source).as_posix(), content)(box)

    return change


def _swapped(box: Sandbox) -> None:
    """The database of another checkpoint, whose arrays are others."""
    other: Path = box.base.parent / "maxtext" / "in" / "0" / "items"
    for name in ("manifest.ocdbt", "d", "ocdbt.process_0"):
        path = place(box, f"@item/{name}")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        (shutil.copytree if (other / name).is_dir() else shutil.copyfile)(other / name, path)
    tree = place(box, "@item/_METADATA")
    tree.write_text(json.dumps(json.loads(tree.read_text()) | {"use_zarr3": True}))
