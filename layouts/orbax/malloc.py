"""Freed memory goes back to the system, so that what is resident is what is held.

In: a size. Out: nothing; the C library is told. It never frees anything itself.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
KEPT = 8
"""How many times the limit may stay with the C library: two arenas, each up to four times the limit."""


def keep_below(nbytes: int) -> None:
    """Let the C library give blocks of `nbytes` and more a mapping of their own, which ends when they are freed.

    By default glibc keeps what was freed for each thread that ever allocated, up to 32 MiB a block: with the dozens of threads
    of TensorStore that was 200 MB and more. New mappings have their price, though (conversions took twice the time), so that
    the limit is high where memory is plenty: up to 32 MiB, the most that glibc takes. Other C libraries have no such knob.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, nbytes)
        mallopt(_M_TRIM_THRESHOLD, KEPT // 2 * nbytes)
        mallopt(_M_ARENA_MAX, 2)
