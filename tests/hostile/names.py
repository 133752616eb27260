"""Names that a checkpoint chooses: of tensors, leaves, arrays, shards, files; and what is said twice."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from tests.hostile.variants import (
    CANARY,
    COMPARE,
    DIGESTS,
    DRY,
    ESCAPED,
    FORGED,
    HF,
    ORBAX,
    PREFUSE,
    REFUSED,
    SPLIT,
    Change,
    Sandbox,
    Table,
    both,
    edit,
    filled,
    header_of,
    place,
    text,
)

PATHS = {
    "an absolute path": f"{CANARY}/x.a",
    "the parent": "../x.a",
    "the second parent": "../../x.a",
    "the third parent": "../../../x.a",
    "the fifth parent": "../../../../../x.a",
    "parents within": "a/../../../x.a",
    "dots": "..",
    "a dot": ".",
    "a slash": "/",
    "a slash at the end": "a/",
    "slashes": "a//b",
    "a backslash": "..\\..\\x.a",
    "a scheme": "file:///x.a",
}
ODD = {
    "nothing": "",
    "a space": " ",
    "NUL": "a\0b",
    "an escape": f"a{ESCAPED}b",
    "a line break": f"a\n{FORGED}",
    "a carriage return": "a\rb",
    "a C1 control": "a\x9bb",
    "a surrogate": "a\ud800b",
    "a turn of direction": "a\u202eb",
    "300 characters": "a" * 300,
    "100,000 characters": "a" * 100_000,
    "slots": "{path}.{l}.{e}.{g:a,b}",
    "a format": "%s %n {0.__class__} {}",
    "metadata": "__metadata__",
    "dots before and behind": ".a.",
    "an expert without end": "model.layers.0.mlp.experts." + "9" * 5000 + ".up_proj.weight",
    "an expert in other digits": "model.layers.0.mlp.experts.\u0663.up_proj.weight",
    "a layer far away": "model.layers.999999999.mlp.experts.0.up_proj.weight",
    "an expert far away": "model.layers.0.mlp.experts.999999999.up_proj.weight",
    "what a fused tensor will be called": "model.layers.0.mlp.experts.wi",
    "what a shard is called": "model-00001-of-00002.safetensors",
}
OTHER = "model.norm.weight"
"""A tensor that is no expert's, in Hugging Face's names."""
LEAF = "('params', 'params', 'decoder', 'norm', 'scale')"
"""A leaf that is no expert's, in the trees with a directory for each array."""
STORED = "params.params.decoder.norm.scale"


def _tensor(name: str) -> Change:
    """Give a tensor another name, in its shard and in the index."""

    def change(box: Sandbox) -> None:
        index = place(box, "model.safetensors.index.json")
        tree = json.loads(index.read_text())
        file = place(box, tree["weight_map"].pop(OTHER))
        new = filled(name, box)
        tree["weight_map"][new] = file.name
        index.write_text(json.dumps(tree))
        header, data = header_of(file)
        raw = json.dumps({new if key == OTHER else key: entry for key, entry in header.items()}).encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)

    return change


def _leaf(name: str, *, present: bool) -> Change:
    """Give a leaf another name; if it shall be `present`, arrays lie wherever that leads."""

    def change(box: Sandbox) -> None:
        new = filled(name, box)
        edit("_METADATA", ("tree_metadata", LEAF, "key_metadata"), [{"key": new, "key_type": 2}])(box)
        if not present:
            return
        array = box.source / STORED
        for parent in (box.canary, *list(box.source.parents)[:6]):
            shutil.rmtree(parent / "x.a")
            shutil.copytree(array, parent / "x.a")
        here = box.source / new
        if here.parent.exists() and not here.exists():
            shutil.copytree(array, here)

    return change


def _possible(name: str) -> bool:
    """Whether a directory may be called so."""
    parts = name.split("/")
    return "\0" not in name and "\ud800" not in name and all(0 < len(part) < 256 for part in parts)


def _file(name: bytes) -> Change:
    """A file beside the tensors; the name is bytes, and need not be text."""

    def change(box: Sandbox) -> None:
        path = os.path.join(os.fsencode(box.source), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"beside")

    return change


FILES: Mapping[str, tuple[bytes, frozenset[int]]] = {
    "bytes that are no text": (b"a\xff\xfe", frozenset(range(7))),
    "an escape": (f"a{ESCAPED}b".encode(), frozenset(range(7))),
    "a line break": (f"a\n{FORGED}".encode(), frozenset(range(7))),
    "a space": (b" ", frozenset(range(7))),
    "a dash": (b"--overwrite", frozenset(range(7))),
    "what the manifest is called, in a folder": (b"convert_manifest.json/a", frozenset(range(7))),
    "what the journal is called": (b".convert_journal", frozenset(range(7))),
    "what a stage is called": (b"out.partial-00000000/new/a", frozenset(range(7))),
    "what the output's shard is called, a folder": (b"model.safetensors/a", frozenset(range(7))),
    "what a shard is called": (b"model-00009-of-00009.safetensors", REFUSED),
    "255 characters": (b"a" * 255, frozenset(range(7))),
    "a folder with an escape": (f"{ESCAPED}/a".encode(), frozenset(range(7))),
}
ONLY = {
    "what a shard is called": ("hf", "hf-fused"),
    "what the manifest is called, in a folder": ("hf", "dirs", "ocdbt"),
    "what the output's shard is called, a folder": ("hf", "dirs", "ocdbt", "maxtext"),
}
"""Names that not every base has room or a meaning for."""
INDEX = "model.safetensors.index.json"
FORGED_SHARDS = {
    **PATHS,
    **{name: ODD[name] for name in ("nothing", "NUL", "an escape", "a line break", "a surrogate", "100,000 characters")},
    "a device": "/dev/zero",
    "a file outside": f"{CANARY}/x.a/kept",
    "the config": "config.json",
    "itself": INDEX,
}


