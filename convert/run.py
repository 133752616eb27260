"""One conversion from end to end: open, describe, plan, execute, commit."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from convert.commit import manifest
from convert.commit.processes import ALONE, Processes
from convert.commit.stage import AnyStage, Stage, check_output, staging
from convert.commit.store import mark_of
from convert.engine.blocks import SLAB
from convert.engine.budget import Budget, make_budget
from convert.errors import InputError, UsageError
from convert.planning.choices import Choices
from convert.planning.cross_plan import make_cross_plan
from convert.planning.planner import Action, Plan, make_plan
from convert.progress import Progress, ignore
from convert.report import Report
from layouts.checkpoint import Reader, open_checkpoint
from layouts.dequantize import RULE, dequantized
from layouts.places import is_remote, place

if TYPE_CHECKING:
    from convert.orbax.budget import OrbaxBudget


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
        if reader.format == "orbax":
            reader = _with_optimizer(reader, choices.drop_optimizer)
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


def _with_optimizer(reader: Reader, drop: bool) -> Reader:
    """The checkpoint with the state of its optimizer, if that can be fused with the weights, or on demand without."""
    from layouts.orbax.reader import OrbaxReader
    from layouts.orbax.state import check_optimizer, drop_optimizer

    if isinstance(reader, OrbaxReader):
        reader = drop_optimizer(reader) if drop else reader
        check_optimizer(reader)
    return reader


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
        if is_remote(target) and plan.format == "hf":
            raise UsageError(f"{out}: safetensors are written to disks only; write them there and copy them")
        return write_plan(plan, reader, options, progress, started)


def write_plan(plan: Plan, reader: Reader, options: Options, progress: Progress, started: float) -> Report:
    """Execute a plan into a staging directory and publish it."""
    processes = options.processes
    budget = budget_of(plan, reader, options.memory, options.jobs, processes.held)
    mark = _mark(plan, options)
    with staging(plan.out, mark, resume=options.resume, overwrite=options.overwrite, processes=processes) as stage:
        resumed = len(stage.done)
        notes = _write(plan, reader, stage, budget, progress, options)
        if _mark(plan, options) != mark:
            raise InputError(f"{plan.source}: the input has changed while it was read; run again once it is at rest")
    seconds, process = time.monotonic() - started, (processes.index, processes.count)
    return Report(plan=plan, seconds=seconds, resumed=resumed, notes=notes, process=process)


def _is_done(out: Path, plan: Plan, options: Options) -> bool:
    """Whether what is there is what this plan makes."""
    return mark_of(out) == _mark(plan, options) if is_remote(out) else manifest.is_of(plan)


def _mark(plan: Plan, options: Options) -> str:
    return manifest.fingerprint(plan, {"max_shard_size": options.max_shard_size})


def budget_of(plan: Plan, reader: Reader, memory: int, jobs: int | None, held: int = 0) -> Budget | OrbaxBudget:
    """The settings that keep a conversion within `memory` bytes, by what is read and written; `held` are taken already.

    Raises:
        UsageError: nothing does.
    """
    budget = _budget(plan, reader, memory - held, jobs)
    return replace(budget, base=budget.base + held) if isinstance(budget, Budget) else replace(budget, peak=budget.peak + held)


def _budget(plan: Plan, reader: Reader, memory: int, jobs: int | None) -> Budget | OrbaxBudget:
    if plan.format == "hf" and reader.format == "hf":
        return make_budget(memory, jobs, len(reader.tensors) + len(plan.targets))
    from convert.orbax.budget import orbax_budget
    from layouts.orbax.malloc import keep_below
    from layouts.orbax.reader import OrbaxReader

    found = orbax_budget(memory, jobs, plan, reader)
    if plan.format == "hf" and isinstance(reader, OrbaxReader):
        keep_below(found.mapped)
        reader.limits, reader.windows = found.limits, found.windows
        return Budget(jobs=found.jobs, strip=found.box, base=found.peak - found.jobs * (found.box + SLAB))
    return found


def pieces_of(plan: Plan, reader: Reader, budget: Budget | OrbaxBudget, max_shard_size: int) -> list[tuple[str, int]]:
    """What processes share, each piece written by one of them: files or batches of arrays, with their bytes."""
    if isinstance(budget, Budget):
        from convert.hf.write import plan_files

        return [(file.name, file.size) for file in plan_files(plan, reader, max_shard_size)]
    from convert.orbax.portions import total
    from convert.orbax.write import batches_of

    return [(batch[0].key, total(batch)) for batch in batches_of(plan, reader, budget)]


def _write(
    plan: Plan, reader: Reader, stage: AnyStage, budget: Budget | OrbaxBudget, progress: Progress, options: Options
) -> tuple[str, ...]:
    """The one place that tells the formats apart when writing; TensorStore is imported only if it is needed."""
    from convert.hf import write as hf

    if isinstance(budget, Budget) and isinstance(stage, Stage):
        limit = options.max_shard_size
        return hf.write(plan, reader, stage, budget, progress, max_shard_size=limit, processes=options.processes)
    from convert.orbax import write as orbax

    assert not isinstance(budget, Budget)
    original = hf.original_of(plan, reader)
    orbax.write(plan, reader, stage, budget, progress, original, options.processes)
    return ()
