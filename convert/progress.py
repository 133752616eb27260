"""Progress that a caller may watch, and bars on a terminal for who runs the command.

In: bytes that are done, and the phase that they are of. Out: nothing, or bars on stderr. It knows no phase by name.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar, runtime_checkable

from convert.options.values import in_units
from convert.terminal import columns, fitted

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call, from one thread at a time; it may be `Phased`."""
_BEAT = 0.5
"""Seconds between two drawings of a bar, while nothing is done."""
LINE, RECORD = 30.0, 1.0
"""Seconds between two lines of progress for people who read a log, and for programs."""
KINDS = ("auto", "bar", "plain", "json", "none")
"""How progress can be shown; `auto` is a bar on a terminal, and else a plain line from time to time."""


@runtime_checkable
class Phased(Protocol):
    """Progress that tells phases apart."""

    def __call__(self, done: int) -> None:
        """So many bytes of the phase are done since the last call."""

    def phase(self, name: str, total: int | None) -> None:
        """Another phase begins, of so many bytes, if that is known."""

    def at(self, what: str) -> None:
        """What the phase is at: `layer 3/48`."""


@runtime_checkable
class Telling(Protocol):
    """Progress that a line of text can be shown beside."""

    def tell(self, text: str) -> None:
        """A line for people."""


def ignore(done: int) -> None:
    """Progress that nobody watches."""


def stoppable(progress: Progress, stop: threading.Event) -> Callable[[int], None]:
    """What several workers call: `progress` by one at a time, and an end of their work once they should stop."""
    lock = threading.Lock()

    def told(done: int) -> None:
        if stop.is_set():
            raise InterruptedError("stopped")
        with lock:
            progress(done)

    return told


def begin(progress: Progress, name: str, total: int | None = None) -> None:
    """Say that a phase begins, to whoever tells phases apart."""
    if isinstance(progress, Phased):
        progress.phase(name, total)


def say(progress: Progress, what: str) -> None:
    """Say what the phase is at."""
    if isinstance(progress, Phased):
        progress.at(what)


def announce(progress: Progress, text: Callable[[], str]) -> None:
    """Tell people something before the work begins; it is made only if anybody watches."""
    if isinstance(progress, Telling):
        progress.tell(text())


class Bars:
    """A bar for each phase, with a rate and a time left of its own. It is drawn from two threads, one at a time."""

    def __init__(self, bar: Callable[..., Any], file: Any = None) -> None:
        self._new, self._lock, self._name, self._bar = bar, threading.Lock(), "", None
        self._file = file or sys.stderr

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

    def tell(self, text: str) -> None:
        """See `Telling`; the line stands above the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.write(fitted(f"convert: {text}", columns(self._file)), file=self._file)

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


class Lines:
    """A line at most every so many seconds, in words or as JSON: for logs and for programs."""

    def __init__(self, name: str, total: int | None, *, json: bool = False, file: Any = None) -> None:
        self._json, self._file, self._every = json, file or sys.stderr, RECORD if json else LINE
        self._lock, self._what, self._told = threading.Lock(), "", time.monotonic()
        self._name, self._total, self._done, self._began = name, total, 0, self._told

    def __call__(self, done: int) -> None:
        """See `Phased`."""
        with self._lock:
            self._done += done
        self.beat()

    def phase(self, name: str, total: int | None) -> None:
        """See `Phased`."""
        with self._lock:
            if self._json and self._done:
                self._tell(time.monotonic())
            self._name, self._total, self._done, self._what, self._began = name, total, 0, "", time.monotonic()

    def at(self, what: str) -> None:
        """See `Phased`."""
        self._what = what

    def tell(self, text: str) -> None:
        """See `Telling`; programs have the same numbers from `--dry-run --json`."""
        if not self._json:
            self._print(f"convert: {text}")

    def beat(self) -> None:
        """Say where it is, if it is time."""
        with self._lock:
            if (now := time.monotonic()) - self._told >= self._every:
                self._tell(now)

    def close(self) -> None:
        """Programs are told the last number, too."""
        with self._lock:
            if self._json:
                self._tell(time.monotonic())

    def _tell(self, now: float) -> None:
        self._told, rate = now, self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / rate if self._total and rate else None
        if self._json:
            found = {"phase": self._name, "at": self._what, "done": self._done, "total": self._total}
            line = json.dumps({**found, "bytes_per_second": round(rate), "seconds_left": left and round(left, 1)})
        else:
            of = f" of {in_units(self._total)}" if self._total else ""
            ahead = f", {left:.0f} s left" if left is not None else ""
            where = ": ".join(filter(None, ("convert", self._name, self._what)))
            line = f"{where}: {in_units(self._done)}{of}, {in_units(rate)}/s{ahead}"
        self._print(line)

    def _print(self, line: str) -> None:
        """A log whose disk is full, or whose terminal has gone, ends no hours of work; a reader who leaves does."""
        try:
            print(line, file=self._file, flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            pass


def watching(kind: str, name: str = "", total: int | None = None) -> AbstractContextManager[Progress | None]:
    """Progress as a user wants it shown, on stderr; see `KINDS`."""
    if kind == "none":
        return nullcontext()
    if kind == "bar" or (kind == "auto" and sys.stderr.isatty()):
        return bars(name, total)
    return _kept_alive(Lines(name, total, json=kind == "json"))


_Shown = TypeVar("_Shown", Bars, Lines)


@contextmanager
def bars(name: str = "", total: int | None = None, file: Any = None) -> Iterator[Bars]:
    """Bars on stderr, the first of which is there at once; each moves while a long step has nothing to say."""
    from tqdm import tqdm

    where = file or sys.stderr
    found = Bars(lambda **words: tqdm(**words, unit="B", unit_scale=True, file=where, dynamic_ncols=True, leave=False), where)
    found.phase(name, total)
    with _kept_alive(found):
        yield found


@contextmanager
def _kept_alive(found: _Shown) -> Iterator[_Shown]:
    """With a thread that lets it say that time passes."""
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
