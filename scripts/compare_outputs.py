"""Prove that two checkouts of this tool write the same bytes, say the same and refuse the same.

    python scripts/compare_outputs.py OLD_CHECKOUT NEW_CHECKOUT

Both run the same commands on small checkpoints that are made for it (Hugging Face and Orbax in several kinds of stores, damaged
ones among them), and on those below `--checkpoints`. Exit codes, texts (but for paths and times) and all files must be equal.
The files of databases (OCDBT) have random names, so what these hold is compared as it is stored, key by key. Exit code 1 and a
line for each difference, if there is any.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorstore as ts

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

CHILD = """
import contextlib, io, json, sys, convert.cli
print(convert.cli.__file__, flush=True)
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = convert.cli.main(json.loads(line))
        except SystemExit as stopped:
            code = stopped.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
WHAT = ("done", "refused", "files", "chunks")
TIMES = re.compile(r"in [\d.]+ s \([\d.]+ \w+/s\)")
MANIFEST, BATCH, CHUNK = "manifest.ocdbt", "ocdbt.process_", re.compile(r"(^|/)(c|[\d.]+)$")
LAYOUTS = (
    "concat",
    "transformers",
    "vllm",
    "cutlass",
    "flashinfer",
    "interleaved",
    "glu32",
    "per-shard",
    "lane",
    "gmm-ep",
    "fused-moe",
)
SHARDED = {name: f"{name} --shards 2" for name in ("per-shard", "lane")}
TREES = {"tree": "", "unscanned": "--no-scan", "first": "--scan-axis 0", "shards": "--layout per-shard --shards 2"}
REFUSED = (
    " --prefuse --split, --prefuse --layout nonsense, --prefuse --shards 2, --prefuse --shards 0, --prefuse --memory 1MB,"
    "--prefuse --family nonsense, --prefuse --source-layout nonsense, --prefuse --scan-axis 2, --split --layout concat,"
    "--split --dequantize bf16, --split, --to hf, --prefuse --process-id 1,"
)
TINY: dict[str, Any] = {"experts": 4, "layers": 2, "shard": 60_000}
WIDE: dict[str, Any] = {**TINY, "embed": 32, "mlp": 256}
LARGE: dict[str, Any] = {"experts": 8, "layers": 4, "embed": 512, "mlp": 2112}
"""Each leaf of experts is one chunk above 64 MB, which is cut unless `--keep-chunks` is given."""
STORES: dict[str, dict[str, Any]] = {
    "directories": {"use_ocdbt": False, "use_zarr3": False},
    "directories not compressed": {"use_ocdbt": False, "use_zarr3": True, "use_compression": False},
    "many chunks": {"use_ocdbt": True, "use_zarr3": True, "chunk": 4096},
    "no record": {"use_ocdbt": True, "use_zarr3": True, "fused": True},
}
DAMAGED = {
    "qwen3_moe": "model-00002*",
    "deepseek_v3": "config.json",
    "directories": "0/items/*wi_1/0*",
    "many chunks": "0/items/_M*",
}
Tally = Counter[tuple[str, str]]


class Step(NamedTuple):
    """A command: its options, and the names of its input and its output; "in" is the checkpoint itself."""

    kind: str
    options: str
    source: str = "in"
    out: str = ""


def hf_steps(layouts: Sequence[str]) -> Iterator[Step]:
    """Every layout and back, in one file and in several, and from each to the next one; Orbax and back; what is refused."""
    for name, after in zip(layouts, [*layouts[1:], layouts[0]], strict=True):
        how = f"--prefuse --layout {SHARDED.get(name, name)}"
        yield Step("dry run", f"{how} --dry-run", "in", name)
        yield Step("prefuse", how, "in", name)
        yield Step("split", "--split", name, f"{name}-split")
        yield Step("verify", "--verify --no-gemm", name, "in")
        yield Step("small shards", f"{how} --max-shard-size 50KB", "in", f"{name}-small")
        yield Step("small shards", "--split --max-shard-size 30KB", f"{name}-small", f"{name}-small-split")
        yield Step("layout to layout", f"--prefuse --layout {SHARDED.get(after, after)}", name, f"{name}-{after}")
        yield Step("layout to layout", "--split", f"{name}-{after}", f"{name}-{after}-split")
        yield Step("dequantize", f"{how} --dequantize bf16", "in", f"{name}-bf16")
    for tree, how in TREES.items():
        yield Step("to orbax", f"--to orbax {how}", "in", tree)
        yield from orbax_steps(["concat", "per-shard"], tree)
        yield Step("dry run", f"--prefuse --to orbax {how} --dry-run", "in", f"{tree}-fused")
        yield Step("prefuse to orbax", f"--prefuse --to orbax {how}", "in", f"{tree}-fused")
        yield Step("split to hf", "--split --to hf", f"{tree}-fused", f"{tree}-fused-hf")
        yield Step("split orbax", "--split", f"{tree}-fused", f"{tree}-fused-split")
        yield Step("dequantize", f"--prefuse --to orbax --dequantize bf16 {how}", "in", f"{tree}-bf16")
    for options in ("--prefuse", "--prefuse", "--prefuse --layout vllm --overwrite", "--prefuse --layout lane"):
        yield Step("over an output", options, "in", "done")
    yield Step("verify", "--verify", "done")
    yield Step("refusals", "--to orbax", "done", "new")
    yield Step("refusals", "--prefuse", "done", "done/below")
    yield from (Step("refusals", options, "in", "new") for options in REFUSED.split(","))