def _fits(name: str, base: str) -> bool:
    return base in ONLY.get(name, (base,))


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    tensors, leaves, shards, files, twice = (
        Table(kind, []) for kind in ("tensor", "leaf", "shard of the index", "file beside", "said twice")
    )
    for name, word in (PATHS | ODD).items():
        tensors.add(name, "hf", _tensor(word), PREFUSE, slow=False)
        tensors.add(f"{name}, elsewhere", "hf", _tensor(word), ORBAX, DRY, COMPARE)
        leaves.add(name, "dirs", _leaf(word, present=_possible(word)), PREFUSE, always=name in PATHS)
        leaves.add(name, "zarr2", _leaf(word, present=_possible(word)), PREFUSE)
    for name, word in PATHS.items():
        leaves.add(f"{name}, compared", "dirs", _leaf(word, present=True), COMPARE, DRY)
    for name, word in FORGED_SHARDS.items():
        shards.add(name, "hf", edit(INDEX, ("weight_map", OTHER), word), codes=REFUSED)
    for base in ("hf", "hf-fused", "dirs", "ocdbt", "maxtext"):
        for name, (raw, codes) in FILES.items():
            if _fits(name, base):
                files.add(name, base, _file(raw), codes=codes)
    _twice(twice)
    _headers(shards)
    yield from (tensors, leaves, shards, files, twice)


def _headers(table: Table) -> None:
    """Names of the files that a manifest remembers, which a split writes again."""

    def named(word: str) -> Change:
        def renamed(headers: dict[str, Any]) -> dict[str, Any]:
            return {(word if not at else name): headers[name] for at, name in enumerate(headers)}

        return edit("convert_manifest.json", ("original", "headers"), renamed)

    ends = {name: word + ".safetensors" for name, word in (PATHS | ODD).items()}
    for name, word in {**ends, "of another kind": "config.json", "of the tool": "convert_manifest.json"}.items():
        table.add(f"remembered, {name}", "hf-fused", named(word), SPLIT, slow="100,000" in name)
    for name in ("an absolute path", "the second parent", "NUL", "a line break", "300 characters"):
        table.add(f"remembered, {name}", "maxtext-fused", named(ends[name]), "--split --to hf {in} {out}")


def _twice(table: Table) -> None:
    def again(word: bytes) -> Change:
        return text(INDEX, lambda raw: raw.replace(b'"weight_map": {', b'"weight_map": {' + word, 1))

    for name, word in (("same", b"model-00001-of-00002"), ("other", b"model-00002-of-00002")):
        entry = b'"' + OTHER.encode() + b'": "' + word + b'.safetensors",'
        table.add(f"a tensor in the index, {name} shard", "hf", again(entry), codes=REFUSED)
    for name, file, base, command in (
        ("the config", "config.json", "hf", PREFUSE),
        ("the config of a tree", "config.json", "maxtext", HF),
        ("the manifest", "convert_manifest.json", "hf-fused", DIGESTS),
        ("the manifest of a tree", "convert_manifest.json", "ocdbt-fused", DIGESTS),
        ("the tree", "_METADATA", "dirs", PREFUSE),
    ):
        repeated = text(file, lambda raw: b'{"version": 1, "version": 2, "use_zarr3": true,' + raw.lstrip()[1:])
        table.add(name, base, repeated, command)

    def leaf_again(tree: dict[str, Any]) -> dict[str, Any]:
        return tree | {"('again',)": next(iter(tree.values()))}

    table.add("a leaf", "dirs", edit("_METADATA", ("tree_metadata",), leaf_again), codes=REFUSED)
    table.add("a leaf, joined", "dirs", _dotted("params.params", "decoder.norm.scale"), codes=frozenset({0, 3, 4}))
    table.add("a header", "hf", both(_tensor("a"), _copy_entry), codes=REFUSED)
    table.add("a tensor in two shards", "hf", _copy_shard, codes=REFUSED)


def _dotted(*keys: str) -> Change:
    """A leaf whose keys have dots in them."""
    return edit("_METADATA", ("tree_metadata", LEAF, "key_metadata"), [{"key": key, "key_type": 2} for key in keys])


def _copy_entry(box: Sandbox) -> None:
    file = place(box, "model-00001-of-00002.safetensors")
    header, data = header_of(file)
    raw = json.dumps(header)
    name = next(name for name in header if name != "__metadata__")
    raw = (raw[:-1] + "," + json.dumps(name) + ":" + json.dumps(header[name]) + "}").encode()
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def _copy_shard(box: Sandbox) -> None:
    shutil.copy(place(box, "model-00001-of-00002.safetensors"), place(box, "model-00003-of-00003.safetensors"))
    index = place(box, INDEX)
    tree = json.loads(index.read_text())
    tree["weight_map"]["again"] = "model-00003-of-00003.safetensors"
    index.write_text(json.dumps(tree))
