"""Any system call on the checkpoints may fail: a documented error, the input as it was, the output absent or right.

The same command then finishes without the fault. An interrupted call and one that does half of its work must never be taken for
the whole. Some calls are tried here, and each of them with `-m slow`. A fault that is met by the wrong answer, 1 (different), 2
(usage), 4 (cannot plan) or 5 (output exists), is a failure, too.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from scripts.make_checkpoint import make_checkpoint
from tests.crash.faults import NONE, Command, Fault, Outcome, build, not_durable

SIZE = {"experts": 2, "layers": 1, "embed": 256, "mlp": 160, "vocab": 16}
"""With tensors of 320 KiB, so that some go past the page cache, and others do not."""
FAILED = (3, 6)
"""The exit codes of an input that cannot be read, and of a failing disk."""
TELLING = ("Traceback", "this is a bug", "Exception ignored", "terminate called")
MANY = 14
"""Faults that are tried of each conversion, if not all are."""


class Conversion(NamedTuple):
    """What is converted, one of `SOURCES` or the output of another conversion, and how."""

    source: str
    options: Sequence[str]


CONVERSIONS = {
    "hf prefuse": Conversion("hf", ["--prefuse"]),
    "hf split": Conversion("hf prefuse", ["--split"]),
    "hf to orbax": Conversion("hf", ["--to", "orbax"]),
    "orbax to hf": Conversion("hf to orbax", ["--to", "hf"]),
    "orbax prefuse": Conversion("orbax", ["--prefuse", "--layout", "interleaved"]),
    "orbax split": Conversion("orbax prefuse", ["--split"]),
    "orbax prefuse, chunks kept": Conversion("orbax", ["--prefuse"]),
    "orbax split, chunks kept": Conversion("orbax prefuse, chunks kept", ["--split"]),
    "directories prefuse": Conversion("directories", ["--prefuse", "--layout", "interleaved"]),
    "directories prefuse, chunks kept": Conversion("directories", ["--prefuse"]),
}
VERIFICATIONS = {
    "hf": ("hf", "hf prefuse"),
    "orbax": ("orbax", "orbax prefuse"),
    "hf and orbax": ("hf", "hf to orbax"),
    "digests of hf": ("hf prefuse",),
    "digests of orbax": ("orbax prefuse",),
    "digests of chunks": ("orbax prefuse, chunks kept",),
}


def save(path: Path, *, ocdbt: bool) -> None:
    """A step of Orbax's with few arrays, in a database or in a directory each, and a file of the user's own beside it."""
    dice = np.random.default_rng(0)
    shapes = {"wi_0": (2, 256, 160), "wi_1": (2, 256, 160), "wo": (2, 160, 256)}
    moe = {name: dice.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tree = {"params": {"params": {"decoder": {"layers_0": {"moe_block": moe}}}}, "step": np.int32(3)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=ocdbt)) as checkpointer:
        checkpointer.save(path / "0" / "items", args=ocp.args.PyTreeSave(tree))
    (path / "assets").mkdir()
    (path / "assets" / "tokenizer.json").write_text("{}")


SOURCES: dict[str, Callable[[Path], object]] = {
    "hf": lambda path: make_checkpoint(path, family="qwen3_moe", shard=400_000, **SIZE),
    "orbax": lambda path: save(path, ocdbt=True),
    "directories": lambda path: save(path, ocdbt=False),
}


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def contents(path: Path) -> dict[str, bytes]:
    """Every file, but of a database what it holds, because its own files are called otherwise each time."""
    found = files(path)
    for name in [name for name in found if name.endswith("items/manifest.ocdbt")]:
        item = name.removesuffix("manifest.ocdbt")
        own = (f"{item}manifest.ocdbt", f"{item}d/", f"{item}ocdbt.process_")
        found = {other: data for other, data in found.items() if not other.startswith(own)}
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path / item}/"}).result()
        found |= {f"{item}{key.decode()}": store.read(key).result().value for key in store.list().result()}
        manifest = json.loads(found.get("convert_manifest.json", b"{}"))  # it names the files of the database, too
        kept = {key: value for key, value in manifest.items() if key not in ("files", "xxh3_128")}
        found["convert_manifest.json"] = json.dumps(kept).encode()
    return found


def told(outcome: Outcome, codes: Sequence[int] = FAILED) -> list[str]:
    """What is wrong with an exit code and with what was printed."""
    wrong = outcome.code not in (0, *codes) or any(words in outcome.text for words in TELLING)
    return [f"exit code {outcome.code}: {outcome.text.strip()}"] if wrong else []


@dataclass(slots=True, kw_only=True)
class Bench:
    """The command, and checkpoints below `root` that are made when they are asked for."""

    root: Path
    command: Command
    made: dict[str, dict[str, bytes]] = field(default_factory=dict)
    codes: Counter[int] = field(default_factory=Counter)
    """The exit codes of runs that met a fault."""

    def get(self, name: str) -> Path:
        path = self.root / name.replace(",", "").replace(" ", "-")
        if name not in self.made:
            if name in SOURCES:
                SOURCES[name](path)
            else:
                assert not told(self.convert(name, path), ())
            self.made[name] = contents(path)
        return path

    def convert(self, name: str, out: Path, fault: Fault = NONE) -> Outcome:
        source, options = CONVERSIONS[name]
        return self.command.run(*options, self.get(source), out, "--quiet", "--jobs", "2", fault=fault)

    def verify(self, name: str, *options: str, fault: Fault = NONE) -> Outcome:
        return self.command.run("--verify", *map(self.get, VERIFICATIONS[name]), *options, "--quiet", fault=fault)

    def undisturbed(self, name: str) -> Outcome:
        """A run without a fault; what it writes is what it wrote before, so that others can be compared with it."""
        self.get(name)
        clean = self.convert(name, self.root / "out")
        assert not [*told(clean, ()), *self.differences(name, self.root / "out"), *not_durable([clean], "out")]
        shutil.rmtree(self.root / "out")
        return clean

    def interrupted(self, name: str) -> tuple[Fault, list[Fault]]:
        """A fault in the midst of a conversion that ends it, and all that the run that takes it up can meet."""
        faults = [fault for fault in self.undisturbed(name).faults(every=True) if fault.kind == "EIO"]
        for first in faults[len(faults) // 2 :]:
            code, stages = self.convert(name, self.root / "out", first).code, list(self.root.glob("out.partial-*"))
            again = self.convert(name, self.root / "out") if code == 6 and stages else None
            for left in self.root.glob("out*"):
                assert again is None or left.name == "out"
                shutil.rmtree(left)
            if again:
                return first, again.faults(every=True)
        raise AssertionError(f"{name}: no fault leaves anything to take up")

    def conversion(self, name: str, *faults: Fault) -> list[str]:
        """What is wrong with a conversion that meets a fault (and when it goes on the next), and with the same one after it.

        What is noted of exit codes are those of the last fault.
        """
        source, others, out = self.get(CONVERSIONS[name].source), set(self.root.iterdir()), self.root / "out"
        before = files(source)
        runs, found = list[Outcome](), list[str]()
        for fault in faults:
            runs.append(self.convert(name, out, fault))
            found += told(runs[-1])
            if out.exists() or not runs[-1].code:
                found += self.differences(name, out)
        self.codes[runs[-1].code] += 1
        met = runs[-1].place
        if runs[-1].code:
            runs.append(self.convert(name, out))
            found += [f"then {problem}" for problem in told(runs[-1], ()) or self.differences(name, out)]
        # What a thread was about to make as its process ended is noted, too; what is not there cannot be lost.
        if lost := [path for path in not_durable(runs, out.name) if out.joinpath(*Path(path).parts[2:]).exists()]:
            found.append(f"shown before it was durable: {', '.join(sorted(lost))}")
        if files(source) != before:
            found.append("the input has changed")
        for left in set(self.root.iterdir()) - others:
            shutil.rmtree(left)
        return [f"{name}: {', '.join(map(str, faults))} at {met}: {problem}" for problem in found]

    def verification(self, name: str, fault: Fault, *options: str) -> list[str]:
        """What is wrong with a verification that meets a fault."""
        before = {one: files(self.get(one)) for one in VERIFICATIONS[name]}
        run = self.verify(name, *options, fault=fault)
        self.codes[run.code] += 1
        changed = before != {one: files(self.get(one)) for one in before}
        found = [*told(run), *(["an input has changed"] if changed else [])]
        return [f"verify {name}: {fault} at {run.place}: {problem}" for problem in found]

    def differences(self, name: str, out: Path) -> list[str]:
        """How an output differs from that of a run without a fault."""
        try:
            found, wanted = contents(out), self.made[name]
        except ValueError as error:
            return [f"a damaged output: {error}"]
        wrong = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        return [f"a wrong output: {', '.join(wrong)}"] if wrong else []


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    library = build(tmp_path_factory.mktemp("library"))
    if library is None:
        pytest.skip("there is no C compiler, or no Linux")
    root = tmp_path_factory.mktemp("faults").resolve()
    command = Command(library, root)
    yield Bench(root=root, command=command)
    command.close()


def sample(faults: Sequence[Fault], seed: str) -> list[Fault]:
    """Halves of what is read and written first, because half of a header may pass for a whole one; and others of all kinds."""
    halves = [fault for fault in faults if fault.n == 1 and fault.kind == "SHORT"]
    shuffled = random.Random(seed).sample(faults, len(faults))
    kinds = {(fault.call, fault.kind): fault for fault in (*shuffled, *halves)}
    return [*halves, *(fault for fault in kinds.values() if fault not in halves)][:MANY]


def check(faults: Sequence[Fault], problems: Callable[[Fault], list[str]], bench: Bench) -> None:
    """Try them all, and print how runs ended (`-rP` shows it)."""
    assert faults
    bench.codes.clear()
    found = list(itertools.chain.from_iterable(map(problems, faults)))
    print(f"{len(faults)} faults, exit codes: {', '.join(f'{n} x {code}' for code, n in sorted(bench.codes.items()))}")
    assert not found, "\n".join([f"{len(found)} problems with {len(faults)} faults:", *found])


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_meets_some_faults(bench: Bench, name: str) -> None:
    check(sample(bench.undisturbed(name).faults(every=False), name), partial(bench.conversion, name), bench)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_meets_every_fault(bench: Bench, name: str) -> None:
    check(bench.undisturbed(name).faults(every=True), partial(bench.conversion, name), bench)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_that_is_taken_up_meets_every_fault(bench: Bench, name: str) -> None:
    first, faults = bench.interrupted(name)
    check(faults, partial(bench.conversion, name, first), bench)


@pytest.mark.parametrize("name", VERIFICATIONS)
def test_a_verification_meets_some_faults(bench: Bench, name: str) -> None:
    clean = bench.verify(name, "--no-gemm")
    assert not told(clean, ())
    check(sample(clean.faults(every=False), name), lambda fault: bench.verification(name, fault, "--no-gemm"), bench)


@pytest.mark.slow
@pytest.mark.parametrize("name", VERIFICATIONS)
def test_a_verification_meets_every_fault(bench: Bench, name: str) -> None:
    clean = bench.verify(name, "--no-gemm")
    check(clean.faults(every=True), lambda fault: bench.verification(name, fault, "--no-gemm"), bench)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf", "orbax"])
def test_a_verification_with_gemms_meets_some_faults(bench: Bench, name: str) -> None:
    clean = bench.verify(name)
    assert not told(clean, ())
    check(sample(clean.faults(every=True), name), partial(bench.verification, name), bench)
