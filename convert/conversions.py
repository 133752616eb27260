"""The library calls that convert checkpoints; `import convert` has them.

In: two paths and options (`convert.options`). Out: a plan or a report. Nothing here prints or exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from convert.errors import UsageError
from convert.options import Choices, Format, Running
from convert.options.calls import documented
from convert.options.keywords import Merging, Planning, Prefusing, Reformatting, Splitting
from convert.options.option import complete

if TYPE_CHECKING:
    from convert.adapters.plan import AdapterPlan
    from convert.adapters.report import AdapterReport
    from convert.commit.processes import Processes
    from convert.planning.planner import Action, Plan
    from convert.progress import Progress
    from convert.report import Report
    from layouts.reader import Reader


@documented(Planning)
def plan(
    source: str | Path,
    out: str | Path,
    *,
    prefuse: bool = False,
    split: bool = False,
    merge: bool = False,
    **options: Unpack[Planning],
) -> Plan | AdapterPlan:
    """Plan a conversion from names and shapes alone, writing nothing; `Plan.nbytes` is the size of the output's tensors.

    Raises:
        UsageError: not exactly one of `prefuse`, `split` and `merge`, or none and no `to`; or as `prefuse`.
        InputError: the checkpoint is missing, corrupt or not complete.
        PlanError: no lossless plan exists.
    """
    if prefuse + split + merge > 1 or not (prefuse or split or merge or options.get("to")):
        raise UsageError("give exactly one of prefuse=True, split=True and merge=True, or only the format to convert to")
    action: Action = "prefuse" if prefuse else "split" if split else "merge" if merge else "convert"
    reader, planned = opened_plan(source, out, action, complete(Choices, options))
    reader.close()
    return planned


def opened_plan(source: str | Path, out: str | Path, action: Action, choices: Choices) -> tuple[Reader, Plan | AdapterPlan]:
    """The same with what was opened for it, which the caller closes: names and shapes may be many, and are read once.

    Raises:
        InputError, PlanError: see `plan`.
    """
    from convert.commit.publish import destination
    from convert.run import open_and_plan
    from layouts.checkpoint import is_adapter
    from layouts.disk.places import place

    where = destination(out)
    if action != "merge":
        source = place(source)  # once, because a store is listed for it
        if is_adapter(source):
            from convert.adapters.write import open_and_plan as open_adapter_and_plan

            return open_adapter_and_plan(source, where, action, choices)
    return open_and_plan(source, where, action, choices)


@documented(Prefusing)
def prefuse(
    source: str | Path,
    out: str | Path,
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **options: Unpack[Prefusing],
) -> Report | AdapterReport:
    """Write `source` to `out` with gate and up of every expert in one tensor.

    In the layout `concat` it is `wi` (E, K, 2N) beside `wo` (E, N, K); `layouts/README.md` has the others, with their sources.
    `progress` is called with the bytes that were written since the last call; if it is `convert.progress.Phased`, it is told
    before how many there will be. `processes` are those that share the work (from `connect`); each of them makes the same
    call.

    Raises:
        UsageError: an option that does not exist here or contradicts another one, or a path that is none.
        InputError: `source` is missing, corrupt or not complete, or changes while it is read.
        PlanError: no lossless plan: an unknown family or layout, experts unlike each other, nothing to do.
        OutputError: `out` exists, is being written, or overlaps `source`.
        StorageError: the disk is full or failing; the same call continues. `out` is absent or complete in any case.
    """
    return _convert("prefuse", source, out, processes, progress, options)


@documented(Splitting)
def split(
    source: str | Path,
    out: str | Path,
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **options: Unpack[Splitting],
) -> Report | AdapterReport:
    """The inverse of `prefuse`: every tensor bit for bit, and for HF the original files byte for byte.

    Raises:
        UsageError, InputError, PlanError, OutputError, StorageError: as `prefuse`.
    """
    return _convert("split", source, out, processes, progress, options)


@documented(Merging)
def merge(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **options: Unpack[Merging],
) -> Report | AdapterReport:
    """Write the checkpoint `base` to `out` with the LoRA adapter `source` in its weights: W + scale * B @ A in float32.

    The one conversion that computes. Each weight is rounded once, to its own type; tensors that the adapter does not change are
    copied as they are, and so are the layout and the files of the base.

    Raises:
        UsageError, InputError, PlanError, OutputError, StorageError: as `prefuse`.
    """
    return _convert("merge", source, out, processes, progress, {**options, "base": base})


@documented(Reformatting)
def reformat(
    source: str | Path,
    out: str | Path,
    *,
    to: Format,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **options: Unpack[Reformatting],
) -> Report | AdapterReport:
    """Write a Hugging Face checkpoint as an Orbax (MaxText) one or back, every tensor, the experts unfused.

    Raises:
        UsageError, InputError, PlanError, OutputError, StorageError: as `prefuse`.
    """
    return _convert("convert", source, out, processes, progress, {**options, "to": to})


def _convert(
    action: Action,
    source: str | Path,
    out: str | Path,
    processes: Processes | None,
    progress: Progress | None,
    given: Mapping[str, Any],
) -> Report | AdapterReport:
    from convert.commit.processes import ALONE
    from convert.commit.publish import destination
    from convert.run import convert_checkpoint
    from layouts.checkpoint import is_adapter
    from layouts.disk.places import place

    choices, running = complete(Choices, given), complete(Running, given)
    if action != "merge":
        source = place(source)  # once, because a store is listed for it
        if is_adapter(source):
            from convert.adapters.write import convert_adapter

            return convert_adapter(source, destination(out), action, choices, running, processes or ALONE, progress)
    return convert_checkpoint(source, out, action, choices, running, processes or ALONE, progress)
