"""Write the output of an adapter's plan, or see that it is there already: block by block, one in memory at a time.

In: a plan and the open input. Out: a published directory, or a proof. What is written and how it becomes durable is
`convert.commit`'s; it never writes elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.adapters.again import made_of, prove
from convert.adapters.plan import AdapterPlan, make_plan
from convert.adapters.report import AdapterReport
from convert.adapters.stream import digests
from convert.card import command, write_card
from convert.commit import manifest
from convert.commit.files import write_all
from convert.commit.identity import State, input_digest, state_of
from convert.commit.inventory import check_copied, inventory
from convert.commit.processes import Processes
from convert.commit.publish import check_output, stands
from convert.commit.stage import Stage, staging
from convert.engine.outlook import outlook
from convert.errors import InputError, UsageError, readable
from convert.hf.look import look
from convert.options import Choices, Running
from convert.progress import Progress, announce, begin, ignore
from convert.version import TOOL
from layouts.adapters.forms import FORMS
from layouts.adapters.opening import MODEL, open_adapter
from layouts.adapters.settings import CONFIG
from layouts.card import CARD
from layouts.disk.files import read_bytes
from layouts.disk.places import is_remote
from layouts.hf import HFReader

_USUAL = Choices()
_ALLOWED = frozenset({"layout", "family", "from_writer", "base", "copy_all"})


def open_and_plan(source: Path, out: Path, action: str, choices: Choices) -> tuple[HFReader, AdapterPlan]:
    """Open an adapter and plan its conversion; the caller closes the reader.

    Raises:
        UsageError: an option that adapters do not have.
        InputError, PlanError: see `convert.adapters.plan`.
    """
    for name in Choices.__dataclass_fields__.keys() - _ALLOWED:
        if getattr(choices, name) != getattr(_USUAL, name):
            raise UsageError(f"--{name.replace('_', '-')} is for checkpoints, and {source} is an adapter")
    with readable(source):
        reader = open_adapter(source)
        try:
            return reader, make_plan(reader, out, action, choices)
        except BaseException:
            reader.close()
            raise


def convert_adapter(
    source: Path,
    out: Path,
    action: str,
    choices: Choices,
    running: Running,
    processes: Processes,
    progress: Progress | None,
) -> AdapterReport:
    """Plan and write; see `convert.prefuse` for what it raises."""
    started = time.monotonic()
    if processes.count > 1:
        raise UsageError(f"{source} is an adapter, which one process converts; call it without others")
    if is_remote(out):
        raise UsageError(f"{out}: an adapter is written to a disk; write it there and copy it")
    finished = stands(source, out, overwrite=running.overwrite)
    reader, plan = open_and_plan(source, out, action, choices)
    begin(progress or ignore, "", plan.nbytes)
    with closing(reader), readable(source):
        check_memory(plan, running)
        if finished:
            return AdapterReport(plan=plan, seconds=time.monotonic() - started, proof=prove(plan, reader, progress or ignore))
        check_output(source, out, overwrite=running.overwrite)
        announce(progress or ignore, lambda: str(outlook(plan, reader)))
        plan = replace(plan, card=_card(plan, choices, running))
        state = state_of(source, plan.never_copied)
        mark = _mark(plan, state)
        with staging(out, mark, resume=running.resume, overwrite=running.overwrite) as stage:
            assert isinstance(stage, Stage)
            done = _kept(plan, stage)
            notes = _write(plan, reader, stage, dict(done), progress or ignore)
            if state_of(source, plan.never_copied).content != state.content:
                raise InputError(f"{source}: the input has changed while it was read; run again once it is at rest")
    return AdapterReport(plan=plan, seconds=time.monotonic() - started, resumed=len(done), notes=notes)


def check_memory(plan: AdapterPlan, running: Running) -> None:
    """See that a block of experts has room.

    Raises:
        UsageError: it has not.
    """
    if plan.peak > running.memory:
        raise UsageError(f"{plan.source}: a block of experts takes {plan.peak:,} bytes; raise --memory above that")


def _card(plan: AdapterPlan, choices: Choices, running: Running) -> str:
    """What the card of a fused adapter says; a split one is as it was."""
    if plan.action != "prefuse":
        return ""
    return f"""## How the adapters of experts are stored here

LoRA `A` and `B` of gate and up are one pair each, in form `{plan.layout}`: {FORMS[plan.layout].text}.

Made by moe-convert {TOOL}; OUT is this adapter, and IN what it was made of:

    {command(plan.action, choices, running)}

- To get gate and up apart again, as they were before: `convert --split OUT BACK`; this section goes, too.
- To check it: `convert --verify OUT` compares the digests in its manifest; `convert --verify IN OUT` what it adds to weights.
"""


def _mark(plan: AdapterPlan, state: State) -> str:
    """Sixteen hex digits that tell this conversion from another."""
    said = (TOOL, "adapter", plan.action, plan.layout, plan.record, sorted(plan.texts.items()), *state)
    digest = hashlib.sha256(repr(said).encode())
    digest.update(plan.file.head)
    digest.update(repr(sorted(plan.side_files)).encode())
    return digest.hexdigest()[:16]


def _kept(plan: AdapterPlan, stage: Stage) -> dict[str, str]:
    """The digests of tensors that an earlier run finished, if their file is still there, whole."""
    found = stage.folder.stat(plan.file.name)
    if found is None or found.st_size != plan.file.size:
        return {}
    return {name: stage.done[name] for name in plan.specs if name in stage.done}


def _write(plan: AdapterPlan, reader: HFReader, stage: Stage, done: dict[str, str], progress: Progress) -> tuple[str, ...]:
    file = plan.file
    stage.folder.reserve(file.name, file.size, head=file.head)
    descriptor = stage.folder.open(file.name, os.O_RDWR)
    try:
        for found in digests(
            plan, reader, done, lambda name, at, data: write_all(descriptor, data, file.offsets[name] + at), progress
        ):
            os.fsync(descriptor)
            stage.record(found)
            done |= found
    finally:
        os.close(descriptor)
    for name, text in plan.texts.items():
        stage.folder.write_text(name, text)
    for name in plan.side_files:
        if name != CARD:
            stage.folder.copy_in(plan.source / name, name)
    notes = write_card(plan, reader, stage.folder)
    stage.folder.write_text(manifest.NAME, _manifest(plan, reader, done, stage))
    look(stage.folder, [file])
    return notes


def _manifest(plan: AdapterPlan, reader: HFReader, hashed: Mapping[str, str], stage: Stage) -> str:
    """As that of a checkpoint, so that `--verify OUT` re-checks it."""
    files = inventory(stage.path, manifest.NAME, MODEL.__eq__)
    check_copied(stage.path, plan.side_files, files)
    content: dict[str, Any] = {
        "version": manifest.VERSION,
        "tool": TOOL,
        **made_of(plan),
        "input": input_digest(reader),
        "remarks": list(plan.remarks),
        "tensors": manifest.entries([*plan.specs.values()], hashed),
        "files": {name: each.json() for name, each in files.items()},
        "headers": {plan.file.name: manifest.hashed_text(plan.file.head[8:].decode())},
    }
    original = None
    if not plan.restored:
        ours = manifest.Original(headers=reader.headers, texts={CONFIG: read_bytes(plan.source / CONFIG).decode()})
        earlier = plan.record is not None and plan.record["from"] != plan.way.source.name  # this was not the first step
        original = (manifest.original_files(plan.source) if earlier else None) or ours
    return manifest.sealed(content, original)
