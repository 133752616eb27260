"""Freed memory goes back to the system at once, so that what is resident is what is held."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE = 256 << 10


def return_memory() -> None:
    """Let the C library give blocks of 256 KiB and more a mapping of their own, which ends when they are freed.

    By default glibc keeps what was freed for each thread that ever allocated, up to 32 MiB a block: with the dozens of threads
    of TensorStore that was 200 MB and more. Other C libraries have no such knob and no such habit.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_ARENA_MAX, 2)
