"""Prove that two checkouts of this tool write the same bytes, say the same and refuse the same.

    python scripts/compare_outputs.py OLD_CHECKOUT NEW_CHECKOUT

Both run the same commands on small checkpoints that are made for it (Hugging Face, Orbax in several kinds of stores, damaged
ones) and those below `--checkpoints`. Exit codes, texts (but for paths and times) and all files must be equal. What databases
(OCDBT) hold is compared as it is stored, key by key, for their files have random names. Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

LAYOUTS = "concat transformers vllm cutlass flashinfer interleaved glu32 gmm-ep fused-moe per-shard:2 lane:2"
TREES = ("", "--no-scan", "--scan-axis 0")
CUT = """
--prefuse --keep-chunks > --split --keep-chunks
--prefuse --drop-optimizer --memory 300MiB, --to hf --params-only --memory 300MiB
"""
"""Commands behind `>` take the output of the one before it, and those with `=` its input and its output."""
ORBAX = f"""{CUT}
--prefuse --layout {{layout}} --dry-run, --prefuse --layout {{layout}} --to hf --params-only
--prefuse --layout {{layout}} > --verify --no-gemm, --split, --split --to hf --params-only
--split --source-layout concat, --split --source-layout per-shard:2, --split --source-layout concat --to hf --params-only
--to hf, --to hf --params-only --max-shard-size 50KB
"""
HF = """
--prefuse --layout {layout} --dry-run, --prefuse --layout {layout} --dequantize bf16
--prefuse --layout {layout} > --verify --no-gemm, --split, --prefuse --layout {next}
--prefuse --layout {layout} --max-shard-size 50KB > --split --max-shard-size 30KB
--prefuse --to orbax {tree} --dry-run, --prefuse --to orbax {tree} --dequantize bf16
--prefuse --to orbax {tree}, --prefuse --layout per-shard --shards 2 --align maxtext > --split, --split --to hf
--to orbax {tree} > --to hf, --prefuse --to hf --layout vllm
--to orbax {tree} > --prefuse --keep-chunks > --split --keep-chunks
--prefuse > = --prefuse, = --prefuse --overwrite --layout vllm, = --prefuse --layout lane, --to orbax
--families, --quiet, --split, --split --layout concat, --split --prefuse, --split --dequantize bf16, --to hf
--prefuse --layout nonsense, --prefuse --source-layout nonsense, --prefuse --family nonsense, --prefuse --process-id 1
--prefuse --shards 2, --prefuse --shards 0, --prefuse --scan-axis 2, --prefuse --memory 1MB, --prefuse --to orbax --layout lane
"""
MANIFEST = "convert_manifest.json"
TINY: dict[str, Any] = {"experts": 4, "layers": 2, "shard": 60_000}
WIDE: dict[str, Any] = {**TINY, "embed": 32, "mlp": 256}
STORES: dict[str, dict[str, Any]] = {
    "directories": {"use_ocdbt": False, "use_zarr3": False},
    "not compressed": {"use_ocdbt": False, "use_zarr3": True, "use_compression": False},
    "many chunks": {"use_ocdbt": True, "use_zarr3": True, "chunk": 4096},
    "no record": {"use_ocdbt": True, "use_zarr3": True, "fused": True},
}
DAMAGED = {"qwen3_moe": "model-00002*", "mixtral": "config.json", "directories": "*/*/*wi_1/0*", "many chunks": "*/*/_METADATA"}
TIMES, CHUNK = re.compile(r"in [\d.]+ s \([\d.]+ \w+/s\)"), re.compile(r"(^|/)(c|[\d.]+)$")
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


@dataclass(slots=True)
class Comparison:
    """Both checkouts at work: a process for each, by the directory that it writes to; what was counted and found."""

    jobs: int
    sides: dict[Path, Popen[str]] = field(default_factory=dict)
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)
    found: list[str] = field(default_factory=list)

    def start(self, checkout: Path, work: Path) -> None:
        """Begin to work with a checkout, in which Python has to find the tool."""
        process = Popen([sys.executable, "-W", "ignore", "-c", CHILD], cwd=checkout, stdin=PIPE, stdout=PIPE, text=True)
        if not (process.stdout and process.stdout.readline().startswith(f"{checkout.resolve()}/")):
            raise SystemExit(f"{checkout} is no checkout of this tool")
        self.sides[work] = process

    def ask(self, words: list[str]) -> list[list[Any]]:
        """Run a command on both sides at once: exit codes, stdout and stderr, but for what differs from run to run."""
        for work, process in self.sides.items():
            print(json.dumps([re.sub("^@", f"{work}/", word) for word in words]), file=process.stdin, flush=True)
        lines = [(process.stdout.readline() if process.stdout else "", str(work)) for work, process in self.sides.items()]
        return [json.loads(TIMES.sub("in TIME", line.replace(work, "WORK"))) for line, work in lines]

    def run_all(self, checkpoint: Path, table: str) -> None:
        """Run all commands of a table on a checkpoint."""
        names = [name.replace(":", " --shards ") for name in LAYOUTS.split()]
        forms = [{"layout": a, "next": b, "tree": c} for (a, b), c in product(pairwise([*names, names[0]]), TREES)]
        rows = (row.format(**form) for row in table.splitlines() if row for form in forms)
        for row in dict.fromkeys(rows):
            self._run_row(row.split(" > "), (str(checkpoint), str(checkpoint)), str(checkpoint))
        for work in self.sides:
            shutil.rmtree(work, ignore_errors=True)

    def _run_row(self, row: list[str], last: tuple[str, str], checkpoint: str) -> None:
        """Run the commands before the first `>`, and after each of them the rest; what is refused is no input of others."""
        for options in row[0].split(", ") if row else ():
            source, out = last if options.startswith("=") else (last[1], f"@{self.tally.total()}")
            words = [*options.removeprefix("=").split(), source, checkpoint if "--verify" in options else out, "--quiet"]
            old, new = self.ask(words if "--verify" in words else [*words, "--jobs", str(self.jobs)])
            files, others = (contents(work / out[1:]) for work in self.sides)
            kind = " ".join(word for word in options.split() if word.startswith("--"))
            self.tally[kind, "refused" if old[0] else "done"] += 1
            self.tally.update((kind, "chunks" if CHUNK.search(name) else "files") for name in files)
            unlike = [f"{a!r} became {b!r}" for a, b in zip(old, new, strict=True) if a != b]
            unlike += [f"{name} differs" for name in sorted({*files, *others}) if files.get(name) != others.get(name)]
            self.found += [f"{checkpoint}: {options}: {text}" for text in unlike]
            if not old[0] and not new[0]:
                self._run_row(row[1:], (source, out), checkpoint)


def contents(out: Path) -> dict[str, bytes]:
    """All files of an output, with what a database holds in place of its own."""
    import tensorstore as ts

    bases = [path.parent for path in out.rglob("manifest.ocdbt") if not path.parent.name.startswith("ocdbt.process_")]
    own = {path for base in bases for path in (*base.rglob("manifest.ocdbt"), *base.rglob("d/*"))}
    found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file() and path not in own}
    for name in [name for name in found if Path(name).name == MANIFEST and found[name].startswith(b"{")]:
        # It lists files of random names, here or in an input that was made before, and has a digest of itself.
        manifest = json.loads(found[name])
        listed = {key: entry for key, entry in manifest.get("files", {}).items() if out / key not in own}
        found[name] = json.dumps(manifest | {"files": listed, "input": "", "xxh3_128": ""}).encode()
    for base in bases:
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{base}/"}).result()
        found |= {f"{base.relative_to(out)}/{key.decode()}": store.read(key).result().value for key in store.list().result()}
    return found


def make_inputs(folder: Path) -> None:
    """Checkpoints of both formats, of several stores, of leaves above 64 MB in one chunk, which are cut, and damaged ones."""
    from scripts.make_checkpoint import HF_MODELS, MAXTEXT_MODELS, make_checkpoint

    for family in HF_MODELS:
        make_checkpoint(folder / family, family=family, dtype="f32" if family == "olmoe" else "bf16", **TINY)
    for family in MAXTEXT_MODELS:
        made = make_checkpoint(folder / f"{family} wide", family=family, **WIDE)
        for name, scanned in (("tree", True), ("unscanned", False)):
            out = make_checkpoint(folder / f"{family} {name}", family=family, format="orbax", scanned=scanned, **WIDE)
            shutil.copy(made / "config.json", out)
    make_checkpoint(folder / "train state", family="qwen3_moe", format="orbax", train_state=True, jax_arrays=True, **TINY)
    make_checkpoint(folder / "large", family="qwen3_moe", format="orbax", experts=8, layers=4, embed=512, mlp=2112)
    for name, options in STORES.items():
        save_again(folder / "qwen3_moe tree", folder / name, **options)
    for name, pattern in DAMAGED.items():
        (path,) = shutil.copytree(folder / name, folder / f"{name} damaged").glob(pattern)
        path.write_bytes(path.read_bytes()[:-100])


def save_again(source: Path, out: Path, *, chunk: int | None = None, fused: bool = False, **options: bool) -> None:
    """The same tree, saved by Orbax in another kind of store, on wish with gate and up as MaxText itself fuses them."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(source / "0/items")
    if fused:
        moe = tree["params"]["params"]["decoder"]["layers"]["moe_block"]
        moe["wi"] = jax.numpy.concatenate((moe.pop("wi_0"), moe.pop("wi_1")), -1)
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(out / "0/items", args=ocp.args.PyTreeSave(tree, save_args=how))
    shutil.copy(source / "config.json", out)


