"""`--prefuse`, `--split`, `--merge` and `--to`, and what `--dry-run` says of them.

In: parsed arguments. Out: an `Answer`. Nothing here prints or exits.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import convert
from convert.actions.answer import Answer, processes_of, shown, two_paths
from convert.answers.envelope import envelope
from convert.arguments import options
from convert.errors import StorageError, UsageError, readable
from convert.options import Choices, Running
from convert.options.option import complete, named
from convert.progress import watching


def convert_with(arguments: argparse.Namespace, action: str) -> Answer:
    """Write a checkpoint, or say what would be written."""
    given = options(arguments, f"--{action}")
    source, out = two_paths(arguments.paths)
    if action == "merge" and "base" not in given:
        raise UsageError("--merge ADAPTER OUT needs the checkpoint that the adapter is for: --base CKPT")
    if arguments.dry_run:
        return _dry_run(arguments, source, out, given)
    call: Callable[..., Any] = getattr(convert, "reformat" if action == "to" else action)
    processes = processes_of(arguments)
    with watching(shown(arguments, processes)) as progress:  # the plan says how much there is to do
        report = call(source, out, processes=processes, progress=progress, **given)
    result = report.to_dict() if arguments.json else None
    return Answer(text=str(report), document=envelope(action, 0, result))


def _dry_run(arguments: argparse.Namespace, source: str, out: str, given: Mapping[str, Any]) -> Answer:
    from convert.commit.processes import Processes
    from convert.planning.planner import Plan
    from convert.report import describe_division, describe_plan
    from convert.run import writer_of
    from layouts.checkpoint import open_checkpoint

    choices = {each.name for each in named(Choices)}
    chosen = {name: value for name, value in given.items() if name in choices}
    planned = convert.plan(source, out, prefuse=arguments.prefuse, split=arguments.split, merge=arguments.merge, **chosen)
    found = {"plan": planned.to_dict(), "peak_bytes": None, "workers": None, "free_bytes": _room(planned)}
    if not isinstance(planned, Plan):
        from convert.adapters.report import describe_plan as describe_adapter

        return Answer(text=describe_adapter(planned), document=envelope("dry-run", 0, found))
    processes = Processes(count=arguments.num_processes or 1)
    with readable(source), closing(open_checkpoint(planned.source)) as reader:
        writer = writer_of(planned, reader, complete(Running, given), processes)
        pieces = writer.pieces()
    peak, jobs = writer.budget.peak + processes.held, writer.budget.jobs
    text = describe_plan(planned, peak, jobs)
    if arguments.num_processes:
        text += f"\n{describe_division(pieces, arguments.num_processes)}"
    return Answer(text=text, document=envelope("dry-run", 0, found | {"peak_bytes": peak, "workers": jobs}))


def _room(plan: Any) -> int | None:
    """Bytes that are free where the output will be; nobody knows in a store.

    Raises:
        StorageError: they are too few, so that the run would stop at its beginning.
    """
    from layouts.disk.places import is_remote

    if is_remote(plan.out):
        return None
    there = next(folder for folder in Path(os.path.abspath(plan.out)).parents if folder.is_dir())
    disk = os.statvfs(there)
    left = disk.f_bavail * disk.f_frsize
    needed = plan.nbytes + getattr(plan, "side_bytes", 0)
    if getattr(plan, "format", None) != "orbax" and needed > left:  # chunks are compressed: nobody knows how far
        raise StorageError(f"{there}: the disk is too small: {needed:,} bytes are needed, {left:,} are free")
    return left
