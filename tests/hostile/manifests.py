"""The manifest of a checkpoint, and the journal of a staging directory."""

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from tests.hostile.configs import TEXTS
from tests.hostile.variants import (
    DIGESTS,
    DOCUMENTED,
    ESCAPED,
    FEW,
    FORGED,
    GONE,
    PREFUSE,
    SPLIT,
    Pointer,
    Sandbox,
    Table,
    both,
    edit,
    rare,
    text,
    wrong,
)

MANIFEST, JOURNAL = "convert_manifest.json", "@stage/.convert_journal"
TENSORS = {
    "hf-fused": "model.norm.weight",
    "ocdbt-fused": "params.params.decoder.decoder_norm.scale",
    "dirs-fused": "params.params.decoder.norm.scale",
}
WORDS: tuple[Pointer, ...] = (
    (),
    ("version",),
    ("format",),
    ("hashed",),
    ("tensors",),
    ("tensors", "*"),
    ("tensors", "*", "dtype"),
    ("tensors", "*", "shape"),
    ("tensors", "*", "xxh3_128"),
    ("sources",),
    ("sources", "*"),
    ("original",),
    ("original", "headers"),
    ("original", "texts"),
)
DIGEST = {
    "of another length": "00",
    "in capitals": lambda old: old.upper(),
    "of a million digits": "0" * 10**6,
    "of no spans": {},
    "of a span in reverse": {"9:0": "00"},
    "of a span below zero": {"-5:4": "00"},
    "of a span beyond": {"0:999999999999": "00"},
    "of a span of 5,000 digits": {f"0:{'9' * 5000}": "00"},
    "of a span that is none": {"x": "00", f"{ESCAPED}\n{FORGED}": "00"},
    "of spans that overlap": {"0:8": "00", "4:16": "00"},
    "of 100,000 spans": {f"{i}:{i + 1}": "00" for i in range(100_000)},
    "of spans that hold lists": {"0:16": []},
}
ORIGINAL = {
    "a config that is no JSON": ("texts", {"config.json": "{"}),
    "a config that is deep": ("texts", {"config.json": "[" * 200_000}),
    "an index that is deep": ("texts", {"model.safetensors.index.json": "[" * 200_000}),
    "an index that is a list": ("texts", {"model.safetensors.index.json": "[]"}),
    "an index that is other text": ("texts", {"model.safetensors.index.json": '{"weight_map": {}}'}),
    "texts of other files": ("texts", {"../../../x.a/kept": "written", "/x.a": "written"}),
    "no headers": ("headers", {}),
    "a header that is deep": ("headers", lambda old: dict.fromkeys(old, "[" * 200000)),
    "a header that is a list": ("headers", lambda old: dict.fromkeys(old, "[]")),
    "headers with surrogates": ("headers", lambda old: {name: head + " \ud800" for name, head in old.items()}),
    "headers with a space before": ("headers", lambda old: {name: " " + head for name, head in old.items()}),
    "headers with spaces behind": ("headers", lambda old: {name: head + " " * 100_000 for name, head in old.items()}),
    "headers of metadata that is none": ("headers", lambda old: {n: h.replace('"pt"', "7") for n, h in old.items()}),
    "20,000 headers more": ("headers", lambda old: old | {f"x{i}.safetensors": "{}" for i in range(20_000)}),
}
LINES: dict[str, bytes | Callable[[bytes], bytes]] = {
    "nothing": b"",
    "garbage": bytes(range(256)),
    "half a line": lambda raw: raw[: len(raw) // 2],
    "a line that is a list": lambda raw: raw + b"[]\n",
    "a line that is a number": lambda raw: raw + b"7\n",
    "a line that is null": lambda raw: raw + b"null\n",
    "a line that is a text": lambda raw: raw + b'"inode"\n',
    "a first line that is a list": lambda raw: b"[]\n" + raw,
    "a first line that is null": lambda raw: b"null\n" + raw,
    "a line that is deep": lambda raw: raw + b"[" * 200_000 + b"\n",
    "a first line that is deep": lambda raw: b"[" * 200_000 + b"\n" + raw,
    "a line of a number of 5,000 digits": lambda raw: raw + b"9" * 5000 + b"\n",
    "a line that is no text": lambda raw: raw + b'{"\xff": "a"}\n',
    "the first line again": lambda raw: raw + raw.splitlines(keepends=True)[0],
    "digests that are lists": lambda raw: _digests(raw, []),
    "digests that are null": lambda raw: _digests(raw, None),
    "digests that are numbers": lambda raw: _digests(raw, 7),
    "digests that are objects": lambda raw: _digests(raw, {"a": [1]}),
    "digests of surrogates": lambda raw: _digests(raw, "\ud800"),
    "digests of other text": lambda raw: _digests(raw, f"{ESCAPED}\n{FORGED}"),
    "names that lead away": lambda raw: raw + b'{"../../../x.a": "00", "/x.a": "00"}\n',
    "names that force lines": lambda raw: raw + json.dumps({f"{ESCAPED}\n{FORGED}": "00"}).encode() + b"\n",
    "an inode that is a text": lambda raw: b'{"inode": "x"}\n' + raw,
    "an inode of 4,000 digits": lambda raw: b'{"inode": ' + b"9" * 4000 + b"}\n" + raw,
    "a hundred thousand lines": lambda raw: raw + b'{"a": "00"}\n' * 100_000,
}


def _digests(raw: bytes, value: Any) -> bytes:
    first, *rest = raw.splitlines()
    lines = [json.dumps(dict.fromkeys(json.loads(line), value)).encode() for line in rest]
    return b"\n".join([first, *lines, b""])


def _pointed(pointer: Pointer, base: str) -> Pointer:
    return tuple(TENSORS[base] if key == "*" else key for key in pointer)


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    manifests, journals = Table("manifest", []), Table("journal", [])
    for pointer in WORDS:
        where = ".".join(map(str, pointer)) or "all"
        for name, value in wrong():
            change = edit(MANIFEST, _pointed(pointer, "hf-fused"), value)
            manifests.add(f"{where} is {name}", "hf-fused", change, SPLIT, DIGESTS, slow=rare(name))
        for name, value in wrong(FEW):
            change = edit(MANIFEST, _pointed(pointer, "ocdbt-fused"), value) if "original" not in pointer else None
            if change:
                manifests.add(f"{where} is {name}", "ocdbt-fused", change, DIGESTS, slow=rare(name))
            done = both(_made_before, edit("@work/out/" + MANIFEST, _pointed(pointer, "hf-fused"), value))
            manifests.add(f"of the output, {where} is {name}", "hf", done, PREFUSE, codes=DOCUMENTED - {1}, slow=rare(name))
        if pointer:
            gone = edit(MANIFEST, _pointed(pointer, "hf-fused"), GONE)
            manifests.add(f"{where} is gone", "hf-fused", gone, SPLIT, DIGESTS)
    for name, digest in DIGEST.items():
        for base, tensor in TENSORS.items():
            manifests.add(f"a digest {name}", base, edit(MANIFEST, ("tensors", tensor, "xxh3_128"), digest), DIGESTS)
    for name, (part, value) in ORIGINAL.items():
        manifests.add(name, "hf-fused", edit(MANIFEST, ("original", part), value))
        manifests.add(name, "maxtext-fused", edit(MANIFEST, ("original", part), value), "--split --to hf {in} {out}")
    for name, content in TEXTS.items():
        manifests.add(f"holds {name}", "hf-fused", text(MANIFEST, content), SPLIT, DIGESTS)
        manifests.add(f"of the output, holds {name}", "hf", both(_made_before, text("@work/out/" + MANIFEST, content)), PREFUSE)
    for base in ("hf-staged", "ocdbt-staged", "dirs-staged"):
        for name, lines in LINES.items():
            journals.add(name, base, text(JOURNAL, lines), PREFUSE, codes=DOCUMENTED - {1})
            if base != "dirs-staged":
                journals.add(f"{name}, of a helper", base, text(f"{JOURNAL}-3", _alone(lines)), PREFUSE)
    yield from (manifests, journals)


def _alone(lines: bytes | Callable[[bytes], bytes]) -> bytes:
    """What the journal of a helper would hold: no first line."""
    return lines if isinstance(lines, bytes) else lines(b'{"inode": 1}\n{"a": "00"}\n')


def _made_before(box: Sandbox) -> None:
    """An output that is there already."""
    shutil.copytree(box.base.parent / "hf-fused" / "in", box.work / "out", symlinks=True)
