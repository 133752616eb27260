"""The library calls that convert checkpoints; `import convert` has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from convert.errors import UsageError
from convert.planning.choices import Choices

if TYPE_CHECKING:
    from convert.commit.processes import Processes
    from convert.planning.planner import Plan
    from convert.report import Report

Format = Literal["hf", "orbax"]
DEFAULT_MEMORY = 2 << 30
DEFAULT_SHARD = 5_000_000_000


def plan(
    source: str | Path,
    out: str | Path,
    *,
    prefuse: bool = False,
    split: bool = False,
    layout: str = "concat",
    shards: int = 1,
    align: int | str = 128,
    family: str | None = None,
    source_layout: str | None = None,
    to: Format | None = None,
    scan: bool = True,
    scan_axis: int | None = None,
    params_only: bool = False,
    drop_optimizer: bool = False,
    keep_chunks: bool = False,
    dequantize: Literal["bf16"] | None = None,
) -> Plan:
    """Plan a conversion from names and shapes alone, writing nothing.

    Raises:
        UsageError: not exactly one of `prefuse` and `split`, or neither and no `to`.
        InputError: the checkpoint is missing or corrupt.
        PlanError: no lossless plan exists.
    """
    from convert.run import open_and_plan

    if (prefuse and split) or not (prefuse or split or to):
        raise UsageError("give exactly one of prefuse=True and split=True, or only the format to convert to")
    choices = Choices(
        layout=layout,
        shards=shards,
        align=align,
        family=family,
        source_layout=source_layout,
        to=to,
        scan=scan,
        scan_axis=scan_axis,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
        keep_chunks=keep_chunks,
        dequantize=dequantize,
    )
    reader, planned = open_and_plan(source, out, "prefuse" if prefuse else "split" if split else "convert", choices)
    reader.close()
    return planned


def prefuse(
    source: str | Path,
    out: str | Path,
    *,
    layout: str = "concat",
    shards: int = 1,
    align: int | str = 128,
    family: str | None = None,
    source_layout: str | None = None,
    to: Format | None = None,
    scan: bool = True,
    scan_axis: int | None = None,
    params_only: bool = False,
    drop_optimizer: bool = False,
    keep_chunks: bool = False,
    dequantize: Literal["bf16"] | None = None,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    max_shard_size: int = DEFAULT_SHARD,
    resume: bool = True,
    overwrite: bool = False,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Write `source` to `out` with gate and up of every expert in one tensor.

    `memory` and `max_shard_size` are in bytes. `shards` and `align` (columns to which each shard is padded, or `maxtext`) are
    for the layouts `per-shard` and `lane`. `to` is the format of the output if it is another than the input's; `scan` says
    whether a MaxText tree that is made has its layers stacked, and `scan_axis` along which axis they are in one that is made
    or read (its `param_scan_axis`). `params_only` leaves out the training state of one that is read, and `drop_optimizer` the
    optimizer's alone, which has to go where it cannot be fused. `keep_chunks` keeps Orbax chunks as they are also where an
    array is one large chunk, which else is cut for restores onto many devices. `dequantize` computes FP8 block and MXFP4
    weights as bfloat16, which nothing else here does. `processes` are those that share the work (from `connect`); each of
    them makes the same call.

    Raises:
        InputError, PlanError, OutputError, StorageError: see `convert.errors`; `out` is absent or complete in any case.
    """
    from convert.commit.processes import ALONE
    from convert.run import Options, convert_checkpoint

    choices = Choices(
        layout=layout,
        shards=shards,
        align=align,
        family=family,
        source_layout=source_layout,
        to=to,
        scan=scan,
        scan_axis=scan_axis,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
        keep_chunks=keep_chunks,
        dequantize=dequantize,
    )
    options = Options(jobs, memory, max_shard_size, resume, overwrite, processes or ALONE)
    return convert_checkpoint(source, out, "prefuse", options, progress, choices)


def split(
    source: str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    source_layout: str | None = None,
    to: Format | None = None,
    scan: bool = True,
    scan_axis: int | None = None,
    params_only: bool = False,
    drop_optimizer: bool = False,
    keep_chunks: bool = False,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    max_shard_size: int = DEFAULT_SHARD,
    resume: bool = True,
    overwrite: bool = False,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """The inverse of `prefuse`: every tensor bit for bit, and for HF the original files byte for byte.

    Raises:
        InputError, PlanError, OutputError, StorageError: see `convert.errors`; `out` is absent or complete in any case.
    """
    from convert.commit.processes import ALONE
    from convert.run import Options, convert_checkpoint

    choices = Choices(
        family=family,
        source_layout=source_layout,
        to=to,
        scan=scan,
        scan_axis=scan_axis,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
        keep_chunks=keep_chunks,
    )
    options = Options(jobs, memory, max_shard_size, resume, overwrite, processes or ALONE)
    return convert_checkpoint(source, out, "split", options, progress, choices)


def reformat(
    source: str | Path,
    out: str | Path,
    *,
    to: Format,
    family: str | None = None,
    scan: bool = True,
    scan_axis: int | None = None,
    params_only: bool = False,
    drop_optimizer: bool = False,
    dequantize: Literal["bf16"] | None = None,
    jobs: int | None = None,
    memory: int = DEFAULT_MEMORY,
    max_shard_size: int = DEFAULT_SHARD,
    resume: bool = True,
    overwrite: bool = False,
    processes: Processes | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Write a Hugging Face checkpoint as an Orbax (MaxText) one or back, every tensor, the experts unfused.

    `params_only` leaves out the training state (step, optimizer) of a MaxText checkpoint; else it is an error to have one.

    Raises:
        InputError, PlanError, OutputError, StorageError: see `convert.errors`; `out` is absent or complete in any case.
    """
    from convert.commit.processes import ALONE
    from convert.run import Options, convert_checkpoint

    choices = Choices(
        family=family,
        to=to,
        scan=scan,
        scan_axis=scan_axis,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
        dequantize=dequantize,
    )
    options = Options(jobs, memory, max_shard_size, resume, overwrite, processes or ALONE)
    return convert_checkpoint(source, out, "convert", options, progress, choices)