def orbax_steps(layouts: Sequence[str], source: str = "in") -> Iterator[Step]:
    """Every layout and back, to Hugging Face, with chunks as they are, in little memory."""
    for name in layouts:
        how, out = f"--prefuse --layout {SHARDED.get(name, name)}", f"{source}-{name}"
        yield Step("dry run", f"{how} --dry-run", source, out)
        yield Step("prefuse orbax", how, source, out)
        yield Step("split orbax", "--split", out, f"{out}-split")
        yield Step("split to hf", "--split --to hf", out, f"{out}-split-hf")
        yield Step("verify", "--verify --no-gemm", out, source)
        yield Step("little memory", f"{how} --memory 300MiB", source, f"{out}-little")
    for how in ("", "--memory 300MiB", "--params-only --max-shard-size 50KB"):
        yield Step("to hf", f"--to hf {how}", source, f"{source}-hf{how[:3]}")
    yield Step("prefuse to hf", "--prefuse --to hf --layout transformers", source, f"{source}-hf-fused")
    yield Step("keep chunks", "--prefuse --keep-chunks", source, f"{source}-kept")
    yield Step("keep chunks", "--split --keep-chunks", f"{source}-kept", f"{source}-kept-split")
    yield Step("no optimizer", "--prefuse --drop-optimizer", source, f"{source}-dropped")
    for name in ("concat", "per-shard:2"):
        yield Step("source layout", f"--split --source-layout {name}", source, f"{source}-of-{name}")
        yield Step("source layout", f"--split --to hf --source-layout {name}", source, f"{source}-of-{name}-hf")


def make_inputs(folder: Path) -> None:
    """Small checkpoints of both formats, one with large leaves, several kinds of stores, and damaged ones."""
    from scripts.make_checkpoint import HF_MODELS, MAXTEXT_MODELS, make_checkpoint

    for family in HF_MODELS:
        make_checkpoint(folder / family, family=family, **TINY)
        make_checkpoint(folder / f"{family} wide", family=family, **WIDE, dtype="f32" if family == "olmoe" else "bf16")
    for family in MAXTEXT_MODELS:
        for name, scanned in (("MaxText", True), ("MaxText unscanned", False)):
            out = make_checkpoint(folder / f"{family} {name}", family=family, format="orbax", scanned=scanned, **WIDE)
            shutil.copy(folder / f"{family} wide" / "config.json", out)
    state = {"format": "orbax", "train_state": True, "jax_arrays": True}
    make_checkpoint(folder / "train state", family="qwen3_moe", **state, **TINY)
    make_checkpoint(folder / "large", family="qwen3_moe", format="orbax", **LARGE)
    for name, options in STORES.items():
        save_again(folder / "qwen3_moe MaxText", folder / name, **options)
    for name, pattern in DAMAGED.items():
        (path,) = shutil.copytree(folder / name, folder / f"{name} damaged").glob(pattern)
        path.write_bytes(path.read_bytes()[:-100])


