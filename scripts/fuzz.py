"""Damage checkpoints at random, and see that the tool refuses or converts them, and does nothing else.

    python scripts/fuzz.py --minutes 10 --seed 0

Each case takes a sound checkpoint, damages one of its files (header, index, config, manifest, journal, `_METADATA`, zarr's
metadata, OCDBT, ...) and runs one command on it in a sandbox: see `scripts/_sandbox.py` for what it must do and must not.
Prints how many cases of each kind ended with which exit code, and each different failure once, with the command that repeats
it; what it was given is kept below `--keep`. Exit code 1 if there was a failure.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._forked import Forks
from scripts._mutations import CANARY, mutate_bytes, mutate_header, mutate_json, mutate_lines, mutate_record
from scripts._sandbox import DOCUMENTED, Outcome, room, trial
from scripts._sandbox_bases import Sandbox, make_bases

Mutate = Callable[[bytes, random.Random], bytes]
PREFUSE, SPLIT, DIGESTS = "--prefuse {in} {out}", "--split {in} {out}", "--verify {in}"
RELAY, COMPARE = "--prefuse --layout interleaved {in} {out}", "--verify {in} {other} --no-gemm"
DRY, ORBAX, HF = "--prefuse {in} {out} --dry-run", "--to orbax {in} {out}", "--split --to hf {in} {out}"


@dataclass(frozen=True, slots=True)
class Target:
    """Files of a base, how they are damaged, and what is done with it then."""

    kind: str
    base: str
    files: str
    mutate: Mutate
    commands: Sequence[str]


TARGETS = (
    Target("header", "hf", "in/*.safetensors", mutate_header, (PREFUSE, ORBAX, COMPARE, DRY)),
    Target("header", "hf-fused", "in/*.safetensors", mutate_header, (SPLIT, DIGESTS, RELAY)),
    Target("index", "hf", "in/*.index.json", mutate_json, (PREFUSE, COMPARE)),
    Target("config", "hf", "in/config.json", mutate_json, (PREFUSE, ORBAX, COMPARE)),
    Target("config", "maxtext", "in/config.json", mutate_json, (HF.replace("--split ", ""), COMPARE)),
    Target("record", "hf-fused", "in/config.json", mutate_record, (SPLIT, RELAY, COMPARE)),
    Target("record", "ocdbt-fused", "in/**/_METADATA", mutate_record, (SPLIT, RELAY, COMPARE)),
    Target("record", "dirs-fused", "in/**/_METADATA", mutate_record, (SPLIT, RELAY, COMPARE)),
    Target("record", "maxtext-fused", "in/**/_METADATA", mutate_record, (SPLIT, HF)),
    Target("manifest", "hf-fused", "in/convert_manifest.json", mutate_json, (SPLIT, DIGESTS)),
    Target("manifest", "ocdbt-fused", "in/convert_manifest.json", mutate_json, (SPLIT, DIGESTS)),
    Target("manifest", "maxtext-fused", "in/convert_manifest.json", mutate_json, (HF, DIGESTS)),
    Target("journal", "hf-staged", "out.partial-*/.convert_*", mutate_lines, (PREFUSE,)),
    Target("journal", "ocdbt-staged", "out.partial-*/.convert_journal", mutate_lines, (PREFUSE,)),
    Target("journal", "dirs-staged", "out.partial-*/.convert_journal", mutate_lines, (PREFUSE,)),
    Target("_METADATA", "ocdbt", "in/**/_METADATA", mutate_json, (PREFUSE, COMPARE)),
    Target("_METADATA", "dirs", "in/**/_METADATA", mutate_json, (PREFUSE, COMPARE, DRY)),
    Target("_METADATA", "zarr2-fused", "in/**/_METADATA", mutate_json, (SPLIT, COMPARE)),
    Target("beside arrays", "dirs", "in/_sharding", mutate_json, (PREFUSE,)),
    Target("beside arrays", "dirs", "in/array_metadatas/*", mutate_json, (PREFUSE,)),
    Target("zarr.json", "dirs", "in/*/zarr.json", mutate_json, (PREFUSE, RELAY, COMPARE, DRY)),
    Target("zarr.json", "dirs-fused", "in/*/zarr.json", mutate_json, (SPLIT, DIGESTS)),
    Target(".zarray", "zarr2", "in/*/.zarray", mutate_json, (PREFUSE, RELAY, COMPARE, DRY)),
    Target("chunk", "dirs", "in/*/c/**/*", mutate_bytes, (RELAY, COMPARE)),
    Target("chunk", "zarr2", "in/*/0*", mutate_bytes, (RELAY, COMPARE)),
    Target("OCDBT", "ocdbt", "in/**/manifest.ocdbt", mutate_bytes, (PREFUSE, COMPARE, DRY)),
    Target("OCDBT", "ocdbt", "in/**/d/*", mutate_bytes, (PREFUSE, RELAY, COMPARE)),
    Target("OCDBT", "maxtext-fused", "in/**/d/*", mutate_bytes, (SPLIT, HF, DIGESTS)),
)


@dataclass(frozen=True, slots=True)
class Case:
    """One damaged checkpoint and one command, told by two numbers."""

    seed: int
    number: int

    @property
    def target(self) -> Target:
        """Each in turn."""
        return TARGETS[self.number % len(TARGETS)]

    @property
    def command(self) -> str:
        """One of the target's."""
        return random.Random(f"{self.seed}/{self.number}/command").choice(self.target.commands)

    @property
    def repeat(self) -> str:
        """What runs it again."""
        return f"python scripts/fuzz.py --seed {self.seed} --only {self.number}"

    def damage(self, box: Sandbox, keep: Path | None = None) -> None:
        """Do it; the damaged file is copied to `keep`, too."""
        dice = random.Random(f"{self.seed}/{self.number}")
        found = [path for path in box.work.glob(self.target.files) if path.is_file()]
        path = dice.choice(sorted(found, key=lambda path: (path.stat().st_size, path)))  # OCDBT's names are never the same
        try:
            new = self.target.mutate(path.read_bytes(), dice)
        except (ValueError, RecursionError):  # no JSON: a text of another kind
            new = mutate_bytes(path.read_bytes(), dice)
        if self.target.mutate is not mutate_header:  # whose length is told already
            new = new.replace(CANARY.encode(), str(box.canary).encode())
        path.write_bytes(new)
        if keep:
            (keep / path.name).write_bytes(path.read_bytes())
            (keep / "case.txt").write_text(f"{self.repeat}\n{self.target.base}: {path.relative_to(box.work)}: {self.command}\n")

    def run(self, forks: Forks, bases: Path, folder: Path) -> Outcome:
        """Run it in a sandbox that is then gone."""
        return trial(forks, folder, bases / self.target.base, self.damage, self.command, DOCUMENTED)


