"""Run the probes over all MoE layers of two checkpoints, a few experts at a time.

On a CPU `jax.lax.ragged_dot` lowers to a masked dense product, E times the work; so few experts are taken at a time, and all of
them are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from convert.verifier.logical import Block, Scope, pair
from convert.verifier.operands import can_run, form, load
from convert.verifier.probes import ONE_HOT, gradients, identity, random
from convert.verifier.verdict import Level

EXPERTS_PER_CALL = 8


def compare_outputs(
    a: Mapping[str, Block], b: Mapping[str, Block], scope: Scope, broken: Collection[str] = ()
) -> tuple[Level, ...]:
    """The identity probe, the random probe and the gradients, of every expert of every MoE layer that a GEMM takes.

    Layers that are `broken` cannot be read in logical axes, and are left to the level that said so.
    """
    found: dict[str, list[str]] = {"identity": [], "gemm": [], "gradients": []}
    errors: dict[str, tuple[float, ...]] = {}
    forms: set[str] = set()
    pairs = list(pair(a, b))
    runnable = [blocks for blocks in pairs if all(map(can_run, blocks))]
    for number, (one, other) in enumerate(runnable):
        if one.label in broken:
            continue
        forms.add(f"'{form(one)}' against '{form(other)}'")
        ends = number in (0, len(runnable) - 1)
        worst: list[float] = []
        for experts in _chunks(one.experts):
            if not scope.of(experts):
                continue
            weights = load(one, experts), load(other, experts)
            for block, side in zip((one, other), weights, strict=True):
                found["identity"] += identity(block, side, experts)
            deltas, problems = random(*weights, one, experts, scope.tokens)
            worst += deltas
            found["gemm"] += problems
            if ends and not problems and len(worst) <= EXPERTS_PER_CALL:
                found["gradients"] += gradients(*weights, one, experts)
        errors[one.label] = tuple(worst)
    how = " and ".join(sorted(forms)) or "nothing"
    largest = max((delta for worst in errors.values() for delta in worst), default=0.0)
    skipped = len(pairs) - len(runnable)
    left = f"; {skipped} layers of a type that no GEMM here takes were compared by their bits only" if skipped else ""
    covered = {
        "identity": f"{ONE_HOT} one-hot tokens for each expert and projection read its weights back, bit for bit",
        "gemm": f"grouped GEMM (ragged_dot): {how}; largest difference {largest:.1e} of a row's norm{left}",
        "gradients": f"of gate, up, down and the input, in {EXPERTS_PER_CALL} experts of the first and the last MoE layer",
    }
    return tuple(
        Level(name=name, covered=text, differences=tuple(dict.fromkeys(found[name])), errors=errors if name == "gemm" else {})
        for name, text in covered.items()
    )


def _chunks(experts: int) -> Iterator[range]:
    for start in range(0, experts, EXPERTS_PER_CALL):
        yield range(start, min(start + EXPERTS_PER_CALL, experts))
