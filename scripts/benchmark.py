"""Time the conversions beside `cp` of the same bytes and beside what people do today, in one run.

    python scripts/benchmark.py --layers 4 --repeats 5 --directory /tmp/bench

Makes a Qwen3-MoE-like checkpoint (E = 128, K = 2048, N = 768, bf16; 1.2 GB a layer) and runs each row in a process of its
own, all rows in turn; a first round is thrown away. Every row finds its input in the page cache, and ends with its output on
the disk (fsync). Disks of virtual machines are fast and slow by the minute, so `cp` runs before and after each row, which is
compared with the mean of these two. Prints medians of the times and of the ratios, and peak resident memory. Rows whose library
is not installed say so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SYNC = "\nimport os\nfor f in os.scandir(out):\n    fd = os.open(f.path, os.O_RDONLY); os.fsync(fd); os.close(fd)\n"
DIRECT = "mkdir OUT; for f in SRC/*.safetensors; do dd if=$f of=OUT/${f##*/} bs=8M oflag=direct conv=fsync status=none; done"
NUMPY = """
import sys, glob, re, numpy as np, safetensors, ml_dtypes
from safetensors.numpy import save_file
src, out = sys.argv[1:]
files = {}
for path in sorted(glob.glob(src + "/*.safetensors")):
    f = safetensors.safe_open(path, "np")
    files |= {k: f for k in f.keys()}
layers = sorted({int(k.split(".")[2]) for k in files if ".experts." in k})
E = 1 + max(int(k.split(".")[5]) for k in files if ".experts." in k)
import os; os.makedirs(out)
rest = {k: f.get_tensor(k) for k, f in files.items() if ".experts." not in k}
save_file(rest, out + "/rest.safetensors")
for l in layers:
    get = lambda e, w: (lambda k: files[k].get_tensor(k))(f"model.layers.{l}.mlp.experts.{e}.{w}.weight")
    wi = np.stack([np.concatenate((get(e, "gate_proj").T, get(e, "up_proj").T), 1) for e in range(E)])
    wo = np.stack([get(e, "down_proj").T for e in range(E)])
    save_file({f"model.layers.{l}.mlp.experts.wi": wi, f"model.layers.{l}.mlp.experts.wo": wo}, f"{out}/{l}.safetensors")
"""
TORCH = (
    NUMPY.replace("numpy as np, safetensors, ml_dtypes", "torch, safetensors")
    .replace("safetensors.numpy", "safetensors.torch")
    .replace('path, "np"', 'path, "pt"')
    .replace("np.stack", "torch.stack")
    .replace("np.concatenate", "torch.cat")
)
TRANSFORMERS = """
import sys, transformers
src, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(src, dtype="bfloat16")
model.save_pretrained(out, save_original_format=False)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: a command with SRC and OUT to fill in, and the modules that it needs."""

    name: str
    command: tuple[str, ...]
    source: str = "in"
    keeps: str | None = None
    needs: tuple[str, ...] = ()
    peer: bool = False


def _ours(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "convert", *arguments, "--quiet", "SRC", "OUT")


def _script(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code + SYNC, "SRC", "OUT")


ROWS = (
    Row(name="cp -r, then fsync", command=("sh", "-c", "cp -r SRC OUT && sync OUT/*")),
    Row(name="dd oflag=direct: the disk alone", command=("sh", "-c", DIRECT)),
    Row(name="--prefuse --layout transformers, --jobs 1", command=_ours("--prefuse", "--layout=transformers", "--jobs=1")),
    Row(name="--prefuse --layout transformers", command=_ours("--prefuse", "--layout=transformers"), keeps="fused"),
    Row(name="--split of it", command=_ours("--split"), source="fused"),
    Row(name="--prefuse (concat), --jobs 1", command=_ours("--prefuse", "--jobs=1")),
    Row(name="--prefuse (concat)", command=_ours("--prefuse"), keeps="fused"),
    Row(name="--split of it", command=_ours("--split"), source="fused"),
    Row(name="NumPy: concatenate, stack, save_file", command=_script(NUMPY), peer=True),
    Row(name="torch: the same", command=_script(TORCH), needs=("torch",), peer=True),
    Row(name="transformers: load, save", command=_script(TRANSFORMERS), needs=("torch", "transformers"), peer=True),
)


def measure(row: Row, directory: Path) -> tuple[float, float]:
    """Seconds and peak resident MB of one run; its output is removed unless the next row reads it."""
    out = directory / (row.keeps or "out")
    shutil.rmtree(out, ignore_errors=True)
    warm(directory / row.source)
    words = {"SRC": str(directory / row.source), "OUT": str(out)}
    command = [_fill(part, words) for part in row.command]
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{row.name} failed:\n{process.stderr.read() if process.stderr else ''}")
    if not row.keeps:
        shutil.rmtree(out)
    if row.source != "in":
        shutil.rmtree(directory / row.source)  # so that the page cache holds the next row's files
    return seconds, usage.ru_maxrss / 1000


def one_round(directory: Path, *, peers: bool) -> Iterator[tuple[int, tuple[float, float, float]]]:
    """Every row once, with `cp` before and after; the number of the row, seconds, peak memory, ratio to `cp`."""
    before, memory = measure(ROWS[0], directory)
    for number, row in enumerate(ROWS[1:], start=1):
        if not all(importlib.util.find_spec(name) for name in row.needs) or (row.peer and not peers):
            continue
        seconds, peak = measure(row, directory)
        yield 0, (before, memory, 1.0)
        after, memory = measure(ROWS[0], directory)
        yield number, (seconds, peak, 2 * seconds / (before + after))
        before = after


def warm(source: Path) -> None:
    """Read a checkpoint, so that the page cache holds it."""
    for path in (path for path in source.rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def _fill(part: str, words: Mapping[str, str]) -> str:
    for word, value in words.items():
        part = part.replace(word, value)
    return part


def table(times: Mapping[int, list[tuple[float, float, float]]], nbytes: int) -> str:
    """The results as Markdown: of each row seconds, peak memory and the ratio to `cp`."""
    lines = ["| what | seconds (median) | relative to cp | GB/s | peak RSS |", "| --- | --- | --- | --- | --- |"]
    for number, row in enumerate(ROWS):
        if not times.get(number):
            lines.append(f"| {row.name} | not run | | | |")
            continue
        seconds, _, ratio = map(statistics.median, zip(*times[number], strict=True))
        peak = max(memory for _, memory, _ in times[number])
        lines.append(f"| {row.name} | {seconds:.2f} | {ratio:.2f} | {nbytes / seconds / 1e9:.2f} | {peak:,.0f} MB |")
    return "\n".join(lines)


def main() -> None:
    """Make the checkpoint, run all rows in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/convert-benchmark"), help="where to work")
    parser.add_argument("--layers", type=int, default=4, help="MoE layers of 1.2 GB each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="only cp and this tool")
    arguments = parser.parse_args()
    source = arguments.directory / "in"
    if not source.exists():
        make = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), str(source), "--family", "qwen3_moe"]
        subprocess.run([*make, "--size", "bench", "--layers", str(arguments.layers)], check=True)
    nbytes = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    times: dict[int, list[tuple[float, float, float]]] = {}
    for repeat in range(arguments.repeats + 1):
        for number, result in one_round(arguments.directory, peers=not arguments.no_peers):
            if repeat:  # the first round fills the page cache, and touches memory that the machine may have to fetch
                times.setdefault(number, []).append(result)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    print(f"{nbytes / 1e9:.2f} GB, {arguments.repeats} repeats, {machine}\n\n{table(times, nbytes)}")


if __name__ == "__main__":
    main()
