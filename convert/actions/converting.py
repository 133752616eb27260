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
    from convert.planning.planner import Action

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
    from convert.commit.processes import Processes
    from convert.commit.publish import check_output, is_finished
    from convert.conversions import opened_plan
    from convert.engine.outlook import outlook
    from convert.planning.planner import Plan
    from convert.report import describe_division, describe_plan
    from convert.run import writer_of

    choices = {each.name for each in named(Choices)}
    chosen = {name: value for name, value in given.items() if name in choices}
    reader, planned = opened_plan(source, out, action, complete(Choices, chosen))
    with readable(source), closing(reader):
        if given.get("overwrite") or not is_finished(planned.out):
            check_output(planned.source, planned.out, overwrite=bool(given.get("overwrite")))
        ahead = outlook(planned, reader)
        ahead.check()
        found = {"plan": planned.to_dict(), "peak_bytes": None, "workers": None, **ahead_json(ahead)}
        if not isinstance(planned, Plan):
            from convert.adapters.report import describe_plan as describe_adapter

            text = f"{describe_adapter(planned)}\ndisk: {ahead}"
            return Answer(text=text, document=envelope("dry-run", 0, found))
        processes = Processes(count=arguments.num_processes or 1)
        writer = writer_of(planned, reader, complete(Running, given), processes)
        pieces = writer.pieces()
    peak, jobs = writer.budget.peak + processes.held, writer.budget.jobs
    text = f"{describe_plan(planned, peak, jobs)}\ndisk: {ahead}"
    if arguments.num_processes:
        text += f"\n{describe_division(pieces, arguments.num_processes)}"
    return Answer(text=text, document=envelope("dry-run", 0, found | {"peak_bytes": peak, "workers": jobs}))
