"""One conversion from end to end: open, describe, plan, execute, commit."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from convert.commit import manifest
from convert.commit.processes import ALONE, Processes
from convert.commit.stage import check_output, staging
from convert.commit.store import mark_of
from convert.engine.budget import make_budget
from convert.engine.writer import Writer
from convert.errors import InputError, UsageError
from convert.planning.choices import Choices
from convert.planning.cross_plan import make_cross_plan
from convert.planning.planner import Action, Plan, make_plan
from convert.progress import Progress, ignore
from convert.report import Report
from layouts.checkpoint import open_checkpoint
from layouts.dequantize import RULE, dequantized
from layouts.places import is_remote, place
from layouts.reader import Reader, is_chunked


@dataclass(frozen=True, slots=True)
class Options:
    """What does not change the tensors, only how they are written, and by which processes. Sizes in bytes."""

    jobs: int | None
    memory: int
    max_shard_size: int
    resume: bool
    overwrite: bool
    processes: Processes = ALONE


def open_and_plan(source: str | Path, out: str | Path, action: Action, choices: Choices) -> tuple[Reader, Plan]:
    """Open a checkpoint and plan its conversion; the caller closes the reader.

    Raises:
        UsageError: choices that do not go together, or with this checkpoint.
        InputError, PlanError: see `convert.errors`.
    """
    choices.check()
    reader = open_checkpoint(source)
    try:
        if choices.dequantize:
            reader = dequantized(reader)
        if is_chunked(reader):
            from layouts.orbax.state import with_optimizer

            reader = with_optimizer(reader, drop=choices.drop_optimizer)
        if choices.to is not None and choices.to != reader.format:
            plan = make_cross_plan(reader, place(out), action, choices)
        elif action == "convert":
            raise UsageError(f"{source} is {reader.format} already; --to is for the other format")
        else:
            plan = make_plan(reader, place(out), action, choices)
        return reader, replace(plan, computed=RULE if choices.dequantize else None)
    except BaseException:
        reader.close()
        raise


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    action: Action,
    options: Options,
    progress: Progress | None,
    choices: Choices,
) -> Report:
    """Plan and write; see `convert.prefuse` for what it raises."""
    with options.processes.together():
        return _convert(source, out, action, options, options.processes.watched(progress or ignore), choices)


def _convert(
    source: str | Path, out: str | Path, action: Action, options: Options, progress: Progress, choices: Choices
) -> Report:
    started = time.monotonic()
    origin, target = place(source), place(out)  # once, because a store is listed for it
    if not (finished := (target / manifest.NAME).exists()):
        check_output(origin, target, overwrite=options.overwrite)
    reader, plan = open_and_plan(origin, target, action, choices)
    with closing(reader):
        if finished and not options.overwrite and _is_done(target, plan, options):
            return Report(plan=plan, seconds=time.monotonic() - started, resumed=len(plan.targets), written=False)
        check_output(origin, target, overwrite=options.overwrite)
        return write_plan(plan, reader, options, progress, started)


def write_plan(plan: Plan, reader: Reader, options: Options, progress: Progress, started: float) -> Report:
    """Execute a plan into a staging directory and publish it."""
    processes = options.processes
    writer = writer_of(plan, reader, options)
    mark = _mark(plan, options)
    with staging(plan.out, mark, resume=options.resume, overwrite=options.overwrite, processes=processes) as stage:
        resumed = len(stage.done)
        notes = writer.write(stage, progress, processes)
        if _mark(plan, options) != mark:
            raise InputError(f"{plan.source}: the input has changed while it was read; run again once it is at rest")
    seconds, process = time.monotonic() - started, (processes.index, processes.count)
    return Report(plan=plan, seconds=seconds, resumed=resumed, notes=notes, process=process)


def _is_done(out: Path, plan: Plan, options: Options) -> bool:
    """Whether what is there is what this plan makes."""
    return mark_of(out) == _mark(plan, options) if is_remote(out) else manifest.is_of(plan)


def _mark(plan: Plan, options: Options) -> str:
    return manifest.fingerprint(plan, {"max_shard_size": options.max_shard_size})


def writer_of(plan: Plan, reader: Reader, options: Options) -> Writer:
    """The one place that chooses how an output is written; TensorStore is imported only if it is needed.

    Raises:
        UsageError: it cannot be done within `options.memory`, or not in this place.
    """
    held = options.processes.held
    memory, jobs = options.memory - held, options.jobs
    if plan.format == "orbax":
        from convert.orbax.write import OrbaxWriter

        return OrbaxWriter.make(plan, reader, memory, jobs)
    if is_remote(plan.out):
        raise UsageError(f"{plan.out}: safetensors are written to disks only; write them there and copy them")
    from convert.hf.write import HFWriter

    if is_chunked(reader):
        from convert.orbax.budget import reading_budget

        budget = reading_budget(memory, jobs, plan, reader)
    else:
        budget = make_budget(memory, jobs, len(reader.tensors) + len(plan.targets))
    return HFWriter(plan=plan, reader=reader, budget=budget, max_shard_size=options.max_shard_size)
