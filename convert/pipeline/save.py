"""Write a tree as the checkpoint that it was loaded from: its names, its files, its config, leaf by leaf from the devices.

In: a tree, the plan by which it was loaded. Out: a checkpoint, published as any other output. It never changes `like`.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert.commit.identity import fingerprint, state_of
from convert.commit.processes import ALONE
from convert.commit.publish import check_output
from convert.commit.stage import staging
from convert.errors import InputError, UsageError, readable
from convert.options import Running
from convert.pipeline.back import TreeReader, checked, reversed_plan
from convert.pipeline.computed import with_values
from convert.pipeline.request import Request
from convert.planning.across.computed import kept_bytes
from convert.progress import Progress, begin
from convert.report import Report
from convert.run import writer_of
from layouts.reader import Reader


def write(params: Any, asked: Request, like: Reader, out: Path, running: Running, progress: Progress) -> Report:
    """Write the tree; see `convert.save` for what it raises."""
    started = time.monotonic()
    check_output(like.path, out, overwrite=running.overwrite)
    with readable(like.path):
        leaves = checked(asked, params)
        plan = reversed_plan(asked.plan, like, out)
        tree = TreeReader(inner=like, leaves=leaves, tensors={target.spec.name: target.spec for target in asked.plan.targets})
        plan, reader, held = with_values(plan, asked.plan, tree, like)
    begin(progress, "saving", plan.nbytes + kept_bytes(plan))
    try:
        writer = writer_of(plan, reader, replace(running, memory=running.memory - held), ALONE, like)
    except UsageError as error:
        raise UsageError(f"{error}; computed values take {held >> 20} MiB of what was given") if held else error from None
    state = state_of(like.path, plan.never_copied)
    # Another tree may have been saved there before, and nothing tells the two apart: nothing is resumed.
    with staging(out, fingerprint(plan, {}, state), resume=False, overwrite=running.overwrite) as stage:
        notes = writer.write(stage, progress, ALONE).notes
        if state_of(like.path, plan.never_copied).content != state.content:
            raise InputError(f"{like.path}: it has changed while it was read; run again once it is at rest")
    return Report(plan=plan, seconds=time.monotonic() - started, resumed=0, notes=notes)
