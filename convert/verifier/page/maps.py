"""Layers down, experts across: the largest difference of each expert, as steps of lightness and as numbers.

In: a level that measured. Out: HTML. It never rounds a difference to nothing: what is not zero is never shown as zero.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Sequence

from convert.errors import one_line
from convert.verifier.verdict import Level

ROW = 14
"""Pixels of a layer."""
_TICKS = 8
_PARTS = (0.0, 0.01, 0.1, 1.0)
"""Where the steps of lightness end, as parts of what is allowed."""


def map_of(level: Level) -> str:
    """The map, what its steps mean and how many experts are in each, and a table with every value."""
    rows = list(level.errors.items())
    experts = max((len(errors) for _, errors in rows), default=0)
    cells = "".join(_cells(y, errors, level.bound) for y, (_, errors) in enumerate(rows))
    labels = _labels([label for label, _ in rows])
    svg = (
        f"<svg role=img aria-label='{len(rows)} layers by {experts} experts; the values are in the table below' "
        f"viewBox='0 0 {experts} {len(rows)}' height={ROW * len(rows)} preserveAspectRatio=none>"
        f"<rect class=v0 width={experts} height={len(rows)} />{cells}</svg>"
    )
    return (
        f"<h2>Layers and experts: {text(level.name)}</h2>"
        f"<p class=soft>The largest difference of each expert's outputs, relative to the norm of a row; {_allowed(level)}.</p>"
        f"<div class=map><span>layer</span><div class=ticks>{''.join(_ticks(experts))}</div><span>largest (expert)</span>"
        f"<ol>{''.join(f'<li>{label}' for label in labels)}</ol>{svg}"
        f"<ol class=worst>{''.join(f'<li>{_worst(errors)}' for _, errors in rows)}</ol></div>"
        f"{_legend(level)}{_table(level, experts)}"
    )


def text(words: str) -> str:
    """Names of an input as they are shown: without a control character, or half a letter, which no page can hold."""
    return html.escape(one_line(words))


def _allowed(level: Level) -> str:
    return f"{level.bound:.1e} is allowed" if level.bound else "no bound was noted"


def _step(error: float, bound: float | None) -> int:
    """How dark: 0 for none, 4 for more than is allowed (or what is no number)."""
    limit = bound or 1.0
    return next((step for step, part in enumerate(_PARTS) if error <= part * limit), len(_PARTS))


def _cells(y: int, errors: Sequence[float], bound: float | None) -> str:
    """The cells of a layer; neighbours of one step are one rectangle."""
    found, start = [], 0
    steps = [_step(error, bound) for error in errors]
    for at in range(1, len(steps) + 1):
        if at == len(steps) or steps[at] != steps[start]:
            if steps[start]:
                found.append(f"<rect class=v{steps[start]} x={start} y={y} width={at - start} height=1 />")
            start = at
    return "".join(found)


def _ticks(experts: int) -> Iterator[str]:
    """The numbers of some experts, above the middle of their cells."""
    step = max(1, -(-experts // _TICKS))
    for e in range(0, experts, step):
        yield f"<span style='left:{100 * (e + 0.5) / experts:.2f}%'>{e}</span>"


def _labels(labels: Sequence[str]) -> list[str]:
    """What tells layers apart: their numbers, where they have names that differ in nothing else."""
    numbers = [label.removeprefix("layer ") for label in labels]
    if all(number.isdecimal() for number in numbers):
        return numbers
    return [str(row) for row in range(len(labels))]


def _worst(errors: Sequence[float]) -> str:
    worst = max(errors, default=0.0)
    return f"{worst:.1e} ({errors.index(worst)})" if worst else "0"


def _legend(level: Level) -> str:
    """What each step means, and how many experts are in it."""
    counts = Counter(_step(error, level.bound) for errors in level.errors.values() for error in errors)
    words = ("no difference", "up to 1 % of what is allowed", "up to 10 %", "up to 100 %", "MORE than is allowed")
    items = (
        f"<li><svg viewBox='0 0 1 1'><rect class=v{step} width=1 height=1 /></svg> {word}: {counts[step]:,} experts"
        for step, word in enumerate(words)
    )
    return f"<ul class=legend>{''.join(items)}</ul>"


def _table(level: Level, experts: int) -> str:
    head = "".join(f"<th>{e}" for e in range(experts))
    rows = "".join(
        f"<tr><th>{text(label)}{''.join(f'<td>{error:.1e}' if error else '<td>0' for error in errors)}"
        for label, errors in level.errors.items()
    )
    return (
        f"<details><summary>Every value as a table</summary><div class=values tabindex=0 role=region "
        f"aria-label='differences by layer and expert'><table><tr><th>layer, expert{head}{rows}</table></div></details>"
    )
