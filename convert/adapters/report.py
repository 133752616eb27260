"""What a person reads of an adapter's conversion.

In: plans. Out: text. It never prints it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from convert.adapters.plan import AdapterPlan
from convert.errors import one_line
from convert.options.values import counted
from convert.options.values import in_units as size
from convert.planning.documents import report_document


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterReport:
    """The outcome of a conversion of an adapter."""

    plan: AdapterPlan
    seconds: float
    resumed: int = 0
    notes: tuple[str, ...] = ()
    proof: str = ""
    """What was looked at to say that the output was there already."""

    @property
    def written(self) -> bool:
        """False if the output was there already."""
        return not self.proof

    def to_dict(self) -> dict[str, Any]:
        """For programs, as `--json` has it."""
        return report_document(self)

    def __str__(self) -> str:
        plan = self.plan
        done = self.proof or f"wrote  {plan.out}: {size(plan.nbytes)} in {self.seconds:.1f} s"
        lines = [_headline(plan), done, *(f"note: {remark}" for remark in (*plan.remarks, *self.notes))]
        if plan.left_out_files and not self.proof:
            lines.append(f"left out, other weights (--copy-all takes them): {', '.join(plan.left_out_files)}")
        if self.resumed:
            lines.append(f"resumed: {self.resumed} tensors were finished by an earlier run")
        return "\n".join(map(one_line, lines))


def _headline(plan: AdapterPlan) -> str:
    experts = max(len(recipe.scales) for making in plan.makings for recipe in making.recipes)
    return (
        f"{plan.action}  {plan.source} (adapter, {plan.family or 'family not known'}) form {plan.way.source.name} -> "
        f"{plan.way.target.name}: {counted(len(plan.makings), 'block')} of {counted(experts, 'expert')}, "
        f"{counted(len(plan.specs) - len(plan.copied), 'expert tensor')}, "
        f"{counted(len(plan.copied), 'other')} copied as they are"
    )


def describe_plan(plan: AdapterPlan) -> str:
    """The plan as `--dry-run` prints it: one line for each kind of projection."""
    lines = [_headline(plan), "", *_recipes(plan), ""]
    lines += [f"note: {remark}" for remark in plan.remarks]
    lines.append(f"written anew: {', '.join(plan.texts)}; side files: {', '.join(plan.side_files) or 'none'}")
    if plan.left_out_files:
        lines.append(f"left out, other weights (--copy-all takes them): {', '.join(plan.left_out_files)}")
    if plan.never_copied:
        lines.append(f"never copied: {', '.join(plan.never_copied)}")
    lines.append(f"output {plan.out}: {len(plan.specs)} tensors, {size(plan.nbytes)}; nothing was written")
    lines.append(f"memory: at most {size(plan.peak)} for a block of experts")
    return "\n".join(map(one_line, lines))


def _recipes(plan: AdapterPlan) -> Iterator[str]:
    kinds: Counter[tuple[str, ...]] = Counter()
    for making in plan.makings:
        for recipe in making.recipes:
            scales = set(recipe.scales)
            one = next(iter(scales))
            scale = f"rank {one.rank}, alpha {one.alpha}, scale {one.factor:g}" if len(scales) == 1 else f"{len(scales)} scales"
            folded = ", B times powers of two" if any(map(any, recipe.shifts.values())) else ""
            kinds[f"{recipe.unit} <- {' + '.join(recipe.sources)}", recipe.how + folded, scale] += 1
    for (what, how, scale), count in kinds.items():
        yield f"  {what}  x{count}  ({how})  {scale}"
