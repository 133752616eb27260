"""Prove that two checkpoints hold the same model, or that one is still what was written.

In: one or two paths. Out: a verdict. It never writes, and shares no code with what fuses.

`bits` compares every weight, `gemms` runs the experts (JAX), `files` looks at what stands beside the tensors; `sides` says what
either checkpoint is, `scope` what is compared, `cost` what that will take, `verdict` and `page` tell the outcome.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert.commit.processes import ALONE, Processes
from convert.commit.recorded import load
from convert.errors import UsageError, readable
from convert.options import Verification
from convert.options.values import in_units
from convert.progress import Progress, announce, begin, ignore
from convert.verifier.adapters.trees import compare_trees
from convert.verifier.bits import exact
from convert.verifier.bits.counts import Counts, counts_of
from convert.verifier.bits.logical import Scope, blocks
from convert.verifier.bits.others import compare_others
from convert.verifier.files.beside import compare_files
from convert.verifier.files.manifest import verify_manifest
from convert.verifier.files.recorded import UNREAD, compare_recorded
from convert.verifier.held import Layers, held_across, held_alike
from convert.verifier.scope import check_scope, narrowed
from convert.verifier.share import agree, by_first
from convert.verifier.sides import check_said, described_alike, opened, said_of
from convert.verifier.stand import attested
from convert.verifier.verdict import EQUAL, Level, Verdict
from layouts.reader import Reader
from layouts.tensors import total_bytes

if TYPE_CHECKING:
    from convert.verifier.bits.across import Formats
    from convert.verifier.cost import Cost
    from convert.verifier.gemms.gemm import How

__all__ = ["Level", "Verdict", "estimate_cost", "verify_checkpoints", "verify_manifest"]


def verify_checkpoints(
    a: Path,
    b: Path,
    progress: Progress | None = None,
    options: Verification | None = None,
    processes: Processes = ALONE,
) -> Verdict:
    """Compare two checkpoints in whatever layouts: all weights bit for bit, then the outputs of grouped GEMMs.

    Of several `processes`, each looks at a part of both, and all of them come to the same verdict.

    Raises:
        InputError, PlanError: one of them cannot be read or described.
        UsageError: a backend, a mesh, a layer or an expert that is not there; a self-test of bits that are not read.
    """
    report, options = processes.watched(progress or ignore), options or Verification()
    with processes.together(), readable(f"{a} against {b}"), opened(a, b) as (one, other):
        agree(processes, lambda: (options, *(list(reader.tensors.values()) for reader in (one, other))))
        if options.trust_digests and options.self_test:
            raise UsageError("--trust-digests reads no bits, so that --self-test has none to flip; leave out one of them")
        check_said((one, other), options)
        announce(report, lambda: _outlook(one, other))
        verdict = _compare(one, other, options, report, processes)
        again = partial(_compare, report=ignore, processes=processes)
        return attested(verdict, (one, other), options, report, again, processes)


def _outlook(one: Reader, other: Reader) -> str:
    sizes = (in_units(total_bytes(reader.tensors)) for reader in (one, other))
    return f"compare  {' with '.join(sizes)} of tensors at the most; --dry-run tells how long that takes here"


def _compare(one: Reader, other: Reader, options: Verification, report: Progress, processes: Processes = ALONE) -> Verdict:
    make, manifest_of = _across if _differ(one, other) else _alike, cache(load)
    found = by_first(processes, lambda: compare_recorded(one, other, options, report, manifest_of) or _NO_RECORD)
    unread = found.state == EQUAL
    about, counts, rest = make(one, other, options, report, processes, unread=unread)
    bits_and_probes = tuple(rest)
    begin(report, "files")
    beside = by_first(processes, lambda: compare_files(one, other, counts.stacked, manifest_of))
    noted = () if unread or found == _NO_RECORD else (found,)
    levels = *((found,) if unread else ()), *bits_and_probes, beside, *noted
    looked = sum(level.compared for level in levels if level.name in ("exact", "others", "delta"))
    return Verdict(
        subject=f"{one.path} against {other.path}",
        levels=levels,
        narrowed="; ".join(filter(None, (UNREAD if unread else "", about))),
        counts=found.covered if unread else counts.words(looked),
        allow_not_run=options.allow_not_run,
    )


_NO_RECORD = Level(name="recorded", covered="", compared=0, asked=False)
"""Where there is no manifest, there is no such level."""


def _unread() -> tuple[Level, Level]:
    """`exact` and `others` where recorded digests stand for them."""
    exact, others = (
        Level(name=name, covered="", compared=0, not_run="--trust-digests: recorded digests instead", asked=False)
        for name in ("exact", "others")
    )
    return exact, others


_Found = tuple[str, Counts, Iterator[Level]]
"""What is compared, if not all; how much that is; the levels."""


def _alike(
    one: Reader, other: Reader, options: Verification, report: Progress, processes: Processes, *, unread: bool
) -> _Found:
    """Two checkpoints in the same format."""
    how = _how(one, other, options, processes) if options.gemm else None
    (first, second), scope = described_alike(one, other, options), _scope(options)
    sides = (one, first), (other, second)
    every = [blocks(*side) for side in sides]
    held = held_alike(sides, every, scope, options.memory)

    def levels() -> Iterator[Level]:
        experts, others = (
            _unread()
            if unread
            else (
                exact.compare_experts(held[0], held[1], report, scope, options.memory, options.jobs, processes),
                compare_others((one, other), (first, second), report, options.memory, options.jobs, processes),
            )
        )
        if first.loras or second.loras:
            yield by_first(processes, lambda: compare_trees((one, other), (first, second), report, options.memory))
            held_alike(sides, every, scope, options.memory)  # as A and B were read otherwise
        if any(every):
            yield from (experts, others)
            yield from _probes(held, scope, how, experts, report, processes)
        else:  # LoRA alone
            yield replace(others, asked=False)

    return narrowed(scope, every[0]), counts_of(*sides, every, scope), levels()


def _across(
    one: Reader, other: Reader, options: Verification, report: Progress, processes: Processes, *, unread: bool
) -> _Found:
    """A Hugging Face checkpoint and a MaxText tree; layers and experts narrow down the probes alone."""
    from convert.verifier.bits import across
    from convert.verifier.bits.formats import compare_others_across

    how, scope = _how(one, other, options, processes) if options.gemm else None, _scope(options)
    both = _formats(one, other, options)
    about = ""
    if scope.is_narrow:
        every = across.all_layers_of(both)
        check_scope(scope, every.values())
        about = f"all bits; GEMMs: {narrowed(scope, every)}" if how else ""

    def levels() -> Iterator[Level]:
        left, right = held_across(both, Scope(), options.memory)
        experts, others = (
            _unread()
            if unread
            else (
                exact.compare_experts(left, right, report, Scope(), options.memory, options.jobs, processes),
                compare_others_across(both, options.memory, report, processes),
            )
        )
        yield from (experts, others)
        if how:
            like = replace(how, config=both.config, one_router=True)
            yield from _probes(held_across(both, scope, options.memory), scope, like, experts, report, processes)

    return about, across.counts_of(both), levels()


def _probes(
    held: Layers, scope: Scope, how: How | None, experts: Level, report: Progress, processes: Processes
) -> Iterator[Level]:
    """GEMMs through all layers but those that the level of the `experts` could not read in logical axes."""
    if how:
        from convert.verifier.gemms.gemm import compare_outputs

        broken = {line.partition(", expert ")[0] for line in experts.differences if exact.PADDING in line}
        yield from compare_outputs(held[0], held[1], scope, how, broken, report, processes)


def _formats(one: Reader, other: Reader, options: Verification) -> Formats:
    from convert.verifier.bits.across import formats_of

    (hf, first), (tree, second) = sorted(zip((one, other), said_of(options), strict=True), key=lambda side: side[0].format)
    return formats_of(hf, tree, (first, second), options.scan_axis)


def estimate_cost(a: Path, b: Path, options: Verification | None = None) -> Cost:
    """What a verification will cost here, by trying it on a few experts.

    Raises:
        InputError, PlanError, UsageError: as `verify_checkpoints`.
    """
    from convert.verifier.cost import measure

    options = options or Verification()
    with readable(f"{a} against {b}"), opened(a, b) as (one, other):
        check_said((one, other), options)
        how, scope = _how(one, other, options) if options.gemm else None, _scope(options)
        if _differ(one, other):
            left, right = held_across(_formats(one, other, options), scope, options.memory)
        else:
            first, second = described_alike(one, other, options)
            sides = (one, first), (other, second)
            left, right = held_alike(sides, [blocks(*side) for side in sides], scope, options.memory)
        return measure(left, right, scope, how, options, (one, other) if options.content else ())


def _differ(one: Reader, other: Reader) -> bool:
    """Whether they are a Hugging Face checkpoint and a MaxText tree."""
    return one.format != other.format


def _scope(options: Verification) -> Scope:
    layers, experts = (None if each is None else frozenset(each) for each in (options.layers, options.experts))
    return Scope(layers=layers, experts=experts, tokens=options.tokens, always=options.self_test)


def _how(one: Reader, other: Reader, options: Verification, processes: Processes = ALONE) -> How:
    from convert.verifier.gemms.backends import choose
    from convert.verifier.gemms.gemm import How

    mesh = None
    if options.mesh:
        from convert.verifier.gemms.mesh import make_mesh

        mesh = make_mesh(options.mesh)  # before JAX has begun with the devices that it finds
    if processes.count > 1:
        import jax

        jax.local_devices()  # JAX begins in all processes at a time, for they wait for one another; also where no layer is left
    backends, missing = choose(options.backend)
    config = one.config or other.config
    return How(backends=backends, missing=missing, mesh=mesh, config=config, memory=options.memory)
