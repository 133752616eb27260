"""Run the command with one system call failing, some ten times a second: see `faults.c`.

Each run is forked off a process that has preloaded the library and imported all that the command needs.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scripts._forked import Forks

SHORT = -1
_READ, _WRITE = ("EIO", "EINTR", "SHORT"), ("EIO", "ENOSPC", "EINTR", "SHORT")
KINDS: Mapping[str, tuple[str, ...]] = {
    "open": ("EIO", "EACCES", "EINTR"),
    "opendir": ("EIO", "EACCES"),
    "create": ("EIO", "ENOSPC", "EACCES", "EINTR"),
    "read": _READ,
    "pread": _READ,
    "write": _WRITE,
    "pwrite": _WRITE,
    "copy_file_range": _WRITE,
    "sendfile": _WRITE,
    "fsync": ("EIO", "ENOSPC", "EINTR"),
    "fallocate": ("EIO", "ENOSPC", "EINTR"),
    "truncate": ("EIO", "EINTR"),
    "rename": ("EIO", "ENOSPC", "EACCES"),
    "mkdir": ("EIO", "ENOSPC", "EACCES"),
    "unlink": ("EIO", "EACCES"),
}
"""What may happen to each call; `create` is an `open` that makes the file."""
WRITING = ("create", "write", "pwrite", "copy_file_range", "sendfile", "fallocate", "truncate")
NAMING = ("create", "mkdir", "rename", "unlink")
LOCK = ".__lock"
"""What TensorStore adds to the name of a file that it writes, before it is renamed."""


class Fault(NamedTuple):
    """What happens to the `n`-th call, from 1, of those on files of the test."""

    call: str = ""
    n: int = 0
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.call} {self.n} {self.kind}"


NONE = Fault()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The exit code (negative: the signal), what was printed, and all calls with their paths; one of them may be struck."""

    code: int
    text: str
    calls: Sequence[tuple[str, str]]
    struck: int | None

    @property
    def place(self) -> str:
        """The path that was struck."""
        return "nothing" if self.struck is None else self.calls[self.struck][1]

    def faults(self, *, every: bool) -> list[Fault]:
        """All that another such run can meet; or only at the first and the last call of a name on each file."""
        places: dict[tuple[str, str], list[int]] = {}
        counts: Counter[str] = Counter()
        for call, path in self.calls:
            counts[call] += 1
            alike = str(counts[call]) if every else re.sub(r"[0-9a-f]{8,}|\d+", "#", path)
            places.setdefault((call, alike), []).append(counts[call])
        ends = [(call, n) for (call, _), found in places.items() for n in sorted({found[0], found[-1]})]
        return [Fault(call, n, kind) for call, n in ends for kind in KINDS[call]]


def not_durable(runs: Sequence[Outcome], out: str) -> set[str]:
    """What a power cut could have taken when it got the name `out`: files that were written, directories with other entries."""
    dirty: set[str] = set()
    stage = ""
    calls = [call for run in runs for number, call in enumerate(run.calls) if number != run.struck]
    for call, path in calls:
        if call == "rename" and path == out:
            return {path for path in dirty if f"{path}/".startswith(f"{stage}/new/")}
        path = path.removesuffix(LOCK)
        if path.startswith(f"{out}.partial-"):
            stage = path.split("/")[0]
        if call in ("fsync", "unlink"):
            dirty.discard(path)
        if call in WRITING:
            dirty.add(path)
        if call in NAMING:
            dirty.add(os.path.dirname(path))
    return set()


def build(folder: Path) -> Path | None:
    """The library; None where there is no C compiler, or no Linux."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "faults.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, Path(__file__).with_name("faults.c")], check=True)
    return library


CHILD = """
import ctypes, os, runpy, sys
library, root, log, call, n, kind = sys.argv[1:7]
del sys.argv[1:7]
arm = ctypes.CDLL(library).faults_arm
arm.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
arm(os.fsencode(root), call.encode(), int(n), int(kind), log)
runpy.run_module("convert", run_name="__main__")
"""


class Command:
    """The `convert` command, on files below `root`; close it in the end."""

    def __init__(self, library: Path, root: Path) -> None:
        self.root, self._library = root.resolve(), library
        self._forks = Forks(LD_PRELOAD=str(library), JAX_PLATFORMS="cpu", PYTHONWARNINGS="ignore")

    def run(self, *arguments: object, fault: Fault = NONE) -> Outcome:
        """Run it once."""
        log = self._library.with_name("log")
        kind = SHORT if fault.kind == "SHORT" else getattr(errno, fault.kind or "EIO")
        ended = self._forks.run(CHILD, self._library, self.root, log, fault.call, fault.n, kind, *arguments)
        lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
        struck = next((number for number, (call, _) in enumerate(lines) if call.startswith("!")), None)
        calls = [(call.lstrip("!"), path.removeprefix(f"{self.root}/")) for call, path in lines]
        return Outcome(code=ended.returncode, text=ended.stdout + ended.stderr, calls=calls, struck=struck)

    def close(self) -> None:
        """Let the process end that they are forked off."""
        self._forks.close()
