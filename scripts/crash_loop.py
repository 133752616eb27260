"""Kill the tool with -9 again and again, and see that nothing is ever lost.

    python scripts/crash_loop.py --points 200 --seed 0

Each point makes a fresh conversion, kills it (at a random moment, or before or after a named step of the engine), looks at what
is there, runs the same command again, and compares with a run that nobody disturbed. The output must be absent or complete
after the kill (with --overwrite: the old one or the new one), and complete, byte for byte, after the second run. Half of the
points kill the second run as well, so that a third has to finish it. Exit code 1 and the seed if any of this fails.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts._forked import Forks

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

STEPS = (
    "convert.commit.stage._begin",
    "convert.commit.journal.append",
    "convert.hf.execute._preallocate",
    "convert.engine.direct.write_all",
    "os.copy_file_range",
    "convert.hf.execute._sync",
    "convert.commit.files.Folder.write_text",
    "convert.commit.files.Folder.copy_in",
    "convert.commit.stage.publish",
    "convert.commit.publish.exchange",
    "convert.commit.publish.sync_all",
    "convert.commit.files.Folder.sync",
    "os.mkdir",
    "os.rename",
    "convert.commit.home.clear",
    "convert.commit.stage.take_over",
    "shutil.rmtree",
    "os.rmdir",
)
"""The functions before and after which a named kill strikes; with the number of the call, counted from 1."""

CHILD = """
import itertools, os, pkgutil, signal, sys
step, when, number, exchange = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
import convert.commit.publish, convert.commit.stage, convert.engine.copying, convert.engine.direct, convert.hf.execute
import convert.hf.write
convert.engine.copying.SHORT = 0  # so that the kernel copies runs, too
convert.engine.direct.LEAST = convert.engine.direct.PAGE  # so that small blocks go past the page cache, too
if exchange == "no":
    convert.commit.publish.exchange = lambda *names: False
if step:
    module, name = step.rsplit(".", 1)
    module = pkgutil.resolve_name(module)  # or a class
    real, calls = getattr(module, name), itertools.count(1)  # next() is atomic: workers call this too
    def wrapped(*arguments, **keywords):
        call = next(calls)
        if when == "before" and call == number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **keywords)
        if call == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, wrapped)
from convert.cli import main
sys.exit(main(sys.argv[5:]))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where to kill: a named step, or `delay` seconds after the start when there is no step."""

    step: str = ""
    when: str = "before"
    number: int = 1
    delay: float = 0.0
    exchange: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A conversion, what it should write, and what stood there before (for --overwrite)."""

    action: str
    source: Path
    wanted: Mapping[str, bytes]
    old: Mapping[str, bytes] | None = None


def contents(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def strike(forks: Forks, case: Case, out: Path, point: Point) -> int:
    """Run the conversion and kill it at a point; the exit code, -9 if the kill struck."""
    options = [case.action, str(case.source), str(out), "--quiet", "--jobs", "2", "--max-shard-size", "60000"]
    options += ["--overwrite"] if case.old else []
    exchange = "yes" if point.exchange else "no"
    started = forks.start(CHILD, point.step, point.when, point.number, exchange, *options)
    if not point.step and point.delay:
        time.sleep(point.delay)
        os.kill(started[0], signal.SIGKILL)
    return forks.end(*started).returncode


def check(forks: Forks, case: Case, folder: Path, points: Sequence[Point]) -> bool:
    """Strike at each point in turn, then finish; whether the first one struck.

    Raises:
        AssertionError: the output was partial, or not what it should be.
    """
    folder.mkdir()
    out = folder / "out"
    if case.old:
        write(out, case.old)
    codes = []
    for point in (*points, Point()):
        codes.append(strike(forks, case, out, point))
        assert codes[-1] in (0, -signal.SIGKILL), (codes, points)
        found = contents(out) if out.exists() else None
        between = not point.exchange and found is None  # two renames instead of one: absent is allowed
        assert found in (case.wanted, case.old) or between, f"a partial output after {point}: {sorted(found or ())}"
        if found == case.wanted:
            break
    assert contents(out) == case.wanted, points
    shutil.rmtree(folder)
    return codes[0] == -signal.SIGKILL


def write(path: Path, files: Mapping[str, bytes]) -> None:
    """A directory with these files."""
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def make_cases(folder: Path) -> list[Case]:
    """A prefuse, the split of its result, and both over an older output."""
    import convert
    from scripts.make_checkpoint import make_checkpoint

    source = make_checkpoint(folder / "in", family="qwen3_moe", experts=3, layers=1, shard=60_000)
    convert.prefuse(source, folder / "fused", max_shard_size=60_000)
    convert.split(folder / "fused", folder / "again", max_shard_size=60_000)
    pairs = (("--prefuse", source, contents(folder / "fused")), ("--split", folder / "fused", contents(folder / "again")))
    olds: tuple[dict[str, bytes] | None, ...] = (None, {"old": b"old", "model.safetensors": b"x" * 300_000})
    return [Case(action=a, source=s, wanted=w, old=old) for old in olds for a, s, w in pairs]


def named_points() -> list[Point]:
    """Before and after each named step, at its first and at a later call."""
    return [
        Point(step=step, when=when, number=number, exchange=exchange)
        for step in STEPS
        for when in ("before", "after")
        for number in (1, 2)
        for exchange in ((True, False) if step == "os.rename" else (True,))
    ]


def main() -> None:
    """Read the command line and loop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="random moments, besides every named step")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    from scripts._forked import Forks

    dice = random.Random(arguments.seed)
    struck: Counter[str] = Counter()
    with Forks() as forks, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = make_cases(folder)
        work = [(case, (point,)) for case in cases for point in named_points()]
        for _ in range(arguments.points):
            moments = [Point(delay=dice.uniform(0.001, 0.25)) for _ in range(dice.choice((1, 2)))]
            work.append((dice.choice(cases), tuple(moments)))
        for number, (case, points) in enumerate(work):
            try:
                kind = points[0].step or "random"
                struck[kind] += check(forks, case, folder / f"run{number}", points)
            except AssertionError as error:
                sys.exit(f"seed {arguments.seed}: {case.action}, overwrite {bool(case.old)}, {points}: {error}")
    print(f"seed {arguments.seed}: {len(work)} runs, {sum(struck.values())} of them killed, none partial, all finished")
    print(", ".join(f"{kind} {count}" for kind, count in sorted(struck.items())))


if __name__ == "__main__":
    main()
