"""The record of the layout: what we wrote into `config.json` or `custom_metadata`, and somebody else has rewritten since."""

from collections.abc import Iterator

from tests.hostile.variants import (
    CANARY,
    COMPARE,
    ESCAPED,
    FEW,
    FORGED,
    GONE,
    REFUSED,
    SPLIT,
    Change,
    Pointer,
    Table,
    both,
    edit,
    rare,
    wrong,
)

PLACES = {
    "hf-fused": ("config.json", ("moe_layout",)),
    "ocdbt-fused": ("@item/_METADATA", ("custom_metadata", "moe_layout")),
    "dirs-fused": ("@item/_METADATA", ("custom_metadata", "moe_layout")),
    "maxtext-fused": ("@item/_METADATA", ("custom_metadata", "moe_layout")),
}
"""Where the record is, by base."""
REST = {"hf-fused": ".{l}.{e}.{part}"}
"""What has to follow in the key of a native `wi`, so that it is a complete one."""
PATHS = {
    "an absolute path": f"{CANARY}/x.{{g:a,b}}",
    "an absolute path before the path": f"{CANARY}/{{path}}.{{g:a,b}}",
    "the parent": "../x.{g:a,b}",
    "the second parent": "../../x.{g:a,b}",
    "the third parent": "../../../x.{g:a,b}",
    "the fourth parent": "../../../../x.{g:a,b}",
    "the parent behind the path": "{path}/../../x.{g:a,b}",
    "parents behind the path": "{path}/../../../../x.{g:a,b}",
    "a choice of paths": "{g:../x.a,../x.b}",
    "a choice of absolute paths": f"{{g:{CANARY}/x.a,{CANARY}/x.b}}",
    "a choice of dots": "{g:.,..}",
    "a choice of dots behind the path": "{path}/{g:.,..}",
    "a link": "{path}/../link/x.{g:a,b}",
    "a backslash": "..\\..\\x.{g:a,b}",
    "a scheme": f"file://{CANARY}/x.{{g:a,b}}",
    "a store": "s3://bucket/x.{g:a,b}",
    "a home": "~/x.{g:a,b}",
}
"""Keys that lead away, if they are taken for paths."""
NAMES = {
    "empty parts": "{path}..wi_{g:a,b}",
    "empty folders": "{path}//x.{g:a,b}",
    "a slash at its end": "{path}.{g:a,b}/",
    "a dot before it": ".{path}.{g:a,b}",
    "dots alone": "{g:...,....}",
    "NUL": "{path}\0.{g:a,b}",
    "an escape": f"{{path}}.{ESCAPED}{{g:a,b}}",
    "a line break": f"{{path}}\n{FORGED}.{{g:a,b}}",
    "a carriage return": "{path}\r.{g:a,b}",
    "DEL": "{path}\x7f.{g:a,b}",
    "a C1 control": "{path}\x9b31m.{g:a,b}",
    "a turn of direction": "{path}\u202e.{g:a,b}",
    "a surrogate": "{path}\ud800.{g:a,b}",
    "300 characters": "{path}" + "y" * 300 + ".{g:a,b}",
    "100,000 characters": "{path}" + "y" * 100_000 + ".{g:a,b}",
    "the name of metadata": "{path}/zarr.json{g:a,b}",
    "the name of a database": "manifest.ocdbt{g:a,b}",
    "the names of processes": "ocdbt.process_{g:0,1}",
    "another tensor's name": "params.params.decoder.{g:norm,decoder_norm}.scale",
    "a box": "{path}.wi_{g:a,b}.value",
    "a mark of the part": "{path}.wi_{g:a,b}.weight",
    "a choice of one": "{path}.{g:a}",
    "a choice of the same": "{path}.{g:a,a}",
    "a choice of nothing": "{path}.{g:,}",
    "a slot twice": "{path}.{g:a,b}.{g:a,b}",
    "a slot of no axis": "{path}.{g:a,b}.{z}",
    "an open slot": "{path}.{g:a,b",
    "slots within slots": "{path}.{g:{g:a,b},b}",
    "slots without end": "{path}.{g:a,b}" + "{e}" * 2000,
    "a choice of 10,000": "{path}.{g:" + ",".join(map(str, range(10_000))) + "}",
    "a factor of 5,000 digits": "{path}.{g:a,b}.{l*" + "9" * 5000 + "+p}",
    "a factor of 18 digits": "{path}.{g:a,b}.{l*" + "9" * 18 + "+p}",
    "no slot at all": "x",
    "nothing": "",
}
"""Keys that are odd as names."""
PATTERNS = {
    "e reversed": "-e ... k n",
    "k reversed": "e ... -k n",
    "n reversed": "e ... k -n",
    "all reversed": "-e ... -k -n",
    "scan axes reversed": "e -... k n",
    "another order": "n k ... e",
    "no scan": "e k n",
    "two scans": "e ... k ... n",
    "an axis twice": "e ... k n n",
    "an axis that is none": "e ... k n z",
    "fused": "e ... k (g n)",
    "padded": "e ... k n%128",
    "padded to much": "e ... k n%999999999999",
    "padded to 5,000 digits": "e ... k n%" + "9" * 5000,
    "padded as MaxText does": "e ... k (s=7 n%maxtext)",
    "sized": "e ... k n=8",
    "sized to nothing": "e ... k n=0",
    "sized to much": "e ... (k=999999999999) n",
    "shards without end": "e ... k (s=999999999999 n)",
    "brackets in brackets": "e ... ((k) n)",
    "an open bracket": "e ... (k n",
    "an open bracket before 40 letters": "e ... k (" + "a" * 40,
    "an open bracket before 40 words": "e ... k (" + "a " * 40,
    "100,000 axes": "e ... k n " + " ".join(f"a{i}" for i in range(100_000)),
    "an open bracket before 100,000 spaces": "e ... k (n" + " " * 100_000,
    "a control": f"e ... k n{ESCAPED}",
    "nothing": "",
    "spaces": " ",
}
POINTERS: tuple[Pointer, ...] = (
    (),
    ("layout",),
    ("version",),
    ("family",),
    ("wi",),
    ("wo",),
    ("wi", "key"),
    ("wi", "pattern"),
    ("wi", "native"),
    ("wi", "native", 0),
    ("wi", "native", 0, "key"),
    ("wi", "native", 0, "pattern"),
    ("wi", "native_of"),
    ("stored",),
)
ADDED = {
    "a native for a tensor that is not there": (("wi", "native_of"), {"nothing": 0}),
    "a native beyond the list": (("wi", "native_of"), {"a": 7}),
    "a native before the list": (("wi", "native_of"), {"a": -1}),
    "a native of 5,000 digits": (("wi", "native_of"), {"a": "9" * 5000}),
    "what is stored, without a pattern": (("stored",), {"wi.": {"dims": "out in"}}),
    "what is stored, in no dimensions": (("stored",), {"wi.": {"pattern": "e ... k (g n)", "dims": ESCAPED}}),
    "what is stored, padded to nothing": (("stored",), {"wi.": {"pattern": "e k n", "dims": "", "unpadded": {"n": 0}}}),
    "what is stored, padded below zero": (("stored",), {"wi.": {"pattern": "e k n%8", "dims": "", "unpadded": {"n": -3}}}),
    "what is stored, of huge size": (("stored",), {"wi.": {"pattern": "e k n%8", "dims": "", "unpadded": {"n": 10**30}}}),
    "what is stored, in reverse": (("stored",), {"wi.": {"pattern": "-e ... k (g n)", "dims": "out in", "unpadded": {}}}),
    "what is stored for 20,000 tensors": (("stored",), {f"t{i}": {"pattern": "e", "dims": ""} for i in range(20_000)}),
    "20,000 natives": (("wi", "native"), lambda old: old * 20_000),
    "another family": (("family",), "mixtral"),
    "a family of the other format": (("family",), "maxtext"),
    "a family that stacks layers first": (("family",), "maxtext_scan0"),
    "another layout": (("layout",), "interleaved"),
    "a later version": (("version",), 2),
    "a version as text": (("version",), "1"),
}