def main() -> None:
    """Run and compare everything; print a line for each kind of command and one for each difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs=2, metavar=("OLD_CHECKOUT", "NEW_CHECKOUT"))
    parser.add_argument("--checkpoints", type=Path, default=ROOT.parent / "shared/checkpoints", help="a directory of some more")
    parser.add_argument("--jobs", type=int, default=2, help="workers of each conversion")
    arguments = parser.parse_args()
    comparison = Comparison(arguments.jobs)
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(made := Path(folder, "in"))
        for number, checkout in enumerate(arguments.checkouts):
            comparison.start(checkout, Path(folder, str(number)))
        for checkpoint in sorted(path for place in (made, arguments.checkpoints.resolve()) for path in place.glob("*/")):
            comparison.run_all(checkpoint, CUT if checkpoint.name == "large" else ORBAX if (checkpoint / "0").exists() else HF)
    tally, found = comparison.tally, "\n".join(comparison.found) or "all equal"
    for kind in dict.fromkeys(kind for kind, _ in tally):
        print(f"{kind:50}" + ", ".join(f"{tally[kind, what]:6} {what}" for what in ("done", "refused", "files", "chunks")))
    n = Counter(what for _, what in tally.elements())
    print(f"{n['done'] + n['refused']} conversions, {n['files']} files and {n['chunks']} stored chunks compared: {found}")
    sys.exit(bool(comparison.found))


if __name__ == "__main__":
    main()
