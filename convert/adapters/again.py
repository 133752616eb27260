"""Whether an output is what an adapter's plan makes of its input: a proof, or an error that says what is not so.

In: a plan and the open input. Out: a sentence that says what was looked at. It never writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import xxhash

from convert.adapters.plan import AdapterPlan
from convert.adapters.stream import digests, parts
from convert.commit import manifest
from convert.commit.identity import input_digest
from convert.commit.inventory import differences, entry_of, read_card, read_in_pieces
from convert.commit.recorded import Manifest, load
from convert.errors import InputError, OutputError
from convert.progress import Progress
from layouts.adapters.opening import MODEL, open_adapter
from layouts.card import CARD, alike
from layouts.hf import HFReader
from layouts.reader import Reader


def made_of(plan: AdapterPlan) -> dict[str, Any]:
    """What the manifest of this plan says in `MADE`."""
    words = (plan.action, "adapter", plan.family, plan.layout, plan.record)
    return dict.fromkeys(manifest.MADE) | dict(zip(manifest.MADE, words, strict=False))


def prove(plan: AdapterPlan, reader: HFReader, progress: Progress) -> str:
    """Say what was looked at: all tensors are made again, and every file is compared.

    Raises:
        OutputError: something is not as this plan makes it from this input.
    """
    found = look(plan, reader)
    for why in _changed(plan, reader, found, progress):
        raise _refused(plan, why)
    return (
        f"{plan.out} has been made by this plan from this input: {len(plan.specs)} tensors were made again and "
        "compared with those there; nothing to do"
    )


def look(plan: AdapterPlan, reader: Reader) -> Manifest:
    """See what can be seen without reading a tensor, as `--dry-run` does.

    Raises:
        OutputError: something is not as this plan makes it from this input.
    """
    try:
        found = load(plan.out)
    except InputError as error:
        raise _refused(plan, f"was not made by this plan ({error})") from None
    if found is None or found.made != json.loads(json.dumps(made_of(plan))) or found.tensors.keys() != plan.specs.keys():
        raise _refused(plan, "was not made by this plan")
    for why in _unlike(plan, reader, found):
        raise _refused(plan, why)
    return found


def _refused(plan: AdapterPlan, why: str) -> OutputError:
    return OutputError(f"{plan.out} exists already and {why}; remove it, choose another output, or pass --overwrite")


def _unlike(plan: AdapterPlan, reader: Reader, found: Manifest) -> Iterator[str]:
    if found.input != input_digest(reader) or found.headers != {MODEL: manifest.hashed_text(plan.file.head[8:].decode())}:
        yield "was made from another input"
    else:
        for difference in differences(plan.out, manifest.NAME, found.files):
            yield f"is not what was written: {difference}"
        for name in plan.side_files:
            if name != CARD and (name not in found.files or found.files[name] != entry_of(read_in_pieces(plan.source / name))):
                yield f"was made from another input: {name} differs"
        if not alike(*(read_card(place / CARD) for place in (plan.source, plan.out))):
            yield f"was made from another input: {CARD} differs"
        for name, text in plan.texts.items():
            if found.files.get(name) != entry_of(iter([text.encode()])):
                yield f"was made from another input: {name} differs"


def _changed(plan: AdapterPlan, reader: HFReader, found: Manifest, progress: Progress) -> Iterator[str]:
    with closing(open_adapter(plan.out)) as there:
        for made in digests(plan, reader, {}, lambda *_: None, progress):
            for name, digest in made.items():
                if found.tensors[name].digest != digest:
                    yield f"was made from another input: {name} differs"
                if _stored(there, name) != digest:
                    yield f"is not what was written: {name} differs"
    if not found.intact:
        yield f"is not what was written: {manifest.NAME} has been changed since"


def _stored(reader: HFReader, name: str) -> str:
    digest = xxhash.xxh3_128()
    for _, _, block in parts(name, name, reader):
        digest.update(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
