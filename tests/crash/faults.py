"""Run the command with one system call failing, some ten times a second: see `faults.c`.

A process that has imported all that the command needs, with the library preloaded, forks for each run; so none has to start
Python. Nothing has started a thread in it, which a fork would lose.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import importlib
import json
import os
import pkgutil
import re
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parents[2]
SHORT = -1
LIMIT = 60
"""Seconds after which a run hangs, and is ended by SIGALRM."""
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


class Command:
    """The `convert` command, on files below `root`; close it in the end."""

    def __init__(self, library: Path, root: Path) -> None:
        self.root, self._home = root.resolve(), library.parent
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = os.environ | threads | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-W", "ignore", __file__, library]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._ask: IO[str] = self._process.stdin  # type: ignore[assignment]
        self._answer: IO[str] = self._process.stdout  # type: ignore[assignment]

    def run(self, *arguments: object, fault: Fault = NONE) -> Outcome:
        """Run it once."""
        text, log = self._home / "text", self._home / "log"
        kind = SHORT if fault.kind == "SHORT" else getattr(errno, fault.kind or "EIO")
        request = {"arguments": list(map(str, arguments)), "root": str(self.root), "text": str(text), "log": str(log)}
        print(json.dumps(request | {"call": fault.call, "n": fault.n, "kind": kind}), file=self._ask, flush=True)
        code = int(self._answer.readline())
        lines = [line.split(" ", 1) for line in log.read_text().splitlines()]
        struck = next((number for number, (call, _) in enumerate(lines) if call.startswith("!")), None)
        calls = [(call.lstrip("!"), path.removeprefix(f"{self.root}/")) for call, path in lines]
        return Outcome(code=code, text=text.read_text(), calls=calls, struck=struck)

    def close(self) -> None:
        """Let the process end."""
        self._ask.close()
        self._answer.close()
        self._process.wait()


def serve(library: str) -> None:
    """Fork for each request on stdin, and answer with the exit code."""
    arm = ctypes.CDLL(library).faults_arm
    arm.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int)
    for package in map(importlib.import_module, ("convert", "layouts")):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):  # that would run it
                importlib.import_module(module.name)
    gc.freeze()  # else the first collection in each fork copies all memory
    for line in sys.stdin:
        assert len(os.listdir("/proc/self/task")) == 1, "a thread that the forked process would not have"
        child = os.fork()
        if not child:
            _run(arm, **json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(arm: Any, *, arguments: Sequence[str], root: str, text: str, log: str, call: str, n: int, kind: int) -> NoReturn:
    """Be the command; its threads end with it."""
    code = 99
    try:
        new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        printed = os.open(text, new)
        for stream in (1, 2):
            os.dup2(printed, stream)
        signal.alarm(LIMIT)
        arm(os.fsencode(root), call.encode(), n, kind, os.open(log, new))
        sys.argv = ["convert", *arguments]
        runpy.run_module("convert", run_name="__main__")
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
