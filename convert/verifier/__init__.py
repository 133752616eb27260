"""Prove that two checkpoints hold the same model, or that one is still what was written."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import xxhash

from convert import manifest
from convert.errors import InputError
from convert.execute import Progress, ignore
from convert.verifier.verdict import Level, Verdict
from layouts.checkpoint import Reader, open_checkpoint
from layouts.describe import describe, identity

__all__ = ["Level", "Verdict", "verify_checkpoints", "verify_manifest"]

STRIP = 4 << 20
"""Elements hashed at a time."""


def verify_checkpoints(
    a: Path,
    b: Path,
    progress: Progress | None = None,
    *,
    gemm: bool = True,
    layers: Collection[int] | None = None,
    experts: Collection[int] | None = None,
    tokens: int = 1,
) -> Verdict:
    """Compare two checkpoints in whatever layouts: all weights bit for bit, then the outputs of grouped GEMMs.

    `layers` and `experts` narrow it down; `tokens` multiplies those of the random probe.

    Raises:
        InputError, PlanError: one of them cannot be read or described, or they hold different layers.
    """
    from convert.verifier import exact, logical

    report = progress or ignore
    with ExitStack() as stack:
        one, other = (stack.enter_context(closing(open_checkpoint(path))) for path in (a, b))
        if one.format != other.format:
            from convert.verifier.formats import compare_formats

            hf, tree = (one, other) if one.format == "hf" else (other, one)
            return Verdict(subject=f"{a} against {b}", levels=compare_formats(hf, tree, report))
        first, second = describe(one), describe(other)
        scope = logical.Scope(
            layers=None if layers is None else frozenset(layers),
            experts=None if experts is None else frozenset(experts),
            tokens=tokens,
        )
        left, right = (
            {key: block for key, block in logical.blocks(*side).items() if scope.holds(block)}
            for side in ((one, first), (other, second))
        )
        levels = [
            exact.compare_experts(left, right, report, scope),
            exact.compare_others(one, other, first, second, report),
        ]
        if gemm:
            from convert.verifier.gemm import compare_outputs

            broken = {line.partition(", expert ")[0] for line in levels[0].differences if exact.PADDING in line}
            levels += compare_outputs(left, right, scope, broken)
    return Verdict(subject=f"{a} against {b}", levels=tuple(levels))


def verify_manifest(path: Path, progress: Progress | None = None) -> Verdict:
    """Hash every tensor again and compare with the manifest that was written with it.

    Raises:
        InputError: the checkpoint or its manifest is missing or corrupt.
    """
    found = manifest.read(path) if path.is_dir() else None
    if not found:
        raise InputError(f"{path}: no {manifest.NAME} here, so there are no digests to check; give two checkpoints to compare")
    expected = {name: entry["xxh3_128"] for name, entry in found["tensors"].items()}
    differences = []
    with closing(open_checkpoint(path)) as reader:
        for name in sorted(set(expected) ^ set(reader.tensors)):
            where = "the manifest" if name in expected else "the checkpoint"
            differences.append(f"{name} is only in {where}")
        for name in sorted(set(expected) & set(reader.tensors)):
            if _digest(reader, name, progress or ignore) != expected[name]:
                differences.append(f"{name} (in {reader.where(name)}) is not what was written")
    level = Level(name="digests", covered=f"{len(expected)} tensors, xxh3-128", differences=tuple(differences))
    return Verdict(subject=str(path), levels=(level,))


def _digest(reader: Reader, name: str, progress: Progress) -> str:
    spec = reader.tensors[name]
    pattern = identity(len(spec.shape))
    digest = xxhash.xxh3_128()
    for box in pattern.strips(dict(zip(pattern.axes, spec.shape, strict=True)), STRIP):
        slices = tuple(slice(span.start, span.stop) for span in box.values())
        block = reader.read(name, slices)
        digest.update(np.asarray(block, order="C").data)
        progress(block.nbytes)
        reader.release(name, slices)
    return digest.hexdigest()
