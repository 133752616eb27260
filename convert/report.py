"""What a person reads: the plan, the summary of a run.

In: plans, reports. Out: text. It never prints it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from convert.commit.processes import share
from convert.errors import one_line
from convert.options.values import counted
from convert.options.values import in_units as size
from convert.planning.documents import report_document
from convert.planning.forms import Form
from convert.planning.planner import Plan
from convert.planning.targets import LORA, OTHER, Target, Way
from layouts.language.layout import ROLES
from layouts.language.parts import CHUNKS, EXTRA
from layouts.language.template import Template
from layouts.matching.packing import WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of a conversion."""

    plan: Plan
    seconds: float
    resumed: int
    """Tensors that an earlier run had finished."""
    notes: tuple[str, ...] = ()
    proof: str = ""
    """What was looked at to say that the output was there already, made by the same plan from the same input."""
    process: tuple[int, int] = (0, 1)
    """Which of how many processes this is the report of."""

    @property
    def written(self) -> bool:
        """False if the output was there already."""
        return not self.proof

    def to_dict(self) -> dict[str, Any]:
        """For programs, as `--json` has it."""
        return report_document(self)

    def __str__(self) -> str:
        plan = self.plan
        if self.proof:
            return _joined([_headline(plan), self.proof])
        index, count = self.process
        if index:
            return f"process {index} of {count} has written its share of {plan.out}"
        rate = plan.nbytes / max(self.seconds, 1e-9)
        by = f" by {count} processes" if count > 1 else ""
        lines = [
            f"{_headline(plan)}",
            f"wrote  {plan.out}: {size(plan.nbytes)} in {self.seconds:.1f} s ({size(rate)}/s){by}",
        ]
        if plan.content:
            model = plan.content["model"]
            lines += [f"content  {word}:{model[word]}" for word in ("sha256", "xxh3") if word in model]
        if plan.left_out_files:
            lines.append(f"{_left_out(plan)}: {', '.join(plan.left_out_files)}")
        if self.resumed:
            lines.append(f"resumed: {self.resumed} tensors were finished by an earlier run")
        loud = plan.merging or any(first.role == LORA for first, _ in plan.targets.forms)
        said = plan.remarks if loud else ()  # what was taken of an adapter, and its alpha, decide on its numbers
        return _joined([*lines, *(f"note: {note}" for note in (*said, *self.notes))])


def _joined(lines: Iterable[str]) -> str:
    return "\n".join(map(one_line, lines))


def _headline(plan: Plan) -> str:
    if plan.merging:
        return (
            f"merge  {plan.merging.adapter} into {plan.source} ({plan.family}, layout {plan.layout}): "
            f"{len(plan.merging.names)} of {len(plan.targets)} tensors computed, all others copied as they are"
        )
    forms = plan.targets.forms
    experts = max((first.sizes.get("e", 0) for first, _ in forms if first.role in ROLES), default=0)
    moved = sum(count for first, count in forms if first.role in ROLES)
    lora = sum(count for first, count in forms if first.role == LORA)
    others = len(plan.targets) - moved - lora
    how = "copied as they are" if all(first.role != OTHER for first, _ in forms) else "in the other format's axes"
    return (
        f"{plan.action}  {plan.source} ({plan.family}) -> {plan.format}, layout {plan.layout}: "
        f"{counted(_blocks(plan.targets), 'MoE block')} of {counted(experts, 'expert')}, {counted(moved, 'expert tensor')}, "
        f"{f'{lora} of LoRA, ' if lora else ''}{counted(others, 'other')} {how}"
    )


def _blocks(targets: Iterable[Target]) -> int:
    """How many times the experts of a layer are there, also in stacks of layers, and as an optimizer's moments."""
    found: dict[tuple[object, ...], int] = {}
    ways: dict[int, tuple[tuple[str, ...], int]] = {}
    for target in (t for t in targets if t.role == "wi" and t.part in WEIGHTS):
        if (known := ways.get(id(target.way))) is None:
            layers = (target.sizes[axis] for axis in target.target.pattern.axes if axis not in {*"ekg", *EXTRA, *CHUNKS})
            known = ways[id(target.way)] = tuple(axis for axis in target.index if axis not in "eg"), math.prod(layers)
        axes, layers_of = known
        found[target.target.key.text, *axes, *map(target.index.get, axes)] = layers_of
    return sum(found.values())


