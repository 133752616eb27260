"""Prefuse, split and verify Mixture-of-Experts checkpoints. The library behind the `convert` command.

    import convert

    plan = convert.plan("in", "out", prefuse=True)   # no weights are read, prints nothing
    report = convert.prefuse("in", "out")            # wi_0, wi_1 -> wi (E, K, 2N)
    report = convert.split("out", "again")           # the exact inverse
    report = convert.verify("in", "out")             # equal weights, equal grouped GEMMs
    report = convert.merge("adapter", "merged", base="in")   # base + LoRA, computed in float32
    content = convert.digest("out")                  # a sha256 that is the same in every layout
    params = convert.load("in", layout="concat")     # straight onto devices, in any layout
    report = convert.save(params, "new", like="in", layout="concat")
    print(convert.inspect("in"))                     # what it is, from its headers alone

Nothing here prints or exits; progress goes to a callback. Heavy libraries are imported when a function needs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from convert.answers import inspect
from convert.conversions import merge, plan, prefuse, reformat, split
from convert.errors import ConvertError, InputError, OutputError, PlanError, StorageError, UsageError
from convert.options import Choices, Verification
from convert.options.calls import documented
from convert.options.keywords import Digesting, Fusing, Unfusing, Verifying
from convert.options.option import complete
from convert.options.wording import in_python
from convert.pipeline.calls import load, save, sync_plan

if TYPE_CHECKING:
    from convert.commit.processes import Processes
    from convert.planning.planner import Plan
    from convert.progress import Progress
    from convert.report import Report
    from convert.verifier.content.hashing import Content
    from convert.verifier.verdict import Level, Verdict

    __version__: str

__all__ = [
    "ConvertError",
    "InputError",
    "Level",
    "OutputError",
    "Plan",
    "PlanError",
    "Report",
    "StorageError",
    "UsageError",
    "Verdict",
    "__version__",
    "connect",
    "digest",
    "inspect",
    "layout_of",
    "load",
    "merge",
    "plan",
    "prefuse",
    "prefuse_params",
    "reformat",
    "save",
    "split",
    "split_params",
    "sync_plan",
    "verify",
]

_VALUES = {
    "Level": ("verifier.verdict", "Level"),
    "Plan": ("planning.planner", "Plan"),
    "Report": ("report", "Report"),
    "Verdict": ("verifier.verdict", "Verdict"),
    "__version__": ("version", "TOOL"),
}
"""What calls give, and where it is defined: imported when somebody asks, because `import convert` is light."""


def __getattr__(name: str) -> Any:
    if name not in _VALUES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _VALUES[name]
    return getattr(import_module(f"convert.{module}"), there)


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> Processes:
    """This process among those of a JAX program that run the same conversion or verification, for the argument `processes`.

    What is not given is found by JAX (SLURM, GKE, TPU); where `jax.distributed` is initialized already, nothing has to be.

    Raises:
        UsageError: JAX cannot find it, or `coordinator` is no HOST:PORT.
    """
    from convert.commit.processes import connect as found

    with in_python():
        return found(coordinator, num_processes, process_id)


@documented(Verifying)
def verify(
    a: str | Path,
    b: str | Path | None = None,
    *,
    processes: Processes | None = None,
    progress: Progress | None = None,
    **options: Unpack[Verifying],
) -> Verdict:
    """Compare two checkpoints, in whatever layouts: weights bit for bit, then grouped GEMMs fused and unfused.

    With one path, re-check the digests in its manifest instead; where these are of stored chunks, `decode` decodes them, too.
    `backend` is a grouped GEMM of `convert.verifier.gemms.backends`, and `mesh` says how many devices there are along `expert`
    and `model`. `Verdict.equal` holds if something was compared, nothing differs, and each level that was asked for ran (or
    `allow_not_run` was given); `Level.state` has the three states. `content` and `self_test` are what a report has besides.
    `processes` are those that share the work (from `connect`); each of them makes the same call, and gets the same verdict.

    Raises:
        InputError, PlanError: one of them cannot be read or described.
        UsageError: a backend, a mesh, a layer or an expert that is not there, or an option for another number of checkpoints.
        StorageError: there is too little memory, or another process has failed.
        OSError: the disk or the store is failing.
    """
    from convert.commit.processes import ALONE
    from convert.verifier import verify_checkpoints, verify_manifest
    from layouts.checkpoint import is_adapter
    from layouts.disk.places import place

    together = processes or ALONE
    chosen = complete(Verification, options, of=1 if b is None else 2)
    if b is not None and (is_adapter(place(a)) or is_adapter(place(b))):
        from convert.verifier.adapters import verify_adapters

        return verify_adapters(place(a), place(b), progress, chosen, together)
    if chosen.from_writer or chosen.base:
        raise UsageError("--from-writer and --base are for two LoRA adapters that are compared")
    if b is None:
        return verify_manifest(place(a), progress, chosen, together)
    return verify_checkpoints(place(a), place(b), progress, chosen, together)


@documented(Digesting)
def digest(path: str | Path, *, progress: Progress | None = None, **options: Unpack[Digesting]) -> Content:
    """A sha256 of what a checkpoint holds, tensor by tensor: the same in every layout, fused or not, Hugging Face or MaxText.

    `Content.model.sha256` is it, and `.xxh3` the one that manifests have; `Content.state` is that of a tree's training state.
    `convert/verifier/README.md` has the rule.

    Raises:
        InputError, PlanError: it cannot be read or described, or its padding is damaged.
        UsageError: `memory` is too little.
        OSError: the disk or the store is failing.
    """
    from convert.progress import ignore
    from convert.verifier.content.sides import content_of
    from layouts.disk.places import place

    return content_of(place(path), complete(Verification, options), progress or ignore)


@documented(Fusing)
def prefuse_params(
    params: Any,
    *,
    names: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    donate: bool = False,
    **options: Unpack[Fusing],
) -> Any:
    """Fuse gate and up in a tree of parameters, in memory: what `prefuse` does to files, with the same layouts and families.

    `params` is any container of arrays (`convert/memory/README.md`), and so is what is returned: `wi_0` and `wi_1` (E, K, N)
    become `wi` (E, K, 2N) in the layout `concat`. Leaves have MaxText's names, `wi_0`, `wi_1` and `wo`, unless `family` says
    otherwise, or `names` says what they are called: `{"wi_0": "gate_proj.kernel", ...}`.
    `sizes` are those of axes that shapes do not tell: `e`, the experts of a family that stores them flat, or numbers two
    kinds through (of each kind); `k` and `n`, where the input is padded.

    It works under every transformation of JAX, and has the derivative of a concatenation. With `donate`, JAX's arrays are
    freed as soon as they are moved, so that no more than one layer is held twice; nobody can use them afterwards.

    Raises:
        PlanError: no experts are there, they cannot be told or are not alike, or the container cannot hold what they become.
        InputError: experts are missing, or padding holds something else than zeros.
        UsageError: a layout or an option that does not exist.
    """
    from convert.memory import relaid
    from convert.planning.choices import check

    chosen = complete(Choices, options)
    check(chosen)
    return relaid(params, "prefuse", names=names, donate=donate, choices=chosen, sizes=sizes)


@documented(Fusing)
def layout_of(
    params: Any,
    *,
    names: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    **options: Unpack[Fusing],
) -> Mapping[str, Any]:
    """The record, as JSON, of the layout in which `prefuse_params` of the same arguments leaves these parameters.

    It is what files remember beside their tensors: keep it beside the tree, and `split_params` restores the original from it.

    Raises:
        PlanError, InputError, UsageError: as `prefuse_params`.
    """
    from convert.memory import record
    from convert.planning.choices import check

    chosen = complete(Choices, options)
    check(chosen)
    return record(params, names=names, choices=chosen, sizes=sizes)


@documented(Unfusing)
def split_params(
    params: Any,
    layout: str | Mapping[str, Any] | None = None,
    *,
    names: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] | None = None,
    donate: bool = False,
    **options: Unpack[Unfusing],
) -> Any:
    """The inverse of `prefuse_params`.

    `layout` is its name, or what `layout_of` gave: no shape tells the layouts of a fused array apart, and none is assumed. By
    name, gate and up become what their family publishes, and where `wi` is padded and no `wo` tells how much of it is real,
    `sizes` does. `names` and `donate` as there.

    Raises:
        PlanError: nobody has named the layout, or no leaf is in it.
        InputError, UsageError: as `prefuse_params`.
    """
    from convert.memory import relaid, source_choices

    chosen = source_choices(complete(Choices, options), layout)
    record = layout if isinstance(layout, Mapping) else None
    return relaid(params, "split", names=names, donate=donate, choices=chosen, record=record, sizes=sizes)
