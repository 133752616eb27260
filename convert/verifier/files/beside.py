"""What stands beside the tensors: `config.json`, side files, `__metadata__` of shards, what Orbax keeps of a step, our record.

In: two open checkpoints. Out: level `files`. It never looks at tensors, and opens only what the readers have listed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from convert.commit.inventory import entry_of, read_card, read_in_pieces
from convert.commit.recorded import Load, load
from convert.verifier.files.leaves import compare_leaves, leaves_of
from convert.verifier.files.sealed import beside_manifest
from convert.verifier.verdict import Level
from layouts.card import CARD, strip
from layouts.card import alike as same_card
from layouts.disk.files import CONFIG, MANIFEST, RECORD, read_object
from layouts.hf.header import metadata_of
from layouts.orbax.tree import COMMITTED, STEP
from layouts.reader import Reader
from layouts.side_files import ORIGINALS
from layouts.tables.families import families_of
from layouts.tables.targets import TARGETS, target

_TIMES = ("init_timestamp_nsecs", "commit_timestamp_nsecs", "performance_metrics")
"""What Orbax says of how a step was saved, not of what was."""
_LONG = 80


def _names(reader: Reader) -> tuple[set[str], set[str]]:
    """The files that are compared by digests, and those that are only where both sides have them: other weights."""
    files = reader.side_files
    made = {name for name in files.plain if name in (CONFIG, MANIFEST) or PurePosixPath(name).name in (STEP, COMMITTED)}
    return files.plain.keys() - made - {CARD}, set(files.weights)


def compare_files(one: Reader, other: Reader, stacked: bool | None = None, manifest_of: Load = load) -> Level:
    """Compare all that a conversion hands on beside the tensors.

    Two formats need not have the same files: there what only one side has is named, and no difference. `stacked` says whether
    the layers of a MaxText tree are, where its tensors have told; `manifest_of` gives the manifest in a directory.

    Raises:
        InputError: a file is damaged.
    """
    alike = one.format == other.format
    (left, first), (right, second) = _names(one), _names(other)
    files = (left & right) | (first & second)
    lonely = [
        f"{name} is only in {(one if name in left else other).path}"
        for name in sorted(left ^ right)
        if alike or name != ORIGINALS
    ]
    differences = [*_configs(one, other, alike), *_changed(one, other, sorted(files)), *(lonely if alike else ())]
    differences += _cards(one, other, alike)
    differences += [
        *_metadata(one, other),
        *_orbax(one, other, alike, stacked),
        *compare_leaves(one, other),
        *_words(one),
        *_words(other),
    ]
    differences += [line for reader in (one, other) for line in beside_manifest(reader, manifest_of)]
    keys = len(_plain(one.config).keys() | _plain(other.config).keys())
    shards = len(one.headers) + len(other.headers)
    leaves = leaves_of(one) + leaves_of(other)
    beside = "" if alike or not lonely else f"; not compared: {', '.join(lonely)}"
    count = len(files) + all(CARD in reader.side_files.plain for reader in (one, other))
    covered = f"{keys} keys of config.json, {count} side files by their digests, __metadata__ of {shards} shards"
    covered += f", kinds of {leaves} leaves" if leaves else ""
    none = not (left or right or keys or shards or leaves)
    return Level(
        name="files",
        covered=f"{covered}, records{beside}",
        compared=count + keys + shards + leaves,
        differences=tuple(differences),
        not_run="there are none" if none else "",
        asked=not none,
    )


def compare_adapter_files(one: Reader, other: Reader, own: Collection[str]) -> Level:
    """The same of two adapters, but for files of their `own`, which say how they are stored and are compared elsewhere.

    Raises:
        InputError: a file is damaged.
    """
    left, right = (reader.side_files.plain.keys() - {MANIFEST, CARD, *own} for reader in (one, other))
    shards, both = len(one.headers) + len(other.headers), sorted(left & right)
    differences = [f"{name} is only in {(one if name in left else other).path}" for name in sorted(left ^ right)]
    differences += [*_changed(one, other, both), *_cards(one, other, alike=True), *_metadata(one, other)]
    differences += [line for reader in (one, other) for line in beside_manifest(reader, load)]
    covered = f"{len(both)} side files by their digests, the model card, __metadata__ of {shards} files, manifests"
    return Level(name="files", covered=covered, compared=len(both) + shards, differences=tuple(differences))


def _plain(found: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Each value by its keys, `rope_scaling.factor`, without our record."""
    flat: dict[str, Any] = {}
    for key, value in found.items():
        if at or key != RECORD:
            flat |= _plain(value, f"{at}{key}.") if isinstance(value, Mapping) and value else {f"{at}{key}": value}
    return flat


