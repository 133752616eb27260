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
from convert.commit.recorded import load
from convert.errors import InputError, OutputError
from convert.progress import Progress
from layouts.adapters.opening import MODEL, open_adapter
from layouts.card import CARD, alike
from layouts.hf import HFReader


def made_of(plan: AdapterPlan) -> dict[str, Any]:
    """What the manifest of this plan says in `MADE`."""
    words = (plan.action, "adapter", plan.family, plan.layout, plan.record)
    return dict.fromkeys(manifest.MADE) | dict(zip(manifest.MADE, words, strict=False))


def prove(plan: AdapterPlan, reader: HFReader, progress: Progress) -> str:
    """Say what was looked at: all tensors are made again, and every file is compared.

    Raises:
        OutputError: something is not as this plan makes it from this input.
    """
    for why in _unlike(plan, reader, progress):
        raise OutputError(f"{plan.out} exists already and {why}; remove it, choose another output, or pass --overwrite")
    return (
        f"{plan.out} has been made by this plan from this input: {len(plan.specs)} tensors were made again and "
        "compared with those there; nothing to do"
    )


def _unlike(plan: AdapterPlan, reader: HFReader, progress: Progress) -> Iterator[str]:
    try:
        found = load(plan.out)
    except InputError as error:
        yield f"was not made by this plan ({error})"
        return
    if found is None or found.made != json.loads(json.dumps(made_of(plan))) or found.tensors.keys() != plan.specs.keys():
        yield "was not made by this plan"
    elif found.input != input_digest(reader) or found.headers != {MODEL: manifest.hashed_text(plan.file.head[8:].decode())}:
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
