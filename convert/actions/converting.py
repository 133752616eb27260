"""`--prefuse`, `--split`, `--merge` and `--to`, and what `--dry-run` says of them.

In: parsed arguments. Out: an `Answer`. Nothing here prints or exits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import convert
from convert.actions.answer import Answer, processes_of, shown, two_paths
from convert.answers.envelope import ahead_json, envelope
from convert.arguments import options
from convert.errors import UsageError, one_line, readable
from convert.options import Choices, Running
from convert.options.option import complete, named
from convert.progress import watching

if TYPE_CHECKING:
    from convert.adapters.plan import AdapterPlan
    from convert.commit.processes import Processes
    from convert.planning.planner import Action, Plan
    from layouts.reader import Reader

_ACTIONS: Mapping[str, Action] = {"prefuse": "prefuse", "split": "split", "merge": "merge", "to": "convert"}
"""What a plan calls that which the option asks for."""


def convert_with(arguments: argparse.Namespace, action: str) -> Answer:
    """Write a checkpoint, or say what would be written."""
    given = options(arguments, f"--{action}")
    source, out = two_paths(arguments.paths)
    if action == "merge" and "base" not in given:
        raise UsageError("--merge ADAPTER OUT needs the checkpoint that the adapter is for: --base CKPT")
    if arguments.dry_run:
        return _dry_run(arguments, _ACTIONS[action], source, out, given)
    call: Callable[..., Any] = getattr(convert, "reformat" if action == "to" else action)
    processes = processes_of(arguments)
    with watching(shown(arguments, processes)) as progress:  # the plan says how much there is to do
        report = call(source, out, processes=processes, progress=progress, **given)
    from convert.answers.after import next_steps

    steps = next_steps(report, given)
    result = {**report.to_dict(), **steps} if arguments.json else None
    told = [one_line(f"{word:<6} {step}") for word, step in steps.items() if step and report.written]
    return Answer(text="\n".join([str(report), *told]), document=envelope(action, 0, result))


def _dry_run(arguments: argparse.Namespace, action: Action, source: str, out: str, given: Mapping[str, Any]) -> Answer:
    """What a conversion would do, or the error that it would end with, as far as no tensor is read for that."""
    from convert.commit.processes import Processes
    from convert.commit.publish import check_output, destination, stands
    from convert.conversions import opened_plan
    from convert.engine.outlook import outlook
    from convert.planning.planner import Plan
    from layouts.disk.places import place

    choices = complete(Choices, {each.name: given[each.name] for each in named(Choices) if each.name in given})
    running, processes = complete(Running, given), Processes(count=arguments.num_processes or 1)
    origin, where = place(source), destination(out)
    finished = stands(origin, where, overwrite=running.overwrite)
    reader, planned = opened_plan(origin, where, action, choices)
    with readable(source), closing(reader):
        if not finished:
            check_output(planned.source, where, overwrite=running.overwrite)
        if isinstance(planned, Plan):
            text, found, division = _rehearsed(planned, reader, choices, running, processes, finished)
        else:
            text, found, division = _rehearsed_adapter(planned, reader, running, finished), {}, ""
        ahead = outlook(planned, reader)
        if not finished:
            ahead.check()
    text += f"\ndisk: {ahead}{division}"
    if finished:
        text += (
            f"\n{where} is there, and what can be seen without reading tensors is as planned; the run compares the tensors, too"
        )
    document = {"plan": planned.to_dict(), "peak_bytes": None, "workers": None, **ahead_json(ahead), **found}
    return Answer(text=text, document=envelope("dry-run", 0, document))


def _rehearsed(
    plan: Plan, reader: Reader, choices: Choices, running: Running, processes: Processes, finished: bool
) -> tuple[str, dict[str, int], str]:
    from convert.content import check_content
    from convert.engine.done import look
    from convert.report import describe_division, describe_plan
    from convert.run import writer_of

    if running.content:
        check_content(plan, choices)
    writer = writer_of(plan, reader, running, processes)
    pieces = writer.pieces()  # which plans the files
    if finished:
        look(plan, reader, writer, content=running.content)
    peak, jobs = writer.budget.peak + processes.held, writer.budget.jobs
    division = f"\n{describe_division(pieces, processes.count)}" if processes.count > 1 else ""
    return describe_plan(plan, peak, jobs), {"peak_bytes": peak, "workers": jobs}, division


def _rehearsed_adapter(plan: AdapterPlan, reader: Reader, running: Running, finished: bool) -> str:
    from convert.adapters.again import look
    from convert.adapters.report import describe_plan
    from convert.adapters.write import check_memory

    check_memory(plan, running)
    if finished:
        look(plan, reader)
    return describe_plan(plan)