def _record(base: str, pointer: Pointer, value: object) -> Change:
    file, record = PLACES[base]
    return edit(file, (*record, *pointer), value)


def _with_link(change: Change) -> Change:
    def linked(box):
        (box.work / "link").symlink_to(box.canary)
        return change(box)

    return linked


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    keys, types, rest = Table("native key", []), Table("record of the wrong type", []), Table("record", [])
    for name, key in (PATHS | NAMES).items():
        for base in ("hf-fused", "ocdbt-fused", "dirs-fused"):
            whole = key + REST.get(base, "{part:scale}" if base == "dirs-fused" or name in PATHS else "")
            keys.add(
                name,
                base,
                _with_link(_record(base, ("wi", "native", 0, "key"), whole)),
                slow=len(key) > 90_000,
                always=base == "dirs-fused" and name in PATHS,
            )
    for name, key in PATHS.items():
        down = key.replace("{g:a,b}", "a").replace("{g:", "").split(",")[0].rstrip("}")
        keys.add(f"{name}, of wo", "dirs-fused", _record("dirs-fused", ("wo", "native", 0, "key"), down))
        keys.add(f"{name}, of wi as it is", "dirs-fused", _record("dirs-fused", ("wi", "key"), down))
        laid = both(_record("dirs-fused", ("wi", "native", 0, "key"), key), _with_link(lambda box: None))
        keys.add(f"{name}, laid again", "dirs-fused", laid, "--prefuse --layout interleaved {in} {out}", COMPARE)
    for pointer in POINTERS:
        where = ".".join(map(str, pointer)) or "all"
        for name, value in wrong():
            types.add(f"{where} is {name}", "hf-fused", _record("hf-fused", pointer, value), slow=rare(name))
        for name, value in wrong(FEW):
            types.add(
                f"{where} is {name}", "ocdbt-fused", _record("ocdbt-fused", pointer, value), SPLIT, COMPARE, slow=rare(name)
            )
        if pointer:
            types.add(f"{where} is gone", "ocdbt-fused", _record("ocdbt-fused", pointer, GONE), SPLIT)
    for name, pattern in PATTERNS.items():
        inside = {"hf-fused": pattern.replace("e ... ", "").replace("... ", ""), "ocdbt-fused": pattern}
        for base, native in inside.items():
            rest.add(f"native pattern, {name}", base, _record(base, ("wi", "native", 0, "pattern"), native))
        rest.add(f"pattern, {name}", "ocdbt-fused", _record("ocdbt-fused", ("wi", "pattern"), pattern.replace("n", "(g n)")))
    for name, (pointer, value) in ADDED.items():
        for base in ("hf-fused", "ocdbt-fused"):
            rest.add(name, base, _record(base, pointer, value), SPLIT, COMPARE)
    _elsewhere(rest)
    yield from (keys, types, rest)


def _elsewhere(rest: Table) -> None:
    """Records in other places than the one that is read, and in formats that they are not of."""
    other = {"layout": "interleaved", "version": 1, "family": "qwen3_moe"}
    for name, value in (*wrong(FEW), ("another layout", other)):
        rest.add(
            f"the manifest's is {name}",
            "hf-fused",
            edit("convert_manifest.json", ("record",), value),
            SPLIT,
            COMPARE,
            slow=rare(name),
        )
        rest.add(
            f"the manifest's is {name}", "maxtext-fused", edit("convert_manifest.json", ("record",), value), slow=rare(name)
        )
        rest.add(f"unfused, and it is {name}", "hf", edit("config.json", ("moe_layout",), value), slow=rare(name))
    for base, (file, record) in PLACES.items():
        rest.add("none, though it is fused", base, edit(file, record, GONE), codes=REFUSED)
        rest.add("custom metadata is a list", base, edit(file, record[:1], [{}]), codes=REFUSED)
    rest.add("custom metadata is a text", "ocdbt", edit("@item/_METADATA", ("custom_metadata",), ESCAPED))
    rest.add("custom metadata is huge", "ocdbt", edit("@item/_METADATA", ("custom_metadata",), {"a": ["b" * 1000] * 20_000}))
