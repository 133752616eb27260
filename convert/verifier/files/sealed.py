"""The manifest itself, and what it says of headers and of our record: level `manifest`, and of two a part of `files`.

In: an open checkpoint and its manifest. Out: a level. It never looks at data, but at what is kept beside that of a tree.

The manifest holds the digest of the rest of itself. It cannot stand in the record: that is in the headers of shards and in
`config.json`, whose digests are in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator

from convert.commit.manifest import NAME, hashed_text
from convert.commit.recorded import Load, Manifest
from convert.errors import InputError
from convert.options import Verification
from convert.verifier.files.digests import originals
from convert.verifier.verdict import Level
from layouts.checkpoint import FORMATS
from layouts.reader import Reader


def compare_manifest(reader: Reader, found: Manifest) -> Level:
    """Whether the manifest, the headers of shards and the records of the layout are what was written together."""
    return Level(
        name="manifest",
        covered=f"{NAME} by its own digest, {len(found.headers)} headers by theirs, the record of the layout everywhere",
        compared=1 + len(found.headers),
        differences=(*_itself(found), *_headers(reader, found), *_records(reader, found)),
    )


_WITHOUT = ("0.1.0",)
"""Versions of this tool whose manifests have no digest of themselves."""


def beside_manifest(reader: Reader, manifest_of: Load) -> Iterator[str]:
    """The same of one of two that are compared, if it has a manifest that says so much; nothing of it is believed."""
    try:
        found = manifest_of(reader.path)
    except InputError as error:
        yield str(error)
        return
    if found and (found.intact is not None or found.tool not in _WITHOUT):
        _, damaged = originals(reader, found, Verification()) or (0, ())
        lines = (*compare_manifest(reader, found).differences, *damaged)
        yield from (f"{reader.path}: {line}" for line in lines)


def _itself(found: Manifest) -> Iterator[str]:
    if found.intact is None:
        yield f"{NAME} has no digest of itself: an earlier version wrote it, or somebody changed it; convert again to have one"
    elif not found.intact:
        yield f"{NAME} is not what was written"


def _headers(reader: Reader, found: Manifest) -> Iterator[str]:
    for name in sorted(found.headers.keys() ^ reader.headers.keys()):
        yield f"the header of {name} is only in {NAME if name in found.headers else 'the checkpoint'}"
    for name in sorted(found.headers.keys() & reader.headers.keys()):
        if hashed_text(reader.headers[name]) != found.headers[name]:
            yield f"the header of {name} is not what was written"


def _records(reader: Reader, found: Manifest) -> Iterator[str]:
    wanted = found.made.get("record") or {}
    for place, record in {FORMATS[reader.format].record: reader.record, **reader.records}.items():
        if (record or {}) != wanted:
            yield f"the record of the layout in {place} is {'not that of ' + NAME if record else 'missing'}"
    if "layout" in wanted and wanted["layout"] != found.made.get("layout"):
        yield f"{NAME} calls the layout {found.made.get('layout')!r}, and its record {wanted['layout']!r}"