def save_again(source: Path, out: Path, *, chunk: int | None = None, fused: bool = False, **options: bool) -> None:
    """The same tree, saved by Orbax in another kind of store, on wish with gate and up as MaxText itself fuses them."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(source / "0/items")
    moe = tree["params"]["params"]["decoder"]["layers"]["moe_block"]
    if fused:
        moe["wi"] = np.concatenate((moe.pop("wi_0"), moe.pop("wi_1")), -1)
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(out / "0/items", args=ocp.args.PyTreeSave(tree, save_args=how))
    shutil.copy(source / "config.json", out)


class Side:
    """A checkout: a process that runs commands with it, and the directory for their outputs."""

    def __init__(self, checkout: Path, work: Path) -> None:
        self.work, command = work, [sys.executable, "-W", "ignore", "-c", CHILD]
        self.process = subprocess.Popen(command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.asked, self.told = self.process.stdin, self.process.stdout
        if not Path(self.told.readline()).is_relative_to(checkout.resolve()):
            raise SystemExit(f"{checkout} is no checkout of this tool, or another one is found there")

    def begin(self, step: Step, source: Path, jobs: int) -> Path:
        """Begin a command, for whose end `finish` waits; where its output will lie."""
        paths = [source if name == "in" else self.work / name for name in (step.source, step.out) if name]
        words = [*step.options.split(), *map(str, paths), "--quiet"]
        if "--verify" not in words:
            words += ["--jobs", str(jobs)]
        print(json.dumps(words), file=self.asked, flush=True)
        return paths[-1]

    def finish(self) -> list[Any]:
        """Exit code, stdout and stderr, without what differs from run to run."""
        return json.loads(TIMES.sub("in TIME", self.told.readline().replace(str(self.work), "WORK")))


def run_all(source: Path, steps: Iterator[Step], sides: Sequence[Side], jobs: int, tally: Tally) -> Iterator[str]:
    """Run the steps of one checkpoint on both sides; the differences. What both refuse to make is no input of a later step."""
    refused = set()
    for side in sides:
        side.work.mkdir()
    for step in (step for step in steps if step.source not in refused):
        old, new = (side.begin(step, source, jobs) for side in sides)
        one, other = (side.finish() for side in sides)
        tally[step.kind, "refused" if one[0] else "done"] += 1
        unlike = [f"{a!r} became {b!r}" for a, b in zip(one, other, strict=True) if a != b]
        if one[0] or other[0]:
            refused.add(step.out)
        elif "--verify" not in step.options and "--dry-run" not in step.options:
            unlike += differences(old, new, step.kind, tally)
        yield from (f"{source.name}: {step.options}: {step.source} -> {step.out}: {text}" for text in unlike)
    for side in sides:
        shutil.rmtree(side.work)


def differences(old: Path, new: Path, kind: str, tally: Tally) -> Iterator[str]:
    """What is not the same in two outputs."""
    files, others = contents(old), contents(new)
    for name in sorted(files ^ others):
        yield f"{name} is on one side only"
    for name in sorted(files & others):
        if (old / name).is_dir():
            yield from different_values(old / name, new / name, kind, tally)
            continue
        tally[kind, "chunks" if CHUNK.search(str(name)) else "files"] += 1
        if (old / name).read_bytes() != (new / name).read_bytes():
            yield f"{name} differs"


def contents(out: Path) -> set[Path]:
    """The files and the databases of an output, without the files that are a database's own."""
    databases = {path.parent for path in out.rglob(MANIFEST)}
    own = {path for database in databases for path in (database / MANIFEST, *(database / "d").glob("*"))}
    files = {path for path in out.rglob("*") if path.is_file()}
    return {path.relative_to(out) for path in (files - own) | databases}


def different_values(old: Path, new: Path, kind: str, tally: Tally) -> Iterator[str]:
    """What is not the same in two databases; of a batch only the keys are compared, the item's has all values."""
    stores = [ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result() for path in (old, new)]
    keys, others = (set(store.list().result()) for store in stores)
    for key in sorted(keys ^ others):
        yield f"{key.decode()} is on one side only"
    for key in sorted(keys & others) if not old.name.startswith(BATCH) else ():
        tally[kind, "chunks" if CHUNK.search(key.decode()) else "files"] += 1
        if len({store.read(key).result().value for store in stores}) > 1:
            yield f"{key.decode()} differs"


def summary(tally: Tally) -> str:
    """A line for each kind of step, and one for all."""
    kinds = list(dict.fromkeys(kind for kind, _ in tally))
    counts = {kind: [tally[kind, what] for what in WHAT] for kind in kinds}
    counts["together"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    rows = ((kind, zip(row, WHAT, strict=True)) for kind, row in counts.items())
    return "\n".join(f"{kind:20}{', '.join(f'{number:6} {what}' for number, what in row)}" for kind, row in rows)


def main() -> None:
    """Make the checkpoints, run and compare everything, print a line for each kind of step and one for each difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument(
        "--checkpoints", type=Path, default=ROOT.parent / "shared/checkpoints", help="a directory of more of them"
    )
    parser.add_argument("--only", default="", metavar="A,B", help="the checkpoints to take, by name (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="workers of each conversion")
    arguments = parser.parse_args()
    tally: Tally = Counter()
    found: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(made := Path(folder, "in"))
        sides = [Side(path, Path(folder, name)) for name, path in (("old", arguments.old), ("new", arguments.new))]
        more = sorted(arguments.checkpoints.glob("*/")) if arguments.checkpoints.is_dir() else []
        every = [*sorted(made.glob("*/")), *more]
        for source in [path for path in every if not arguments.only or path.name in arguments.only.split(",")]:
            steps = orbax_steps(LAYOUTS) if (source / "0").exists() else hf_steps(LAYOUTS)
            found += run_all(source, steps, sides, arguments.jobs, tally)
    print(summary(tally))
    print("\n".join([*found, f"{len(found)} differences" if found else "all equal"]))
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
