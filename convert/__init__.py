"""Prefuse, split and verify Mixture-of-Experts checkpoints. The library behind the `convert` command.

    import convert

    plan = convert.plan("in", "out", prefuse=True)   # headers only, prints nothing
    report = convert.prefuse("in", "out")            # wi_0, wi_1 -> wi (E, K, 2N)
    report = convert.split("out", "again")           # the exact inverse
    report = convert.verify("in", "out")             # equal weights, equal grouped GEMMs

Nothing here prints or exits; progress goes to a callback. Heavy libraries are imported when a function needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convert.errors import ConvertError, InputError, OutputError, PlanError, StorageError, UsageError

if TYPE_CHECKING:
    from convert.planner import Plan
    from convert.processes import Processes
    from convert.report import Report
    from convert.verifier import Verdict

__all__ = [
    "ConvertError",
    "InputError",
    "OutputError",
    "PlanError",
    "StorageError",
    "UsageError",
    "connect",
    "plan",
    "prefuse",
    "prefuse_params",
    "reformat",
    "split",
    "split_params",
    "verify",
]

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
    params_only: bool = False,
    drop_optimizer: bool = False,
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
    reader, planned = open_and_plan(
        source,
        out,
        "prefuse" if prefuse else "split" if split else "convert",
        layout=layout,
        shards=shards,
        align=align,
        family=family,
        source_layout=source_layout,
        to=to,
        scan=scan,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
        dequantize=dequantize,
    )
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
    """Write `source` to `out` with gate and up of every expert in one tensor.

    `memory` and `max_shard_size` are in bytes. `shards` and `align` (columns to which each shard is padded, or `maxtext`) are
    for the layouts `per-shard` and `lane`. `to` is the format of the output if it is another than the input's; `scan` says
    whether a MaxText tree that is made has its layers stacked, `params_only` that the training state of one that is read is
    left out, and `drop_optimizer` the optimizer's alone, which has to go where it cannot be fused. `dequantize` computes FP8
    block and MXFP4 weights as bfloat16, which nothing else here does. `processes` are those that share the work (from
    `connect`); each of them makes the same call.

    Raises:
        InputError, PlanError, OutputError, StorageError: see `convert.errors`; `out` is absent or complete in any case.
    """
    from convert.processes import ALONE
    from convert.run import Options, convert_checkpoint

    return convert_checkpoint(
        source,
        out,
        "prefuse",
        Options(jobs, memory, max_shard_size, resume, overwrite, processes or ALONE),
        progress,
        layout=layout,
        shards=shards,
        align=align,
        family=family,
        source_layout=source_layout,
        to=to,
        scan=scan,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
        dequantize=dequantize,
    )


def split(
    source: str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    source_layout: str | None = None,
    to: Format | None = None,
    scan: bool = True,
    params_only: bool = False,
    drop_optimizer: bool = False,
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
    from convert.processes import ALONE
    from convert.run import Options, convert_checkpoint

    return convert_checkpoint(
        source,
        out,
        "split",
        Options(jobs, memory, max_shard_size, resume, overwrite, processes or ALONE),
        progress,
        family=family,
        source_layout=source_layout,
        to=to,
        scan=scan,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
    )


def reformat(
    source: str | Path,
    out: str | Path,
    *,
    to: Format,
    family: str | None = None,
    scan: bool = True,
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
    from convert.processes import ALONE
    from convert.run import Options, convert_checkpoint

    return convert_checkpoint(
        source,
        out,
        "convert",
        Options(jobs, memory, max_shard_size, resume, overwrite, processes or ALONE),
        progress,
        family=family,
        to=to,
        scan=scan,
        params_only=params_only,
        drop_optimizer=drop_optimizer,
        dequantize=dequantize,
    )


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> Processes:
    """This process among those of a JAX program that run the same conversion, for the argument `processes`.

    What is not given is found by JAX (SLURM, GKE, TPU); where `jax.distributed` is initialized already, nothing has to be.

    Raises:
        UsageError: JAX cannot find it.
    """
    from convert.processes import connect as found

    return found(coordinator, num_processes, process_id)


def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    gemm: bool = True,
    layers: Collection[int] | None = None,
    experts: Collection[int] | None = None,
    tokens: int = 1,
    backend: str = "ragged_dot",
    mesh: Mapping[str, int] | None = None,
    memory: int = DEFAULT_MEMORY,
) -> Verdict:
    """Compare two checkpoints, in whatever layouts: weights bit for bit, then grouped GEMMs fused and unfused.

    With one path, re-check the digests in its manifest instead. `layers` and `experts` narrow a comparison down; `tokens`
    multiplies those of its probes. `backend` is a grouped GEMM of `convert.verifier.backends` or `all`, and `mesh` how many
    devices there are along `expert` and `model`, on which the experts are run, too. `memory` is in bytes.

    Raises:
        InputError, PlanError: one of them cannot be read or described.
        UsageError: a backend or a mesh that cannot be had here.
    """
    from convert.verifier import Options, verify_checkpoints, verify_manifest
    from layouts.places import place

    if b is None:
        return verify_manifest(place(a), progress)
    options = Options(gemm=gemm, layers=layers, experts=experts, tokens=tokens, backend=backend, mesh=mesh, memory=memory)
    return verify_checkpoints(place(a), place(b), progress, options)


def prefuse_params(params: Any) -> Any:
    """Fuse sibling leaves `wi_0`, `wi_1` (E, ..., K, N) of a parameter pytree into `wi` (E, ..., K, 2N), in memory.

    Raises:
        PlanError: no such siblings, or they differ in shape or type.
    """
    from convert.params import fuse

    return fuse(params)


def split_params(params: Any) -> Any:
    """The inverse of `prefuse_params`.

    Raises:
        PlanError: no leaf `wi`, or one whose last dimension is odd.
    """
    from convert.params import unfuse

    return unfuse(params)
