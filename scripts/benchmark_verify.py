"""Time the proof, and content digests, beside reading both checkpoints once, and beside an older version.

    python scripts/benchmark_verify.py --repeats 3 --old /tmp/old-worktree --cold

Makes a Qwen3-MoE checkpoint (4 layers; E = 128, K = 2048, N = 768, bfloat16; 5.05 GB) and its fused form. Rows run in turn,
each in a process of its own, with both in the page cache, or with none of them (`--cold`). Prints medians: seconds by the
clock, those of all cores, ratios to reading, and peak resident memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
READ = "cat, both"


class Run(NamedTuple):
    """Seconds by the clock, of all cores, and MB."""

    seconds: float
    cores: float
    peak: float


def rows(old: Path | None) -> Iterator[tuple[str, list[str], Path]]:
    """Name, command, and the directory that it runs in."""
    yield READ, ["sh", "-c", "cat A/*.safetensors B/*.safetensors > /dev/null"], ROOT
    for tree, when in ((old, ", before"), (ROOT, "")) if old else ((ROOT, ""),):
        for words in (["--no-gemm"], []):
            name = " ".join(["--verify", *words]) + when
            yield name, [sys.executable, "-m", "convert", "--quiet", "--verify", "A", "B", *words], tree
    for side, words in (("A", "one matrix for each expert and projection"), ("B", "concat")):
        yield f"--digest, {words}", [sys.executable, "-m", "convert", "--quiet", "--digest", side], ROOT


def make(folder: Path, sizes: list[str], tree: Path) -> None:
    """The checkpoint and its fused form, written by a version that both can read: the older one."""
    if (folder / "B").exists():
        return
    script = [sys.executable, str(ROOT / "scripts/make_checkpoint.py"), str(folder / "A"), "--family", "qwen3_moe"]
    subprocess.run([*script, "--size", "bench", "--values", "normal", *sizes], check=True, stdout=subprocess.DEVNULL)
    command = [sys.executable, "-m", "convert", "--quiet", "--prefuse", str(folder / "A"), str(folder / "B")]
    subprocess.run(command, check=True, cwd=tree, stdout=subprocess.DEVNULL)


def prepare(folder: Path, *, cold: bool) -> None:
    """All files in the page cache, or none."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(16 << 20):
                    pass


def measure(command: list[str], tree: Path, folder: Path) -> Run:
    """One run; it has to find both equal."""
    filled = [part.replace("A/", f"{folder}/A/").replace("B/", f"{folder}/B/") for part in command]
    filled = [str(folder / part) if part in ("A", "B") else part for part in filled]
    began = time.perf_counter()
    process = subprocess.Popen(filled, stdout=subprocess.DEVNULL, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(filled)} ended with {os.waitstatus_to_exitcode(status)}")
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def main() -> None:
    """Make the checkpoints, run all rows in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/convert-benchmark-verify"), help="where to work")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", default="4")
    parser.add_argument("--old", type=Path, help="the tree of an older version, to run beside ours")
    parser.add_argument("--cold", action="store_true", help="with nothing in the page cache")
    arguments = parser.parse_args()
    folder = arguments.directory.resolve()
    make(folder, ["--layers", arguments.layers], (arguments.old or ROOT).resolve())
    found: dict[str, list[Run]] = {}
    for _ in range(arguments.repeats):
        for name, command, tree in rows(arguments.old.resolve() if arguments.old else None):
            prepare(folder, cold=arguments.cold)
            found.setdefault(name, []).append(measure(command, tree, folder))
    base = statistics.median(run.seconds for run in found[READ])
    state = "nothing in the page cache" if arguments.cold else "both in the page cache"
    print(f"{arguments.repeats} repeats, {state}; {platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}\n")
    print("| what | seconds | of all cores | relative to reading | peak RSS |\n| --- | --- | --- | --- | --- |")
    for name, runs in found.items():
        seconds, cores = (statistics.median(each) for each in ([run[at] for run in runs] for at in (0, 1)))
        peak = max(run.peak for run in runs)
        print(f"| {name} | {seconds:.2f} | {cores:.2f} | {seconds / base:.2f} | {peak:,.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
