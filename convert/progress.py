"""Progress that a caller may watch, and bars on a terminal for who runs the command.

In: bytes that are done, and the phase that they are of. Out: nothing, or bars on stderr. It knows no phase by name.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call, from one thread at a time; it may be `Phased`."""
_BEAT = 0.5
"""Seconds between two drawings of a bar, while nothing is done."""


@runtime_checkable
class Phased(Protocol):
    """Progress that tells phases apart."""

    def __call__(self, done: int) -> None:
        """So many bytes of the phase are done since the last call."""

    def phase(self, name: str, total: int | None) -> None:
        """Another phase begins, of so many bytes, if that is known."""

    def at(self, what: str) -> None:
        """What the phase is at: `layer 3/48`."""


def ignore(done: int) -> None:
    """Progress that nobody watches."""


def begin(progress: Progress, name: str, total: int | None = None) -> None:
    """Say that a phase begins, to whoever tells phases apart."""
    if isinstance(progress, Phased):
        progress.phase(name, total)


def say(progress: Progress, what: str) -> None:
    """Say what the phase is at."""
    if isinstance(progress, Phased):
        progress.at(what)


class Bars:
    """A bar for each phase, with a rate and a time left of its own. It is drawn from two threads, one at a time."""

    def __init__(self, bar: Callable[..., Any]) -> None:
        self._new, self._lock, self._name, self._bar = bar, threading.Lock(), "", None

    def __call__(self, done: int) -> None:
        """See `Phased`."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(done)

    def phase(self, name: str, total: int | None) -> None:
        """See `Phased`."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._name, self._bar = name, self._new(desc=name or None, total=total)

    def at(self, what: str) -> None:
        """See `Phased`."""
        with self._lock:
            if self._bar is not None:
                self._bar.set_description(f"{self._name}: {what}", refresh=False)

    def beat(self) -> None:
        """Draw the bar as it is, with the time that has passed."""
        with self._lock:
            if self._bar is not None:
                self._bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
            self._bar = None


@contextmanager
def bars(name: str = "", total: int | None = None, file: Any = None) -> Iterator[Bars]:
    """Bars on stderr, the first of which is there at once; each moves while a long step has nothing to say."""
    from tqdm import tqdm

    where = file or sys.stderr
    found = Bars(lambda **words: tqdm(**words, unit="B", unit_scale=True, file=where, dynamic_ncols=True, leave=False))
    found.phase(name, total)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT):
            found.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.close()