@dataclass(slots=True)
class Tally:
    """What has come out so far."""

    codes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[str, list[Case]] = field(default_factory=dict)
    cpu: float = 0.0
    slowest: float = 0.0
    largest: int = 0

    def note(self, case: Case, outcome: Outcome) -> bool:
        """Count a case; whether it failed as none before."""
        ran, new = outcome.ran, False
        self.cpu += ran.cpu
        self.slowest, self.largest = max(self.slowest, ran.seconds), max(self.largest, ran.peak)
        self.codes[case.target.kind, ran.stopped or (f"signal {ran.signal}" if ran.code is None else str(ran.code))] += 1
        for signature in {signature_of(problem) for problem in outcome.problems}:
            new = new or signature not in self.failures
            self.failures.setdefault(signature, []).append(case)
        return new

    def table(self) -> str:
        """Kinds by exit codes."""
        words = sorted({word for _, word in self.codes})
        rows = [["", *words, "all"]]
        for kind in dict.fromkeys(target.kind for target in TARGETS):
            counts = [self.codes[kind, word] for word in words]
            rows.append([kind, *map(str, counts), str(sum(counts))])
        rows.append(["all", *(str(sum(n for (_, w), n in self.codes.items() if w == word)) for word in words)])
        rows[-1].append(str(sum(self.codes.values())))
        return "\n".join("  ".join(cell.ljust(13) if not at else cell.rjust(8) for at, cell in enumerate(row)) for row in rows)


def signature_of(problem: str) -> str:
    """What failures have in common that are one."""
    kind, _, rest = problem.partition(": ")
    if kind == "exit 70":
        return f"exit 70: {rest.partition(':')[0].partition('(')[0]}, {rest.rpartition(', ')[2]}"
    return re.sub(r"'.*'|\d+(?= s| MiB)", "...", kind)


def fuzz(forks: Forks, bases: Path, folder: Path, arguments: argparse.Namespace) -> Tally:
    """Run cases until the time is over."""
    tally, number, began = Tally(), 0, time.process_time()
    while tally.cpu + time.process_time() - began < 60 * arguments.minutes:
        case = Case(arguments.seed, number)
        outcome = case.run(forks, bases, folder / "box")
        if tally.note(case, outcome):
            _keep(case, outcome, bases, folder, arguments.keep)
        number += 1
    tally.cpu += time.process_time() - began
    return tally


def _keep(case: Case, outcome: Outcome, bases: Path, folder: Path, keep: Path) -> None:
    """The first case of each failure: the damaged file, what was done with it, what was wrong."""
    place = keep / f"{case.seed}-{case.number}"
    place.mkdir(parents=True, exist_ok=True)
    box = Sandbox(root=folder / "again", base=bases / case.target.base)
    shutil.copytree(box.base, box.work, symlinks=True)
    case.damage(box, place)
    shutil.rmtree(box.root)
    (place / "problems.txt").write_text("\n".join([*outcome.problems, outcome.ran.stderr]), errors="backslashreplace")


def main() -> None:
    """Read the command line and damage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of CPU time, ours and that of the commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run case N alone, and show what it does")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="where failing inputs are kept")
    arguments = parser.parse_args()
    began = time.monotonic()
    with room() as folder, tempfile.TemporaryDirectory() as making:
        bases = make_bases(Path(making) / "bases")
        with Forks(JAX_PLATFORMS="cpu") as forks:
            if arguments.only is not None:
                case = Case(arguments.seed, arguments.only)
                outcome = case.run(forks, bases, folder / "box")
                texts = [ascii(text) for text in (outcome.ran.stdout, outcome.ran.stderr)]
                print(f"{case.target.kind}, {case.target.base}: {case.command}", outcome, *texts, sep="\n")
                _keep(case, outcome, bases, folder, arguments.keep)
                sys.exit(bool(outcome.problems))
            tally = fuzz(forks, bases, folder, arguments)
    print(tally.table())
    print(
        f"seed {arguments.seed}: {sum(tally.codes.values())} cases in {tally.cpu / 60:.1f} CPU minutes "
        f"({(time.monotonic() - began) / 60:.1f} by the clock); the slowest took {tally.slowest:.1f} s, the largest "
        f"{tally.largest >> 20} MiB; {len(tally.failures)} different failures"
    )
    for signature, cases in sorted(tally.failures.items()):
        print(f"{len(cases):5}  {signature}: {cases[0].repeat}  ({cases[0].target.base}: {cases[0].command})")
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
