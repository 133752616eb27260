"""One conversion or verification by several processes, on one machine or many that share a file system; JAX connects them.

In: what each process has to say. Out: agreement, and each one's share of the work. It never touches the disk.

Of a conversion every process makes the same plan and writes its share of the output into the staging directory of the first
one, which alone opens it, writes what stands beside the tensors and publishes. Of a verification each does a stretch of the
work (`stretch`), and they tell each other what they have found (`gather`). They meet at few points (`agree`); a process that
fails says so, and the others stop; one that dies is noticed by JAX's coordination service, which ends the others; one that
lives and gets no further (a disk that hangs) is given up after `SILENT` seconds. What is journalled is kept either way,
whatever the number of processes next time.
"""

from __future__ import annotations

import bisect
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from convert.errors import StorageError, UsageError
from convert.progress import Progress, begin, say

HELD = 160 << 20
"""Bytes that JAX takes in a process."""
_LOOK = 1.0
"""Seconds between two looks at whether another process has failed."""
SILENT = 1800.0
"""Seconds without progress in another process until it is given up: more than flushing a file or hashing one tensor takes."""
_MESSAGE = 1 << 20
"""Characters in one message to the others; the service takes no more than 4 MiB."""
_RUNS = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """A caller's progress (see `convert.progress.Phased`), and a look at the other processes before each word."""

    progress: Progress
    look: Callable[[], None]

    def __call__(self, done: int) -> None:
        self.look()
        self.progress(done)

    def phase(self, name: str, total: int | None) -> None:
        self.look()
        begin(self.progress, name, total)

    def at(self, what: str) -> None:
        self.look()
        say(self.progress, what)


@dataclass(slots=True, kw_only=True, eq=False)
class Processes:
    """This process and the others; without a `client` of JAX's coordination service, it is alone."""

    index: int = 0
    count: int = 1
    client: Any = None
    _run: int = 0
    _met: int = 0
    _looked: float = field(default=0.0)

    @property
    def first(self) -> bool:
        """Whether this is the one that opens and publishes."""
        return self.index == 0

    @property
    def held(self) -> int:
        """Bytes that a process needs more than one that is alone."""
        return HELD if self.count > 1 else 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run one conversion; what goes wrong here is told to the others."""
        self._run, self._met = next(_RUNS), 0
        try:
            yield
        except BaseException as error:
            self._tell("failed", f"process {self.index} of {self.count} stopped: {error or type(error).__name__}")
            raise

    def agree(self, step: str, value: str = "") -> None:
        """Wait until all are here, with the same value.

        Raises:
            StorageError: another process has failed.
            UsageError: another process has another value.
        """
        if self.count == 1:
            return
        for other, found in enumerate(self.gather(f"{step} {value}")):
            if found != f"{step} {value}":
                raise UsageError(
                    f"process {other} is at {found!r}, process {self.index} at '{step} {value}': all processes must be given "
                    "the same options and see the same input"
                )

    def gather(self, text: str) -> list[str]:
        """What each process says here, in their order; it waits until all have spoken.

        Raises:
            StorageError: another process has failed, or has made no progress for so long that it is given up.
        """
        if self.count == 1:
            return [text]
        self._met += 1
        place = f"convert/{self._run}/{self._met}"
        pieces = [text[at : at + _MESSAGE] for at in range(0, len(text), _MESSAGE)]
        for number, piece in enumerate([str(len(pieces)), *pieces]):
            self.client.key_value_set(f"{place}/{self.index}/{number}", piece)
        found = []
        for other in range(self.count):
            count = int(self._wait_for(f"{place}/{other}/0", other))
            found.append("".join(self._wait_for(f"{place}/{other}/{number + 1}", other) for number in range(count)))
        return found

    def stretch(self, sizes: Sequence[int]) -> slice:
        """The pieces in a row that are this process's own; each piece is one's in whose part of the total it begins."""
        ends, total = list(itertools.accumulate(sizes)), max(1, sum(sizes))
        owners = [min(self.count - 1, (end - size) * self.count // total) for end, size in zip(ends, sizes, strict=True)]
        return slice(bisect.bisect_left(owners, self.index), bisect.bisect_right(owners, self.index))

    def mine(self, sizes: Sequence[int]) -> list[int]:
        """The numbers of the pieces of work that are this process's own."""
        return share(sizes, self.count)[self.index]

    def watched(self, progress: Progress) -> Progress:
        """The same callback, which stops this process soon after another has failed."""
        return progress if self.count == 1 else _Watched(progress=progress, look=self._look_at_times)

    def _look_at_times(self) -> None:
        if (now := time.monotonic()) > self._looked + _LOOK:
            self._looked = now
            self._tell("at work", str(now))
            self._look()

    def _tell(self, what: str, text: str) -> None:
        if self.count > 1:
            with suppress(RuntimeError):  # whoever coordinates may be gone, and with it those who could be told
                self.client.key_value_set(f"convert/{self._run}/{what}/{self.index}", text, True)

    def _look(self) -> None:
        for _, text in self.client.key_value_dir_get(f"convert/{self._run}/failed"):
            raise StorageError(f"{text}. The input is untouched; run the same commands again to go on")

    def _last_word(self, other: int) -> str:
        """Of a process at work: it changes as that goes on."""
        place = f"convert/{self._run}/at work"
        return "".join(text for key, text in self.client.key_value_dir_get(place) if key.endswith(f"/{other}"))

    def _wait_for(self, key: str, other: int) -> str:
        heard, since = "", time.monotonic()
        while True:
            self._look()
            if (word := self._last_word(other)) != heard:
                heard, since = word, time.monotonic()
            if time.monotonic() > since + SILENT:
                raise StorageError(
                    f"process {other} of {self.count} has made no progress for {SILENT:g} s; see whether its disk or host "
                    "hangs, and end it. The input is untouched; run the same commands again to go on"
                )
            try:
                return str(self.client.blocking_key_value_get(key, int(1000 * _LOOK)))
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise StorageError(f"the process that coordinates cannot be reached any more: {error}") from error


ALONE = Processes()


def connect(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> Processes:
    """This process among those of a JAX program that are started alike; JAX finds out what is not given, where it can.

    If `jax.distributed` has been initialized already, what it knows is taken.

    Raises:
        UsageError: JAX cannot tell how many processes there are, or which this is, or the coordinator has no port.
    """
    import jax
    from jax._src.distributed import global_state  # its client, which JAX does not export; Orbax takes it from here, too

    if coordinator is not None and not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise UsageError(f"--coordinator: {coordinator!r} is no HOST:PORT, such as host0:1234")
    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        except (ValueError, TypeError, RuntimeError) as error:
            raise UsageError(f"jax.distributed: {error} Give --coordinator, --num-processes and --process-id") from error
    count = global_state.num_processes
    return Processes(index=int(global_state.process_id), count=int(count), client=global_state.client)


def share(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Divide pieces of work among `count` processes: the numbers of each one's pieces, so that the largest total is small.

    The largest piece goes first, to whoever has least; for pieces far smaller than a share this is as good as it gets.
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        least = min(range(count), key=totals.__getitem__)
        shares[least].append(number)
        totals[least] += sizes[number]
    return [sorted(each) for each in shares]
