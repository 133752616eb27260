"""What a verification will cost here: found by doing a little of it, on the first experts.

In: the layers of two checkpoints. Out: an estimate. It never gives a verdict.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convert.options import Verification
from convert.options.option import workers
from convert.progress import ignore
from convert.verifier.bits import exact
from convert.verifier.bits.logical import Block, Scope, pair
from convert.verifier.bits.order import experts_held, places_of
from layouts.reader import Reader
from layouts.tensors import itemsize, total_bytes

if TYPE_CHECKING:
    from convert.verifier.gemms.gemm import How

_SAMPLE = 16 << 20
"""Bytes that are hashed to see how fast that is."""
CALLS = 3
"""Calls of the probes that are tried; the first compile, so the last is timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Experts of all layers, their `nbytes` in one checkpoint, the FLOP of the probes, `seconds` of the experts' part."""

    layers: int
    experts: int
    nbytes: int
    flop: float
    seconds: float
    timed: int
    hashing: float = 0.0
    """Seconds of the content digests, if they are asked for."""

    def __str__(self) -> str:
        seconds = f"{self.seconds / 60:.0f} minutes" if self.seconds > 120 else f"{self.seconds:.1f} s"
        digests = f"\ndigests  about {self.hashing:.1f} s more, at the speed of sha256" if self.hashing else ""
        return (
            f"experts  {self.experts} in {self.layers} MoE layers, {self.nbytes / 1e9:.2f} GB in each checkpoint\n"
            f"probes   {self.flop:.1e} FLOP\n"
            f"time     about {seconds} here, by {self.timed} of the first experts; other tensors at the speed of the disk"
            f"{digests}"
        )


def measure(
    a: Mapping[str, Block],
    b: Mapping[str, Block],
    scope: Scope,
    how: How | None,
    options: Verification,
    hashed: Iterable[Reader] = (),
) -> Cost:
    """Try the first experts of the first layer, and of those that are decoded with it, and multiply.

    Checkpoints that are `hashed` are so for their content digests.
    """
    pairs = [one for one, _ in pair(a, b)]
    experts = [len(scope.of(range(one.experts))) for one in pairs]
    nbytes = sum(count * _nbytes(one) for count, one in zip(experts, pairs, strict=True))
    flop = sum(count * _flop(one, scope, how) for count, one in zip(experts, pairs, strict=True)) if how else 0.0
    if not pairs:
        return Cost(layers=0, experts=0, nbytes=0, flop=0, seconds=0, timed=0, hashing=_hashing(hashed))
    seconds, timed = _try(*_first(a, b), scope, how, options)
    each = nbytes / sum(experts) / _nbytes(pairs[0])  # how much larger than those of the first layer they are on average
    return Cost(
        layers=len(pairs),
        experts=sum(experts),
        nbytes=nbytes,
        flop=flop,
        seconds=seconds * each * sum(experts),
        timed=timed,
        hashing=_hashing(hashed),
    )


def _hashing(readers: Iterable[Reader]) -> float:
    """Seconds that sha256 takes for all tensors of these checkpoints on as many workers as there will be."""
    block = bytes(_SAMPLE)
    started = time.perf_counter()
    hashlib.sha256(block).digest()
    each = (time.perf_counter() - started) / len(block)
    return each * sum(total_bytes(reader.tensors) for reader in readers) / workers(None)


def _first(a: Mapping[str, Block], b: Mapping[str, Block]) -> tuple[dict[str, Block], dict[str, Block]]:
    """The first layer, with those whose first experts are decoded together with its own."""
    keys = [key for key in a if key in b]
    places = {key: places_of((a[key], b[key]), 0) for key in keys}
    alike = [key for key in keys if places[key] == places[keys[0]]] if any(map(any, places[keys[0]])) else keys[:1]
    return {key: a[key] for key in alike}, {key: b[key] for key in alike}


def _try(
    a: Mapping[str, Block], b: Mapping[str, Block], scope: Scope, how: How | None, options: Verification
) -> tuple[float, int]:
    """Seconds for an expert, and how many were tried: of all these layers by their bits, of some through the probes."""
    from convert.verifier.gemms.calls import fit
    from convert.verifier.gemms.gemm import compare_outputs

    pairs = list(pair(a, b))
    allowed = fit(pairs[0], how.memory, how.ways) if how else None
    count = allowed.experts if allowed else 8
    held = min(map(experts_held, pairs[0]))
    chosen = scope.of(range(pairs[0][0].experts))[: min(CALLS * count, held)]
    narrow = Scope(experts=frozenset(chosen), tokens=scope.tokens)
    ticks: list[float] = []

    def tick(done: int) -> None:  # noqa: ARG001
        ticks.append(time.perf_counter())

    tick(0)
    exact.compare_experts(a, b, ignore, narrow, options.memory, options.jobs)
    seconds = (time.perf_counter() - ticks[0]) / (len(chosen) * len(pairs))
    if how and allowed:
        seconds *= 2 if len(pairs) > 1 else 1  # windows are loaded once more
        some = list(a)[:CALLS]
        compare_outputs({key: a[key] for key in some}, {key: b[key] for key in some}, narrow, how, progress=tick)
        seconds += (ticks[-1] - ticks[-2]) / min(count, held)
    return seconds, len(chosen) * len(pairs)


def _nbytes(block: Block) -> int:
    """Bytes of one expert."""
    from convert.verifier.gemms.calls import values

    group = block.groups["wi", ""]
    return values(block) * itemsize(group.dtype)


def _flop(block: Block, scope: Scope, how: How | None) -> float:
    """Of one expert, in both checkpoints and all backends: two for each weight and row."""
    from convert.verifier.gemms.calls import values
    from convert.verifier.gemms.rows import ONE_HOT, RANDOM

    rows = (ONE_HOT + RANDOM) * scope.tokens
    return 2 * 2 * rows * values(block) * len(how.backends) if how else 0.0
