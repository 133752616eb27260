"""The oracle: what a command may do, whatever it is given to read.

A command runs in a sandbox: a directory that holds its input, what it may write, and canaries. It must end with a documented
exit code, in time, in little memory, with one message and no traceback; and of all the inodes in the sandbox none but those of
its output and its staging directories may have changed. Used by `tests/hostile` and by `scripts/fuzz.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from scripts._confined import Ran, run
from scripts._forked import Forks
from scripts._inodes import Inode, changes, clear, inodes
from scripts._sandbox_bases import WORK, Sandbox, lay

DOCUMENTED = frozenset(range(7))
"""The exit codes of the README but for bugs and signals."""
REFUSED = frozenset({3, 4})
"""Those that say of an input that it cannot be converted."""
FORGED = "FORGED"
"""Stands behind line breaks in hostile names: a line that begins with it is one that an input has put into our text."""
_ROOM = 2 << 30
"""Bytes that a disk in memory must have free: far more than sandboxes take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command did, and what it must not have done: `problems` in words, none if all is well."""

    ran: Ran
    problems: tuple[str, ...]


def attempt(forks: Forks, box: Sandbox, command: str, codes: frozenset[int] = DOCUMENTED) -> Outcome:
    """Run a command in a sandbox and judge what it did."""
    argv = [word for word in box.argv(command) if word != "--noisy"]
    before = inodes(box.root)
    ran = run(forks, argv, box.root / "cwd")
    after = inodes(box.root)
    problems = [
        *_ending(ran, codes),
        *_said(ran.stdout, ran.stderr, quiet="--quiet" in argv, code=ran.code),
        *_touched(box, before, after, ran.code, writes=not _only_reads(argv)),
    ]
    return Outcome(ran=ran, problems=tuple(problems))


def _ending(ran: Ran, codes: frozenset[int]) -> Iterator[str]:
    if ran.stopped == "time":
        yield f"hang: killed after {ran.seconds:.0f} s"
    elif ran.stopped == "memory":
        yield f"memory: {ran.peak >> 20} MiB"
    elif ran.signal is not None:
        yield f"signal {ran.signal}"
    elif ran.code == 70:
        yield "exit 70"
    elif ran.code not in DOCUMENTED:
        yield f"exit {ran.code}, which is not documented"
    elif ran.code not in codes:
        yield f"exit {ran.code}, where {sorted(codes)} would be right"


def _said(stdout: str, stderr: str, *, quiet: bool, code: int | None) -> Iterator[str]:
    for name, text in (("stdout", stdout), ("stderr", stderr)):
        allowed = "\n" if quiet else "\n\r"
        if raw := next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in allowed), None):
            yield f"control character {raw!r} on {name}"
        if any(line.startswith(FORGED) for line in text.splitlines()):
            yield f"a line on {name} is the input's"
    if "Traceback (most recent call last)" in stderr:
        yield "traceback"
    if code in DOCUMENTED - {0, 1} and not stderr.strip():
        yield f"exit {code} without a message"


def _touched(
    box: Sandbox, before: Mapping[str, Inode], after: Mapping[str, Inode], code: int | None, *, writes: bool
) -> Iterator[str]:
    out = (box.work / box.out_name).relative_to(box.root).as_posix()
    parent = Path(out).parent.as_posix()
    found = changes(before, after)
    for path, what in found.items():
        if writes and (path == out or path.startswith(f"{out}/")):
            if code != 0:
                yield f"the output is no longer as it was, exit {code}: {what} {_short(path)}"
        elif not (writes and (path == parent or path.startswith(f"{out}.partial-"))):
            where = "input" if Path(path).is_relative_to(box.source.relative_to(box.root)) else "outside"
            yield f"{where}: {what} {_short(path)}"
    for path, what in found.items():
        staged = path.startswith(f"{out}.partial-") and "/" not in path.removeprefix(f"{out}.partial-")
        if staged and what == "made" and code in (2, 3, 4, 5) and not _holds(path, after):
            yield "an empty staging directory is left"


def _holds(stage: str, after: Mapping[str, Inode]) -> bool:
    """Whether there is a file in a staging directory, besides the notes on it."""
    return any(
        path.startswith(f"{stage}/") and inode.size and not Path(path).name.startswith(".convert") and not _is_folder(inode)
        for path, inode in after.items()
    )


def _is_folder(inode: Inode) -> bool:
    return inode.kind == 0o040000


def _short(path: str) -> str:
    shown = ascii(path.removeprefix(f"{WORK}/"))[1:-1]
    return shown if len(shown) < 90 else f"{shown[:80]}..."


def in_memory(room: int) -> Path | None:
    """The root of a disk in memory, if there is one that has more than so many bytes free."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > room else None


@contextmanager
def room() -> Iterator[Path]:
    """A directory for sandboxes: in memory where there is such a disk, because they are made and removed all the time."""
    with tempfile.TemporaryDirectory(dir=in_memory(_ROOM)) as name:
        try:
            yield Path(name)
        finally:
            clear(Path(name))
            Path(name).mkdir(exist_ok=True)


def trial(
    forks: Forks, folder: Path, base: Path, change: Callable[[Sandbox], object], command: str, codes: frozenset[int]
) -> Outcome:
    """Lay out a sandbox, change it and run a command in it; of a bug, say where it is."""
    found: list[Outcome] = []
    for extra in ("", " --debug"):
        clear(folder)
        laid = lay(folder, base)
        changed = change(laid)
        box = changed if isinstance(changed, Sandbox) else laid
        found.append(attempt(forks, box, command + extra, codes))
        if found[0].ran.code == 0 and not _only_reads(command.split()):
            found[0] = _with_output(found[0], attempt(forks, box, "--verify {out}"))
        clear(folder)
        if "exit 70" not in found[0].problems:
            return found[0]
    problems = [f"exit 70: {_place(found[1].ran.stderr)}" if problem == "exit 70" else problem for problem in found[0].problems]
    return replace(found[0], problems=tuple(problems))


def _with_output(outcome: Outcome, check: Outcome) -> Outcome:
    """What is said to be done has to be there, with the digests that its manifest says."""
    problems = [f"the output, verified: {problem}" for problem in check.problems]
    if check.ran.code != 0:
        problems.append(f"the output, verified: exit {check.ran.code}")
    ran = replace(outcome.ran, stderr=outcome.ran.stderr + check.ran.stderr)
    return Outcome(ran=ran, problems=(*outcome.problems, *problems))


def _only_reads(argv: Sequence[str]) -> bool:
    return bool({"--verify", "--digest", "--dry-run", "--families"} & set(argv))


def _place(text: str) -> str:
    """The last place in our own code, and what was raised there, from what `--debug` shows."""
    shown = text.partition("\nconvert: ")[0]
    frames = re.findall(r'File "[^"]*?/((?:convert|layouts)/[^"]+)", line (\d+), in', shown)
    place = ":".join(frames[-1]) if frames else "an unknown place"
    raised = next((line for line in reversed(shown.splitlines()) if re.match(r"[A-Za-z_.]+(: |$)", line)), "")
    return f"{ascii(raised)[1:-1][:100]}, at {place}"
