"""Prefuse, split and verify Mixture-of-Experts checkpoints. The library behind the `convert` command.

    import convert

    plan = convert.plan("in", "out", prefuse=True)   # headers only, prints nothing
    report = convert.prefuse("in", "out")            # wi_0, wi_1 -> wi (E, K, 2N)
    report = convert.split("out", "again")           # the exact inverse
    report = convert.verify("in", "out")             # equal weights, equal grouped GEMMs
    content = convert.digest("out")                  # a sha256 that is the same in every layout

Nothing here prints or exits; progress goes to a callback. Heavy libraries are imported when a function needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from convert.conversions import plan, prefuse, reformat, split
from convert.errors import ConvertError, InputError, OutputError, PlanError, StorageError, UsageError
from convert.keywords import Digesting, Verifying, documented
from convert.options import Verification, complete

if TYPE_CHECKING:
    from convert.commit.processes import Processes
    from convert.progress import Progress
    from convert.verifier import Verdict
    from convert.verifier.content.hashing import Content

__all__ = [
    "ConvertError",
    "InputError",
    "OutputError",
    "PlanError",
    "StorageError",
    "UsageError",
    "connect",
    "digest",
    "plan",
    "prefuse",
    "prefuse_params",
    "reformat",
    "split",
    "split_params",
    "verify",
]


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> Processes:
    """This process among those of a JAX program that run the same conversion, for the argument `processes`.

    What is not given is found by JAX (SLURM, GKE, TPU); where `jax.distributed` is initialized already, nothing has to be.

    Raises:
        UsageError: JAX cannot find it.
    """
    from convert.commit.processes import connect as found

    return found(coordinator, num_processes, process_id)


@documented(Verifying)
def verify(
    a: str | Path, b: str | Path | None = None, *, progress: Progress | None = None, **options: Unpack[Verifying]
) -> Verdict:
    """Compare two checkpoints, in whatever layouts: weights bit for bit, then grouped GEMMs fused and unfused.

    With one path, re-check the digests in its manifest instead; where these are of stored chunks, `decode` decodes them, too.
    `backend` is a grouped GEMM of `convert.verifier.gemms.backends`, and `mesh` says how many devices there are along `expert`
    and `model`. `Verdict.equal` holds if something was compared, nothing differs, and each level that was asked for ran (or
    `allow_not_run` was given); `Level.state` has the three states. `content` and `self_test` are what a report has besides.

    Raises:
        InputError, PlanError: one of them cannot be read or described.
        UsageError: a backend, a mesh, a layer or an expert that cannot be had here, or an option for another number of
            checkpoints.
    """
    from convert.verifier import verify_checkpoints, verify_manifest
    from layouts.places import place

    chosen = complete(Verification, options, of=1 if b is None else 2)
    if b is None:
        return verify_manifest(place(a), progress, chosen)
    return verify_checkpoints(place(a), place(b), progress, chosen)


@documented(Digesting)
def digest(path: str | Path, *, progress: Progress | None = None, **options: Unpack[Digesting]) -> Content:
    """A sha256 of what a checkpoint holds, tensor by tensor: the same in every layout, fused or not, Hugging Face or MaxText.

    `Content.model.sha256` is it; `Content.state` is that of a tree's training state. README has the rule.

    Raises:
        InputError, PlanError: it cannot be read or described, or its padding is damaged.
    """
    from convert.progress import ignore
    from convert.verifier.content.sides import content_of
    from layouts.places import place

    return content_of(place(path), complete(Verification, options), progress or ignore)


def prefuse_params(params: Any) -> Any:
    """Fuse sibling leaves `wi_0`, `wi_1` (E, ..., K, N) of a parameter pytree into `wi` (E, ..., K, 2N), in memory.

    Raises:
        PlanError: no such siblings, or they differ in shape or type.
    """
    from convert.memory import fuse

    return fuse(params)


def split_params(params: Any) -> Any:
    """The inverse of `prefuse_params`.

    Raises:
        PlanError: no leaf `wi`, or one whose last dimension is odd.
    """
    from convert.memory import unfuse

    return unfuse(params)
