"""Run the command confined: in a process of its own that is killed when it takes too long or too much.

It is forked off one that has imported the tool, is a session of its own with nothing on stdin, and has none of the rights by
which root passes permission checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scripts._forked import Forks

SECONDS, BYTES = 20.0, 1 << 30
"""What a command may take of time and of resident memory."""
CHILD = "import sys; from scripts._confined import confined; sys.exit(confined(*sys.argv[1:]))"
_LARGEST = 256 << 20
"""Bytes of the largest file that a child may write: the inputs have 200 kB, and the disk is not ours alone."""
_LOOK = 0.02
"""Seconds between two looks at a child's memory."""
_CAPABILITIES = 0x20080522
"""Version 3 of capset's header: two words for each set."""
_PASSES = ~(1 << 1 | 1 << 2) & 0xFFFFFFFF
"""All capabilities but CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What became of a command: the exit code, or the signal that ended it; `stopped` says why we killed it, if we did."""

    code: int | None
    signal: int | None
    stopped: str
    seconds: float
    cpu: float
    peak: int
    stdout: str = field(repr=False)
    stderr: str = field(repr=False)


def run(forks: Forks, argv: Sequence[str], folder: Path) -> Ran:
    """Run a command in a folder to its end, or to that of our patience."""
    started = time.monotonic()
    child, printed = forks.start(CHILD, folder, *argv)
    stopped = _watch(child, started)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has started
    ended = forks.end(child, printed)
    code = ended.returncode
    return Ran(
        code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        stopped=stopped or ("memory" if ended.peak > BYTES else ""),
        seconds=time.monotonic() - started,
        cpu=ended.cpu,
        peak=ended.peak,
        stdout=ended.stdout,
        stderr=ended.stderr,
    )


def _watch(child: int, started: float) -> str:
    """Wait for the end of a child; kill it for what the answer says."""
    descriptor = os.pidfd_open(child)
    try:
        while not select.select([descriptor], [], [], _LOOK)[0]:
            late, large = time.monotonic() > started + SECONDS, _resident(child) > BYTES
            if late or large:
                os.kill(child, signal.SIGKILL)
                return "time" if late else "memory"
        return ""
    finally:
        os.close(descriptor)


def _resident(child: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{child}/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
    return 0


def confined(folder: str, *argv: str) -> int:
    """Be the command, in the child; the exit code."""
    import convert.cli

    os.setsid()
    os.chdir(folder)
    _give_up_rights()
    os.fsync = os.fdatasync = lambda _: None  # nobody pulls the plug, and a busy disk would take most of the time
    return convert.cli.main(argv)


def _give_up_rights() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST, _LARGEST))
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        if libc.capget(header, sets) == 0:  # effective, permitted, inheritable; then the upper words of the three
            sets[0] &= _PASSES
            libc.capset(header, sets)
