"""Prove that two checkpoints hold the same model, or that one is still what was written.

In: one or two paths. Out: a verdict. It never writes, and shares no code with what fuses.

`bits` compares every weight, `gemms` runs the experts (JAX), `files` looks at what stands beside the tensors; `sides` says what
either checkpoint is, `scope` what is compared, `cost` what that will take, `verdict` and `page` tell the outcome.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert.errors import readable
from convert.options import Verification
from convert.progress import Progress, ignore
from convert.verifier.bits import exact
from convert.verifier.bits.counts import Counts, counts_of
from convert.verifier.bits.logical import Block, Scope, blocks, pair
from convert.verifier.bits.order import hold_experts
from convert.verifier.files.beside import compare_files
from convert.verifier.files.manifest import verify_manifest
from convert.verifier.scope import check_scope, narrowed
from convert.verifier.sides import described_alike, opened, said_of
from convert.verifier.stand import attested
from convert.verifier.verdict import Level, Verdict
from layouts.matching.describe import Description
from layouts.reader import Reader

if TYPE_CHECKING:
    from convert.verifier.bits.across import Formats
    from convert.verifier.cost import Cost
    from convert.verifier.gemms.gemm import How

__all__ = ["Level", "Verdict", "estimate_cost", "verify_checkpoints", "verify_manifest"]


def verify_checkpoints(a: Path, b: Path, progress: Progress | None = None, options: Verification | None = None) -> Verdict:
    """Compare two checkpoints in whatever layouts: all weights bit for bit, then the outputs of grouped GEMMs.

    Raises:
        InputError, PlanError: one of them cannot be read or described.
        UsageError: a backend, a mesh, a layer or an expert that is not there.
    """
    report, options = progress or ignore, options or Verification()
    with readable(f"{a} against {b}"), opened(a, b) as (one, other):
        verdict = _compare(one, other, options, report)
        return attested(verdict, (one, other), options, report, partial(_compare, report=ignore))


def _compare(one: Reader, other: Reader, options: Verification, report: Progress) -> Verdict:
    make = _across if _differ(one, other) else _alike
    about, counts, found = make(one, other, options, report)
    levels = *found, compare_files(one, other, counts.stacked)
    looked = sum(level.compared for level in levels if level.name in ("exact", "others"))
    return Verdict(
        subject=f"{one.path} against {other.path}",
        levels=levels,
        narrowed=about,
        counts=counts.words(looked),
        allow_not_run=options.allow_not_run,
    )


_Found = tuple[str, Counts, Iterator[Level]]
"""What is compared, if not all; how much that is; the levels."""
_Layers = tuple[dict[str, Block], dict[str, Block]]
"""The MoE layers of either side."""


def _alike(one: Reader, other: Reader, options: Verification, report: Progress) -> _Found:
    """Two checkpoints in the same format."""
    how = _how(one, other, options) if options.gemm else None
    (first, second), scope = described_alike(one, other, options), _scope(options)
    sides = (one, first), (other, second)
    every = [blocks(*side) for side in sides]
    held = _held(sides, every, scope, options.memory)

    def levels() -> Iterator[Level]:
        experts = exact.compare_experts(held[0], held[1], report, scope, options.memory, options.jobs)
        yield experts
        yield exact.compare_others(one, other, first, second, report, options.memory, options.jobs)
        yield from _probes(held, scope, how, experts, report)

    return narrowed(scope, every[0]), counts_of(*sides, every, scope), levels()


def _across(one: Reader, other: Reader, options: Verification, report: Progress) -> _Found:
    """A Hugging Face checkpoint and a MaxText tree; layers and experts narrow down the probes alone."""
    from convert.verifier.bits import across
    from convert.verifier.bits.formats import compare_others_across

    how, scope = _how(one, other, options) if options.gemm else None, _scope(options)
    both = _formats(one, other, options)
    about = ""
    if scope.is_narrow:
        every = across.all_layers_of(both)
        check_scope(scope, every.values())
        about = f"all bits; GEMMs: {narrowed(scope, every)}" if how else ""

    def levels() -> Iterator[Level]:
        left, right = _held_across(both, Scope(), options.memory)
        experts = exact.compare_experts(left, right, report, Scope(), options.memory, options.jobs)
        yield experts
        yield compare_others_across(both, options.memory, report)
        if how:
            like = replace(how, config=both.config, one_router=True)
            yield from _probes(_held_across(both, scope, options.memory), scope, like, experts, report)

    return about, across.counts_of(both), levels()


def _probes(held: _Layers, scope: Scope, how: How | None, experts: Level, report: Progress) -> Iterator[Level]:
    """GEMMs through all layers but those that the level of the `experts` could not read in logical axes."""
    if how:
        from convert.verifier.gemms.gemm import compare_outputs

        broken = {line.partition(", expert ")[0] for line in experts.differences if exact.PADDING in line}
        yield from compare_outputs(held[0], held[1], scope, how, broken, report)


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
        how, scope = _how(one, other, options) if options.gemm else None, _scope(options)
        if _differ(one, other):
            left, right = _held_across(_formats(one, other, options), scope, options.memory)
        else:
            first, second = described_alike(one, other, options)
            sides = (one, first), (other, second)
            left, right = _held(sides, [blocks(*side) for side in sides], scope, options.memory)
        return measure(left, right, scope, how, (one, other) if options.content else ())


def _differ(one: Reader, other: Reader) -> bool:
    """Whether they are a Hugging Face checkpoint and a MaxText tree."""
    return one.format != other.format


def _scope(options: Verification) -> Scope:
    layers, experts = (None if each is None else frozenset(each) for each in (options.layers, options.experts))
    return Scope(layers=layers, experts=experts, tokens=options.tokens, always=options.self_test)


def _held(
    sides: Iterable[tuple[Reader, Description]], every: Sequence[Mapping[str, Block]], scope: Scope, memory: int
) -> _Layers:
    """Of `every` MoE layer of both sides those that are compared, and both checkpoints ready to be read in their order."""
    check_scope(scope, (block for side in every for block in side.values()))
    one, other = ({key: block for key, block in side.items() if scope.holds(block)} for side in every)
    hold_experts(list(pair(one, other)), [(reader, described.verbatim) for reader, described in sides], memory)
    return one, other


def _held_across(both: Formats, scope: Scope, memory: int) -> _Layers:
    """The same for two formats."""
    from convert.verifier.bits.across import all_layers_of, layers_of

    if scope.is_narrow:
        check_scope(scope, all_layers_of(both).values())
    left, right = layers_of(both, scope)
    hold_experts(list(pair(left, right)), [(both.tree, ())], memory)
    return left, right


def _how(one: Reader, other: Reader, options: Verification) -> How:
    from convert.verifier.gemms.backends import choose
    from convert.verifier.gemms.gemm import How

    mesh = None
    if options.mesh:
        from convert.verifier.gemms.mesh import make_mesh

        mesh = make_mesh(options.mesh)  # before JAX has begun with the devices that it finds
    backends, missing = choose(options.backend)
    config = one.config or other.config
    return How(backends=backends, missing=missing, mesh=mesh, config=config, memory=options.memory)
