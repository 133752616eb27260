"""One conversion from end to end: open, describe, plan, execute, commit.

In: two paths and options. Out: a report, and the output on the disk. Formats are told apart in `writer_of`, and nowhere else.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from convert.card import explained
from convert.commit import manifest
from convert.commit.identity import State, fingerprint, state_of
from convert.commit.processes import Processes
from convert.commit.publish import check_characters, check_output, destination, stands
from convert.commit.stage import staging
from convert.commit.store import forget_notes
from convert.content import check_content
from convert.engine.budget import Budget, make_budget
from convert.engine.done import prove
from convert.engine.outlook import outlook
from convert.engine.twins import check_exact, compare_twins, with_computed
from convert.engine.writer import Writer, Written
from convert.errors import InputError, UsageError, readable
from convert.options import Choices, Running, Verification
from convert.options.option import workers
from convert.planning.across.computed import kept_bytes
from convert.planning.across.rooted import rooted
from convert.planning.choices import check, check_formats
from convert.planning.planner import Action, Plan, make_plan
from convert.progress import Progress, announce, begin, ignore
from convert.report import Report
from layouts.checkpoint import FORMATS, growing, open_checkpoint
from layouts.dequantize import RULE, dequantized
from layouts.disk.places import is_remote, place
from layouts.matching.scales import Scales, notes
from layouts.reader import Reader, ReadLimits, held_by, is_chunked, remarks_of
from layouts.tensors import total_bytes
from layouts.windows import Windows


def open_and_plan(source: str | Path, out: str | Path, action: Action, choices: Choices) -> tuple[Reader, Plan]:
    """Open a checkpoint and plan its conversion; the caller closes the reader.

    Raises:
        UsageError: choices that do not go together, or with this checkpoint.
        InputError, PlanError: see `convert.errors`.
    """
    if action == "merge":
        from convert.adapters.merge import open_and_merge

        return open_and_merge(source, place(out), choices)
    check(choices)
    with readable(source), growing():
        return _open_and_plan(source, out, action, choices)


def _open_and_plan(source: str | Path, out: str | Path, action: Action, choices: Choices) -> tuple[Reader, Plan]:
    reader = _opened(source, out)
    try:
        if choices.dequantize:
            reader = plain = dequantized(reader)
            kinds = plain.computed
        if is_chunked(reader):
            from layouts.orbax.state import check_items, with_optimizer

            if not choices.params_only:
                reader = with_optimizer(reader, drop=choices.drop_optimizer)
            if not (choices.drop_optimizer or choices.params_only or choices.copy_all):
                check_items(reader)
        if choices.to is not None and choices.to != reader.format:
            from convert.planning.across.plan import make_cross_plan

            reader = rooted(reader)
            plan = make_cross_plan(reader, place(out), action, choices)
        elif between := "--drop-mtp" if choices.drop_mtp else "--compute" if choices.compute else "":
            raise UsageError(f"{source} is {reader.format} already; {between} is for conversions between formats (--to)")
        elif action == "convert":
            raise UsageError(f"{source} is {reader.format} already; --to is for the other format")
        else:
            plan = make_plan(reader, place(out), action, choices)
        check_formats(choices, reader.format, plan.format)
        plan = _cut_for(plan, choices)
        told = (*plan.remarks, *remarks_of(reader), *_scales(plan, reader))
        plan, reader = with_computed(replace(plan, remarks=told), reader)
        if choices.dequantize:
            rule = f"{RULE}; {plan.computed}" if plan.computed else RULE
            plan = replace(plan, computed=rule, exact=False, computed_kinds=(*kinds, *plan.computed_kinds))
        return reader, plan
    except BaseException:
        reader.close()
        raise


def _opened(source: str | Path, out: str | Path) -> Reader:
    """The input; who has given the two in the wrong order is told so."""
    try:
        return open_checkpoint(source)
    except InputError as error:
        if is_remote(source) or os.path.lexists(source) or not os.path.lexists(out):
            raise
        raise InputError(f"{error}. But {out} is there: the input comes first, then the output") from error


def _cut_for(plan: Plan, choices: Choices) -> Plan:
    """With the devices that will restore it."""
    asked = next((f"--{name}" for name in ("mesh", "sharding") if getattr(choices, name)), None)
    if asked and not FORMATS[plan.format].chunked:
        raise UsageError(f"{plan.source}: {asked} is for an Orbax output, whose chunks it cuts; this one is {plan.format}")
    if choices.sharding is None:
        return replace(plan, mesh=choices.mesh)
    from convert.orbax.origin import read_shardings

    mesh, shardings = read_shardings(choices.sharding)
    return replace(plan, mesh=mesh, shardings=shardings)


def _scales(plan: Plan, reader: Reader) -> tuple[str, ...]:
    """What is to be told of scales that gate and up have one of each, where the two become one tensor."""
    if plan.action != "prefuse":
        return ()
    wi = (target for target in plan.targets if target.role == "wi" and target.part)
    return notes(reader, (
        Scales(part=t.part, dims=t.dims, dtype=t.spec.dtype, placed=t.source, index=t.index, sizes=t.source_sizes) for t in wi
    ))  # fmt: skip


def convert_checkpoint(
    source: str | Path,
    out: str | Path,
    action: Action,
    choices: Choices,
    running: Running,
    processes: Processes,
    progress: Progress | None,
) -> Report:
    """Plan and write; see `convert.prefuse` for what it raises."""
    started = time.monotonic()
    with processes.together():
        origin, target = place(source), destination(out, makes=processes.first)
        finished = stands(origin, target, overwrite=running.overwrite, makes=processes.first)
        reader, plan = open_and_plan(origin, target, action, choices)
        hashed = total_bytes(reader.tensors) if running.content and processes.first else 0
        begin(progress or ignore, "", hashed + (plan.nbytes + kept_bytes(plan)) // processes.count)
        told = processes.watched(progress or ignore)
        with closing(reader):
            if not finished:
                announce(progress or ignore, lambda: str(outlook(plan, reader)))
            if running.content and processes.first:
                plan = _with_content(plan, reader, choices, running, told)
            plan = explained(plan, reader.format, choices, running)
            if finished:
                proof = prove(plan, reader, writer_of(plan, reader, running, processes), processes, told)
                forget_notes(target)
                plan, seconds = replace(plan, content=proof.content), time.monotonic() - started
                return Report(plan=plan, seconds=seconds, resumed=len(plan.targets), proof=proof.said)
            check_output(plan.source, target, overwrite=running.overwrite, makes=processes.first)
            resumed, (said, content) = _write(plan, reader, running, processes, told)
            plan = replace(plan, content=content)
    seconds, process = time.monotonic() - started, (processes.index, processes.count)
    return Report(plan=plan, seconds=seconds, resumed=resumed, notes=said, process=process)


def _with_content(plan: Plan, reader: Reader, choices: Choices, running: Running, progress: Progress) -> Plan:
    """With the digest of what the input holds; of a tree, without the state that is left out."""
    from convert.verifier.content.sides import contents

    check_content(plan, choices)
    options = Verification(
        family=choices.family, source_layout=choices.source_layout, scan_axis=choices.scan_axis, memory=running.memory
    )
    (found,) = contents(reader, options=options, progress=progress)
    reader.hold(ReadLimits(), Windows())
    return replace(plan, content=replace(found, state=None if plan.left_out else found.state).to_dict())


def _write(plan: Plan, reader: Reader, running: Running, processes: Processes, progress: Progress) -> tuple[int, Written]:
    """Execute a plan into a staging directory and publish it; how many tensors were there, and what came of it."""
    with readable(plan.source):
        compare_twins(plan.twins, reader)
        check_exact(plan, reader)
    writer = writer_of(plan, reader, running, processes)
    state = _state(plan)
    mark = fingerprint(plan, {"max_shard_size": running.max_shard_size}, state)
    with staging(plan.out, mark, resume=running.resume, overwrite=running.overwrite, processes=processes) as stage:
        written = writer.write(stage, progress, processes)
        resumed = writer.finished(stage.done) if stage.done else 0  # a writer that begins anew has thrown them away
        if _state(plan).content != state.content:  # a new hard link changes ctime, and nothing that was read
            raise InputError(f"{plan.source}: the input has changed while it was read; run again once it is at rest")
    return resumed, written


def _state(plan: Plan) -> State:
    """The state of all that is read."""
    found = state_of(plan.source, plan.never_copied)
    if plan.merging is None:
        return found
    other = state_of(plan.merging.adapter)
    return State(found.content + other.content, found.system + other.system)


def writer_of(plan: Plan, reader: Reader, running: Running, processes: Processes, like: Reader | None = None) -> Writer:
    """The one place that chooses how an output is written; TensorStore is imported only if it is needed.

    It is stored as `like` is, if that is given; else as what is read was, or once was.

    Raises:
        UsageError: it cannot be done within `running.memory`, or not in this place.
    """
    with readable(plan.source):
        return _writer_of(plan, reader, running.memory - processes.held, running, like)


def _writer_of(plan: Plan, reader: Reader, memory: int, running: Running, like: Reader | None) -> Writer:
    jobs = running.jobs
    if FORMATS[plan.format].chunked:
        from convert.hf.originals import keep_originals
        from convert.orbax.write import OrbaxWriter

        if running.max_shard_size != Running().max_shard_size:
            raise UsageError(f"--max-shard-size is for safetensors, and {plan.out} will be Orbax")
        check_characters(plan.out)
        return OrbaxWriter.make(plan, reader, memory, jobs, partial(keep_originals, plan, reader), like)
    from convert.hf.write import HFWriter

    original = manifest.files_as_they_are(like) if like else None
    return HFWriter.make(plan, reader, partial(_budget, plan, reader, memory, jobs), running.max_shard_size, original)


def _budget(plan: Plan, reader: Reader, memory: int, jobs: int | None, base: int, each: int) -> Budget:
    """What `memory` allows where `base` bytes, and `each` by worker, are held besides."""
    if is_chunked(reader):
        from convert.orbax.budget import reading_budget

        found = reading_budget(memory - base - workers(jobs) * each, jobs, plan, reader)
        return replace(found, base=found.base + base, each=each)
    if plan.merging:
        base, each = base + plan.merging.base, each + plan.merging.each
    return make_budget(memory, jobs, len(reader.tensors) + len(plan.targets), base=base, each=each + held_by(reader))