def describe_plan(plan: Plan, peak: int, jobs: int) -> str:
    """The plan as `--dry-run` prints it: one line per kind of tensor, with layers and experts folded into ranges."""
    lines = [_headline(plan), ""]
    for (source, target, shape, dtype), (way, count) in _fold(plan.targets.forms).items():
        packed = ", packed: in and out keep their order" if way.packed else ""
        sections = f", u in turns by {way.turns.text}" if way.turns else ""
        lines.append(f"  {target}  {dtype} {shape}  x{count}  <- {source}{packed}{sections}")
    computed, told = (plan.merging.names, plan.merging.lines) if plan.merging else (frozenset[str](), ())
    lines += [*(f"  {line}" for line in told), ""]
    kept = (target for target in plan.targets if target.spec.name not in computed)
    verbatim = [f"  {name}  x{count}  {size(nbytes)}" for name, count, nbytes in _fold_names(kept)]
    lines += ["copied as they are:", *(verbatim or ["  nothing"])]
    lines += [f"note: {remark}" for remark in plan.remarks]
    if plan.computed:
        lines += [f"computed, not only moved: {plan.computed}", *(f"  {kind}" for kind in plan.computed_kinds)]
    for option in dict.fromkeys(plan.left_out.values()):
        lines += [f"left out, as {option} says:", *(f"  {name}" for name, by in plan.left_out.items() if by == option)]
    lines += [f"held once by MaxText, and compared before anything is written: {one} = {other}" for one, other in plan.twins]
    lines += _files(plan)
    lines.append("")
    lines.append(f"output {plan.out}: {len(plan.targets)} tensors, {size(plan.nbytes + plan.side_bytes)}; nothing was written")
    lines.append(f"memory: at most {size(peak)} with {jobs} workers")
    return _joined(lines)


def _files(plan: Plan) -> Iterator[str]:
    """What is carried over of the files beside the tensors, and what is not."""
    count = f" ({len(plan.side_files)} files, {size(plan.side_bytes)})" if plan.side_bytes else ""
    yield f"side files: {', '.join(plan.side_files) or 'none'}{count}"
    if plan.left_out_files:
        yield f"{_left_out(plan)}:"
        yield from (f"  {name}  {size(nbytes)}" if nbytes else f"  {name}" for name, nbytes in plan.left_out_files.items())
    if plan.never_copied:
        yield f"never copied: {', '.join(plan.never_copied)}"


def _left_out(plan: Plan) -> str:
    total = sum(plan.left_out_files.values())
    how_much = (
        f"{counted(len(plan.left_out_files), 'file')}{f', {size(total)}' if total else ''}"  # a store does not tell sizes
    )
    return f"left out, other weights and indexes ({how_much}; --copy-all takes them)"


def describe_division(pieces: Sequence[tuple[str, int]], count: int) -> str:
    """How the pieces of the output are divided among processes: one line for each, with what it begins with."""
    sizes = [nbytes for _, nbytes in pieces]
    lines = [f"{len(pieces)} pieces (files, or batches of arrays) for {count} processes:"]
    for index, own in enumerate(share(sizes, count)):
        first = f", from {pieces[own[0]][0]}" if own else ""
        lines.append(f"  process {index}: {size(sum(sizes[number] for number in own))} in {len(own)} pieces{first}")
    return _joined(lines)


def _fold(forms: Iterable[Form]) -> dict[tuple[str, str, str, str], tuple[Way, int]]:
    """By what a line says of them: the way of the first targets, and how many there are."""
    folded: dict[tuple[str, str, str, str], tuple[Way, int]] = {}
    for t, count in (form for form in forms if form.first.role != "verbatim"):
        source, target = (f"{_bound(side.key, t)}  '{side.pattern.text}'" for side in (t.source, t.target))
        line = source, target, str(t.spec.shape), t.spec.dtype
        way, before = folded.get(line, (t.way, 0))
        folded[line] = way, before + count
    return folded


def _bound(key: Template, target: Target) -> str:
    """A key for people: with the path where it is, and the numbers open."""
    known = {slot: target.index[slot] for slot in key.slots if len(slot) > 1 and slot in target.index}
    for slot, at in known.items():
        key = key.bind(slot, at) if isinstance(at, int) else key
    text = key.text
    for slot, at in known.items():
        text = text.replace(f"{{{slot}}}", str(at))
    return text


def _fold_names(targets: Iterable[Target]) -> list[tuple[str, int, int]]:
    """Names of verbatim tensors with their numbers replaced by `*`, how many there are, and their bytes."""
    counts: dict[str, tuple[int, int]] = {}
    for target in (t for t in targets if t.role == "verbatim"):
        folded = ".".join("*" if part.isdigit() else part for part in target.spec.name.split("."))
        count, nbytes = counts.get(folded, (0, 0))
        counts[folded] = (count + 1, nbytes + target.spec.nbytes)
    return [(name, count, nbytes) for name, (count, nbytes) in counts.items()]
