"""Run code in processes of its own, of which none has to start Python: each is forked off one that has imported the tool.

What they do and how they end is what a process of `python -c CODE` does: it can be killed, it has threads, handlers and an exit
code of its own. Nothing has started a thread in the process that forks, which a fork would lose.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import io
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 180
"""Seconds after which a run hangs, and is ended by SIGALRM."""
_TEXT = 1 << 20
"""Bytes of a text that are looked at."""
ALONE = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")

ONCE = (
    "--prefuse {0}/in {0}/out",
    "--split {0}/out {0}/new --dry-run",
    "--to orbax {0}/in {0}/new --dry-run",
    "--verify {0}/in {0}/out --no-gemm",
    "--verify {0}/out",
)
"""What the process that forks has done before: no thread of it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The exit code of a process (negative: the signal that killed it), seconds of CPU, bytes of memory, what it wrote."""

    returncode: int
    cpu: float
    peak: int
    stdout: str
    stderr: str


class Forks:
    """The process that forks; close it in the end."""

    def __init__(self, **environment: str) -> None:
        """Start it, with these variables beside those of this process."""
        own = os.environ | ALONE | {"PYTHONPATH": str(ROOT)} | environment
        self._folder = tempfile.TemporaryDirectory()
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=own, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()
        self._folder.cleanup()

    def start(self, code: str, *arguments: object) -> tuple[int, str]:
        """Begin to run `code` as `python -c` does; the number of its process, and where it writes. Give both to `end`."""
        self._number += 1
        printed = f"{self._folder.name}/{self._number}"
        request = {"code": code, "arguments": ["-c", *map(str, arguments)], "printed": printed}
        (pid,) = self._ask(request | {"environment": dict(os.environ)})
        return pid, printed

    def end(self, pid: int, printed: str) -> Ended:
        """Wait until it has ended."""
        code, cpu, peak = self._ask({"pid": pid})
        _, stdout, stderr = (_text(Path(f"{printed}.{stream}")) for stream in range(3))
        return Ended(returncode=code, cpu=cpu, peak=peak, stdout=stdout, stderr=stderr)

    def run(self, code: str, *arguments: object) -> Ended:
        """Run `code` to its end."""
        return self.end(*self.start(code, *arguments))

    def _ask(self, request: Mapping[str, Any]) -> Any:
        ask: IO[str] = self._process.stdin  # type: ignore[assignment]
        answer: IO[str] = self._process.stdout  # type: ignore[assignment]
        print(json.dumps(request), file=ask, flush=True)
        return json.loads(answer.readline())


def _text(path: Path) -> str:
    """The beginning of what was written to a file, which is no longer needed."""
    with path.open("rb") as file:
        found = file.read(_TEXT).decode(errors="surrogateescape")
    path.unlink()
    return found


def load() -> None:
    """Import every module of the tool, and let it work once: what tables and options say is not found out again in each fork.

    What is there is kept from the collector, which would copy all memory in each fork.
    """
    for package in map(importlib.import_module, ("convert", "layouts")):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):  # that would run it
                importlib.import_module(module.name)
    main, make = map(pkgutil.resolve_name, ("convert.cli:main", "scripts.make_checkpoint:make_checkpoint"))
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        make(Path(folder, "in"), family="qwen3_moe", experts=2, layers=1)
        for words in ONCE:
            assert not main(words.format(folder).split()), words
    atexit.unregister(pkgutil.resolve_name("jax._src.api:clean_up"))  # which empties caches that no fork has filled
    atexit.register(pkgutil.resolve_name("jax.distributed:shutdown"))  # and does this
    gc.collect()
    gc.freeze()


def serve() -> None:
    """Answer each request on stdin: to fork, with the number of the process, and to wait for one, with how it ended."""
    code: list[int] = []
    atexit.register(lambda: code and _leave(*code))  # the first, so it is called last: only Python would end after that
    load()
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            print(json.dumps(_ended(request["pid"])), flush=True)
            continue
        assert len(os.listdir("/proc/self/task")) == 1, "a thread that the forked process would not have"
        child = os.fork()
        if not child:
            code.append(_become(**request))
            return
        print([child], flush=True)


def _ended(child: int) -> tuple[int, float, int]:
    """Wait for a process: its exit code, its seconds of CPU, its peak of resident bytes."""
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss << 10


def _become(*, code: str, arguments: list[str], printed: str, environment: dict[str, str]) -> int:
    """Be the process that runs the code, and give its exit code; Python waits for its threads and calls its exit handlers."""
    signal.alarm(LIMIT)
    for stream in (0, 1, 2):
        os.dup2(os.open(f"{printed}.{stream}", os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
    faulthandler.enable()  # a signal says where it came from
    os.environ.update(environment)
    sys.argv = arguments
    try:
        exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
