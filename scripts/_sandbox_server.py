"""A fork server: a process that has imported the tool, and forks a child for each command, so that one costs milliseconds.

What it imports is what a conversion imports: a first child says so (`warm`). TensorStore is imported but never used in the
server itself, because its threads would not be in the children. A child is a session of its own with nothing on stdin. It is
killed when it takes too long or too much, and has none of the rights by which root passes permission checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS, BYTES = 20.0, 1 << 30
"""What a command may take of time and of resident memory."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command: where it runs, and where its texts go. With `modules`, its stdout is the names of what it has imported."""

    argv: Sequence[str]
    cwd: str
    stdout: str
    stderr: str
    modules: bool = False


@dataclass(slots=True)
class Server:
    """The client's side: `with Server() as server: server.run(...)`."""

    _process: subprocess.Popen[str] | None = field(default=None)

    def __enter__(self) -> Server:
        # A second thread of OpenBLAS would not be in the children either.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", "from scripts._sandbox_server import serve; serve()"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        with self._process:  # closes the pipes, at which it ends
            pass

    def run(self, request: Request) -> Ran:
        """Run a command to its end, or to that of our patience."""
        return Ran(**self._ask(asdict(request)))

    def warm(self, request: Request) -> None:
        """Run a command, and import in the server whatever it has imported."""
        ran = self.run(Request(**{**asdict(request), "modules": True}))
        if ran.code != 0:
            raise RuntimeError(f"{request.argv}: {ran}\n{Path(request.stderr).read_text(errors='replace')}")
        self._ask({"import": Path(request.stdout).read_text().splitlines()[-1].split()})

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process is not None
        pipes = self._process.stdin, self._process.stdout
        assert pipes[0] is not None
        assert pipes[1] is not None
        pipes[0].write(json.dumps(question) + "\n")
        pipes[0].flush()
        return json.loads(pipes[1].readline())


def serve() -> None:
    """Answer questions until there are no more."""
    questions, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whoever prints while it is imported must not answer
    import convert.cli

    for line in questions:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        if "import" in question:
            for name in question["import"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        else:
            answer = _run(Request(**question), convert.cli.main, (questions, answers))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(request: Request, main: Any, ours: Sequence[IO[str]]) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if not child:
        _become(request, main, ours)
    stopped = _watch(child, started)
    _, status, used = os.wait4(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has started
    ran = Ran(
        code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        stopped=stopped or ("memory" if used.ru_maxrss << 10 > BYTES else ""),
        seconds=time.monotonic() - started,
        cpu=used.ru_utime + used.ru_stime,
        peak=used.ru_maxrss << 10,
    )
    return asdict(ran)


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


def _become(request: Request, main: Any, ours: Sequence[IO[str]]) -> None:
    """Run the command in this child; never returns."""
    code = 1
    try:
        os.setsid()
        for file in ours:
            os.close(file.fileno())
        _redirect(request)
        os.chdir(request.cwd)
        _give_up_rights()
        os.fsync = os.fdatasync = lambda _: None  # nobody pulls the plug, and a busy disk would take most of the time
        code = _call(main, request.argv)
        getattr(threading, "_shutdown", lambda: None)()  # the interpreter waits for threads, too
        if request.modules:
            print("\n" + " ".join(sorted(name for name, found in sys.modules.items() if found and name != "__main__")))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _call(main: Any, argv: Sequence[str]) -> int:
    try:
        return int(main(list(argv)))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))


def _redirect(request: Request) -> None:
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request.stdout, writing), (2, request.stderr, writing)):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)


def _give_up_rights() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST, _LARGEST))
    if os.geteuid() == 0:
        header, word = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0), 0xFFFFFFFF
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        if libc.capget(header, sets) == 0:  # effective, permitted, inheritable; then the upper words of the three
            sets[0] &= _PASSES & word
            libc.capset(header, sets)
