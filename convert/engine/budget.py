"""How many workers may run within `--memory`, and what each may hold.

In: the budget in bytes. Out: `Budget`. It never looks at a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

from convert.engine.blocks import SLAB
from convert.errors import too_little
from convert.options.option import workers

STRIP = 8 << 20
"""Bytes of a strip: large enough to hide the cost of a call, small enough that many workers fit a small budget."""
SYNC = 1 << 30
"""Bytes written between two syncs: what a power cut can cost."""
BASE, EACH = 96 << 20, 3 << 10
"""Bytes that the process needs before the first block: interpreter and NumPy, and the plan, per tensor that it names."""
USUAL = 20_000
"""Tensors that a plan names, when the caller does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How many workers may run, and the bytes each may hold: one strip being filled and one slab of a source.

    `base` is what the process holds besides, and `each` what a worker does where values are computed.
    """

    jobs: int
    strip: int
    base: int
    each: int = 0

    @property
    def peak(self) -> int:
        """The bound on resident memory that the plan prints, in bytes."""
        return self.base + self.jobs * (self.strip + SLAB + self.each)


def make_budget(memory: int, jobs: int | None, tensors: int = USUAL, *, base: int = 0, each: int = 0) -> Budget:
    """Fit as many workers as asked for (default: one per CPU that we may use, at most 8) into `memory` bytes.

    `tensors` counts those of the input and of the output; `base` and `each` come on top, at any rate and by worker.

    Raises:
        UsageError: not even one fits.
    """
    base += BASE + EACH * max(tensors, USUAL)
    fit = (memory - base) // (SLAB + STRIP + each)
    if fit < 1:
        least = (base + SLAB + STRIP + each >> 20) + 1
        raise too_little(memory, f"one worker and the plan need {least} MiB")
    return Budget(jobs=min(workers(jobs), fit), strip=STRIP, base=base, each=each)