def _unequal(what: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    one, other = _plain(a), _plain(b)
    for key in sorted(one.keys() | other.keys()):
        values = [json.dumps(side[key], ensure_ascii=False) if key in side else "absent" for side in (one, other)]
        if values[0] != values[1]:
            first, second = (text if len(text) <= _LONG else f"{text[:_LONG]}..." for text in values)
            yield f"{what}: {key} is {first} in one, {second} in the other"


def _configs(one: Reader, other: Reader, alike: bool) -> Iterator[str]:
    if bool(one.config) == bool(other.config):
        yield from _unequal(CONFIG, one.config, other.config)
    elif alike and {*one.config, *other.config} != {RECORD}:  # where the input has none, ours holds nothing but the record
        yield f"{CONFIG} is only in {(one if one.config else other).path}"


def _changed(one: Reader, other: Reader, names: list[str]) -> Iterator[str]:
    for name in names:
        if len({entry_of(read_in_pieces(reader.path / name)) for reader in (one, other)}) > 1:
            yield f"{name} differs"


def _cards(one: Reader, other: Reader, alike: bool) -> list[str]:
    """Model cards but for a section of ours, which a conversion puts in and takes out."""
    sides = {reader.path: read_card(reader.path / CARD) for reader in (one, other)}
    if same_card(*(sides[reader.path] for reader in (one, other))):
        return []
    have = [path for path, card in sides.items() if strip(card) is not None]
    if len(have) == len(sides):
        return [f"{CARD} differs"]
    return [f"{CARD} is only in {have[0]}"] if alike else []


def _metadata(one: Reader, other: Reader) -> Iterator[str]:
    """Shards of the same names one by one; else the first ones, since each of ours says what the input's first one says."""
    sides = [_of_shards(reader) for reader in (one, other)]
    if not all(sides):
        return
    if sides[0].keys() == sides[1].keys() and not (one.record or other.record):
        for name, found in sides[0].items():
            yield from _unequal(f"__metadata__ of {name}", found, sides[1][name])
        return
    first, second = (next(iter(side.values())) for side in sides)
    yield from _unequal("__metadata__", first, second)
    for reader, side in zip((one, other), sides, strict=True):
        for name, found in side.items() if reader.record else ():
            yield from _unequal(
                f"__metadata__ of {name} in {reader.path} and of its first shard", found, next(iter(side.values()))
            )


def _of_shards(reader: Reader) -> dict[str, dict[str, Any]]:
    """What each shard says beside our record; `pt` is what all loaders take it for."""
    return {name: {"format": "pt"} | dict(metadata_of(header)) for name, header in sorted(reader.headers.items())}


def _orbax(one: Reader, other: Reader, alike: bool, stacked: bool | None) -> Iterator[str]:
    steps = [_step(reader) for reader in (one, other)]
    if alike:
        yield from _unequal(STEP, *steps)
        yield from _unequal("custom_metadata of the item", *map(_custom, (one, other)))
        return
    for step in steps:
        said = (step.get("custom_metadata") or {}).get("scan_layers")
        if said is not None and stacked is not None and said is not stacked:
            yield f"{STEP}: scan_layers is {json.dumps(said)}, but the tree's layers are {'' if stacked else 'not '}stacked"


def _step(reader: Reader) -> dict[str, Any]:
    """What Orbax keeps of a step."""
    name = next((name for name in reader.side_files.plain if PurePosixPath(name).name == STEP), None)
    found = read_object(reader.path / name) if name else {}
    return {key: value for key, value in found.items() if key not in _TIMES}


def _custom(reader: Reader) -> dict[str, Any]:
    """What its user gave Orbax to keep with the item."""
    found = getattr(reader, "custom_metadata", None)
    return found if isinstance(found, dict) else {"": found} if found else {}


def _words(reader: Reader) -> Iterator[str]:
    """Whether the word for the layout in our record is that of the layout which it describes."""
    record = reader.record or {}
    word, name = record.get("layout"), record.get("family")
    family = next((family for family in families_of(reader.format) if family.name == name), None)
    if word is None or family is None:
        return
    known = target(word, family, shards=1, align=None) if word in TARGETS else None
    for role, layout in (known or {}).items():
        if _axes(str(record[role]["pattern"])) != _axes(layout.pattern):
            yield f"{reader.path}: the record calls its layout {word!r}, but {role} is stored as {record[role]['pattern']!r}"
    if known is None:
        yield f"{reader.path}: the record calls its layout {word!r}, and no layout is called so"


def _axes(pattern: str) -> list[str]:
    """The axes of a pattern in their order, without sizes, padding and stacked layers."""
    words = (word.partition("=")[0].partition("%")[0] for word in pattern.replace("(", "( ").replace(")", " )").split())
    return [word for word in words if word != "..." and not word.startswith("l")]
