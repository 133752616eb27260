"""Time how long the command takes to start, beside Python alone and an older version.

    python scripts/benchmark_start.py --repeats 15 [--other OLD_TREE] [--many /tmp/bench-many]

Runs what reads nothing (`--version`, `--help`, an option that does not exist, the tables), `--inspect` and a plan of a tiny
checkpoint that it makes and removes, each in a process of its own, old and new in turn. Prints the least of wall and CPU
milliseconds, and how many modules are imported, which does not change with what else the machine does. With `--many`, the
folder that `benchmark_many.py` has left: `--inspect` of its 100,000 tensors, and of them prefused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["-m", "convert"]
ROWS = {
    "Python": ["-c", ""],
    "Python, NumPy": ["-c", "import numpy"],
    "--version": [*COMMAND, "--version"],
    "--help": [*COMMAND, "--help"],
    "a usage error": [*COMMAND, "--no-such-option"],
    "--layouts": [*COMMAND, "--layouts"],
    "--families": [*COMMAND, "--families"],
    "--inspect": [*COMMAND, "--inspect", "{tiny}"],
    "plan": [*COMMAND, "--prefuse", "--dry-run", "{tiny}", "{tiny}-out"],
}
MANY = {
    "--inspect, many": [*COMMAND, "--inspect", "{many}/in"],
    "of prefused": [*COMMAND, "--inspect", "{many}/out-this"],
}


class Run(NamedTuple):
    """Milliseconds by the clock, and of all cores."""

    wall: float
    cpu: float


def measure(words: list[str], tree: Path) -> Run:
    """One run."""
    began = time.perf_counter()
    command, quiet = [sys.executable, *words], subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=tree, env=_environment(tree), stdout=quiet, stderr=quiet)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Run((time.perf_counter() - began) * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3)


def modules(words: list[str], tree: Path) -> int:
    """How many are imported."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=tree, env=_environment(tree), capture_output=True, text=True)
    return sum(line.startswith("import time:") for line in done.stderr.splitlines()) - 1


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree)}


def main() -> None:
    """Run the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--other", type=Path, help="another checkout, run in turn with this one")
    parser.add_argument("--many", type=Path, help="the folder of benchmark_many.py")
    given = parser.parse_args()
    trees = ({"other": given.other.resolve()} if given.other else {}) | {"this": ROOT}
    rows = ROWS | (MANY if given.many else {})
    print(f"{'':18}" + "".join(f"{name}: wall, CPU, modules  " for name in trees))
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        make = [sys.executable, str(ROOT / "scripts/make_checkpoint.py"), str(tiny), "--family", "qwen3_moe"]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        for row, words in rows.items():
            filled = [word.format(tiny=tiny, many=given.many and given.many.resolve()) for word in words]
            counts = {name: modules(filled, tree) for name, tree in trees.items()}  # which compiles them, too
            runs = [{name: measure(filled, tree) for name, tree in trees.items()} for _ in range(given.repeats)]
            least = {name: [min(run[name][at] for run in runs) for at in range(2)] for name in trees}
            told = (f"{wall:9.0f} {cpu:9.0f} {counts[name]:6}    " for name, (wall, cpu) in least.items())
            print(f"{row:18}{''.join(told)}")


if __name__ == "__main__":
    main()
