"""Progress that a caller may watch.

In: bytes that are done. Out: nothing. It never prints.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call, from one thread at a time."""


def ignore(done: int) -> None:
    """Progress that nobody watches."""
