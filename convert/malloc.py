"""Freed memory goes back to the system, so that what is resident is what is held."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8


def keep_below(nbytes: int) -> None:
    """Let the C library give blocks of `nbytes` and more a mapping of their own, which ends when they are freed.

    By default glibc keeps what was freed for each thread that ever allocated, up to 32 MiB a block: with the dozens of threads
    of TensorStore that was 200 MB and more. New mappings have their price, though, so that where memory is plenty the limit is
    high. Other C libraries have no such knob and no such habit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, nbytes)
        mallopt(_M_ARENA_MAX, 2)
