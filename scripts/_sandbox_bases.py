"""The sound checkpoints that hostile ones are made from, tiny ones of each kind, and the sandboxes that hold copies of them.

A base is a directory that holds `in`, and for those that end in `-staged` also what an interrupted conversion left beside it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HF = ("hf", "hf-fused", "hf-again")
DATABASES = ("ocdbt", "ocdbt-fused", "maxtext", "maxtext-fused")
FOLDERS = ("dirs", "dirs-fused", "zarr2", "zarr2-fused")
STAGED = ("hf-staged", "ocdbt-staged", "dirs-staged")
BASES = (*HF, *DATABASES, *FOLDERS, *STAGED)
OUT = "out"
"""What the outputs of conversions are called; the names of staging directories begin with it."""
WORK = "/".join(f"l{number}" for number in range(1, 9))
"""The way from a sandbox to its input: long, so that names with many `..` still end inside."""
LIMIT = 5 * 10**9
"""The command's own `--max-shard-size`, which is a part of what tells one conversion from another."""


def make_bases(folder: Path) -> Path:
    """Make all of `BASES` below a directory that is not there yet."""
    import convert
    from scripts.make_checkpoint import make_checkpoint

    made = {name: folder / name / "in" for name in BASES}
    for path in made.values():
        path.parent.mkdir(parents=True)
    make_checkpoint(made["hf"], family="qwen3_moe", experts=3, layers=1, shard=60_000)
    make_checkpoint(made["ocdbt"], family="qwen3_moe", format="orbax", experts=3, layers=2, jax_arrays=True)
    _save(made["dirs"], use_ocdbt=False, use_zarr3=True)
    _save(made["zarr2"], use_ocdbt=False, use_zarr3=False)
    convert.reformat(made["hf"], made["maxtext"], to="orbax")
    convert.prefuse(made["hf"], made["maxtext-fused"], to="orbax")
    for name in ("hf", "ocdbt", "dirs", "zarr2"):
        convert.prefuse(made[name], made[f"{name}-fused"])
    convert.split(made["hf-fused"], made["hf-again"])
    for name in STAGED:
        shutil.copytree(made[name.removesuffix("-staged")], made[name])
        _interrupt(made[name], made[name].with_name(OUT))
    return folder


def _save(path: Path, **options: bool) -> None:
    """A small tree as Orbax saves it, its item at the root."""
    import jax
    import ml_dtypes
    import numpy as np
    import orbax.checkpoint as ocp

    dice = np.random.default_rng(0)

    def noise(*shape: int) -> Any:
        return dice.integers(1, 1 << 14, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)

    moe = {name: noise(3, 2, *sizes) for name, sizes in (("wi_0", (16, 8)), ("wi_1", (16, 8)), ("wo", (8, 16)))}
    layers = {"moe_block": {"gate": {"kernel": noise(16, 2, 3)}, **moe}}
    tree = {"params": {"params": {"decoder": {"layers": layers, "norm": {"scale": noise(16)}}}}, "step": np.int32(1)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(jax.tree.map(jax.device_put, tree)))


def _interrupt(source: Path, out: Path) -> None:
    """Leave a staging directory with all that a conversion notes in it: the output appears while it is at work."""
    import convert

    def appear(_: int) -> None:
        out.mkdir(exist_ok=True)
        (out / "something").touch()

    try:
        convert.prefuse(source, out, max_shard_size=LIMIT, progress=appear)
    except convert.OutputError:
        shutil.rmtree(out)
    if not list(out.parent.glob(f"{OUT}.partial-*")):
        raise RuntimeError(f"{source}: no staging directory is left by a conversion that could not publish")


def shared_bases(folder: Path) -> Path:
    """The bases below a directory that several processes share; the first one makes them."""
    with (folder / "bases.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bases").exists():
            make_bases(folder / "making").rename(folder / "bases")
    return folder / "bases"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """A laid out sandbox: the base that it is a copy of, what the output is called, and what `{word}` is in commands."""

    root: Path
    base: Path
    out_name: str = OUT
    word: str = ""

    @property
    def work(self) -> Path:
        """The directory with the input and, later on, the output."""
        return self.root / WORK

    @property
    def source(self) -> Path:
        """The input."""
        return self.work / "in"

    @property
    def canary(self) -> Path:
        """A directory that nobody has a reason to touch; as absolute a path as a hostile name may have."""
        return self.root / "canary"

    @property
    def item(self) -> Path:
        """The directory with `_METADATA`, in a sound input."""
        return next(path.parent for path in self.source.rglob("_METADATA"))

    @property
    def stage(self) -> Path:
        """The staging directory that a base brings along."""
        return next(self.work.glob(f"{OUT}.partial-*"))

    def argv(self, command: str) -> list[str]:
        """The arguments of a command such as `--prefuse {in} {out}`."""
        if "{other}" in command and not (self.work / "other").exists():
            shutil.copytree(self.base / "in", self.work / "other", symlinks=True)
        places = {"in": self.source, "out": self.work / self.out_name, "other": self.work / "other", "word": self.word}
        words = [word.format(**places) for word in command.split()]
        return [*words, *(() if "--noisy" in words else ("--quiet",))]


def lay(folder: Path, base: Path) -> Sandbox:
    """Lay out a sandbox in a directory that is not there yet: a copy of a base, canaries beside it and above."""
    box = Sandbox(root=folder, base=base)
    box.work.mkdir(parents=True)
    shutil.copytree(base, box.work, symlinks=True, dirs_exist_ok=True)
    for name in ("home", "cwd"):
        (folder / name).mkdir()
    for place in (box.canary, box.work, *(folder / above for above in Path(WORK).parents)):
        for name in ("x.a", "x.b"):
            (place / name).mkdir(parents=True)
            (place / name / "kept").write_text("a canary")
    for stage in box.work.glob(f"{OUT}.partial-*"):
        _adopt(stage)
    return box


def _adopt(stage: Path) -> None:
    """The journal knows the inode of the directory that it is of; a copy's is another."""
    for journal in stage.glob(".convert_journal"):
        first, *rest = journal.read_text().splitlines(keepends=True)
        if first.startswith('{"inode"'):
            journal.write_text("".join([json.dumps({"inode": (stage / "new").stat().st_ino}) + "\n", *rest]))
