"""The page itself: outcome, both sides, levels, self-test, maps, differences, the run, and a place to sign.

In: a verdict, the run. Out: HTML. It never loads anything, and shows no name of an input unescaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from convert.options.values import in_units
from convert.verifier.environment import Run
from convert.verifier.page.maps import map_of, text
from convert.verifier.page.style import STYLE
from convert.verifier.questions import question_of
from convert.verifier.verdict import Level, Side, Trial, Verdict

_SIGNS = {
    "equal": ("equal", "✓"),
    "EQUAL": ("equal", "✓"),
    "DIFFERENT": ("different", "✗"),
    "not run": ("incomplete", "○"),
    "INCOMPLETE": ("incomplete", "!"),
}
"""State of a level, or outcome of all -> its class in the style, and a sign that says the same without a colour."""


def page(verdict: Verdict, run: Run | None = None) -> str:
    """The page; it loads nothing. `run` says where and how, if the caller knows."""
    parts = (
        f"<h1>{_state(verdict.outcome)}{text(verdict.summary.removeprefix(verdict.outcome))}</h1>",
        f"<p><code>{text(verdict.subject)}</code></p><p>{text(verdict.counts)}</p>",
        _sides(verdict.sides),
        _levels(verdict.levels),
        _self_test(verdict.self_test),
        *map(map_of, (level for level in verdict.levels if level.errors)),
        *map(_differences, (level for level in verdict.levels if level.differences)),
        _run(run) if run else "",
        "<div class=sign><div>name</div><div>date</div><div>signature</div></div>",
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{text(verdict.summary)}: {text(verdict.subject)}</title>"
        f"<meta name=viewport content='width=device-width,initial-scale=1'><style>{STYLE}</style>"
        f"<main>{''.join(parts)}</main></html>"
    )


def _state(state: str) -> str:
    name, sign = _SIGNS[state]
    return f"<span class='state {name}'>{sign} {state}</span>"


def _listed(entries: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{name}<dd>{words}' for name, words in entries)}</dl>"


def _sides(sides: tuple[Side, ...]) -> str:
    if not sides:
        return ""
    digests = {side.digest for side in sides}
    same = "<p>Both have the same content digest: they hold the same tensors, whatever their layouts.</p>"
    found = "".join(f"<h2>Checkpoint {letter}</h2>{_side(side)}" for letter, side in zip("AB", sides, strict=False))
    return found + (same if len(sides) > 1 and len(digests) == 1 and "" not in digests else "")


def _side(side: Side) -> str:
    state = side.content.get("state") if side.content else None
    return _listed(
        [
            ("path", f"<code>{text(side.path)}</code>"),
            ("size", f"{in_units(side.nbytes)} ({side.nbytes:,} bytes)" if side.nbytes is not None else "not told by a store"),
            ("format", f"{text(side.format)}, family {text(side.family)}, {side.tensors:,} tensors"),
            ("layout", "<br>".join(map(text, side.layout))),
            ("content", f"<span class=digest>{side.digest}</span>" if side.digest else "no digest was made"),
            *([("content by", text(": ".join(filter(None, (side.content["terms"], side.why)))))] if side.content else []),
            *([("training state", f"<span class=digest>sha256:{state['sha256']}</span>")] if state else []),
        ]
    )


def _levels(levels: tuple[Level, ...]) -> str:
    rows = "".join(f"<tr>{''.join(_cells(level))}</tr>" for level in levels)
    head = "<thead><tr><th>level<th>result<th>question and method<th>coverage<th>bound and worst</thead>"
    return f"<h2>Levels</h2><table class=cards>{head}<tbody>{rows}</tbody></table>"


def _cells(level: Level) -> Iterator[str]:
    question = question_of(level.name)
    told = f"({level.why})" if level.why else level.covered
    measured = "" if level.worst is None or level.why else f"; <b>worst {level.worst:.1e}</b>"
    allowed = f" of {level.bound:.1e} allowed" if measured and level.bound is not None else ""
    method = f"{question.method[0].upper()}{question.method[1:]}."
    yield f"<th scope=row>{text(level.name)}</th><td>{_state(level.state)}</td>"
    yield f"<td data-of=question>{question.asks} <span class=soft>{method}</span></td>"
    yield f"<td data-of=coverage>{text(told)}</td><td data-of=bound>{question.bound}{measured}{allowed}</td>"


def _self_test(trials: tuple[Trial, ...]) -> str:
    """The negative control, or that there was none."""
    head = "<h2>Self-test: would they notice?</h2>"
    if not trials:
        return f"{head}<p>Not run.</p>"
    return head + "".join(map(_trial, trials))


def _trial(trial: Trial) -> str:
    seen = [("seen by", text(", ".join(trial.seen)) or "none")]
    blind = [("<b>NOT seen by</b>", f"<b class=different>✗ {text(', '.join(trial.unseen))}</b>")] if trial.unseen else []
    untried = [("not tried", text(f"{level}: {why}")) for level, why in trial.untried.items()]
    return f"<p>{text(trial.flipped)}</p>{_listed([*seen, *blind, *untried])}"


def _differences(level: Level) -> str:
    lines = "".join(f"<li>{text(line)}</li>" for line in level.differences)
    return f"<h2 class=different>{text(level.name)}: {len(level.differences)} differences</h2><ul>{lines}</ul>"


def _run(run: Run) -> str:
    pairs = [
        ("command", f"<code>{text(run.command)}</code>"),
        ("began", f"{run.started}, took {run.seconds:,.1f} s"),
        ("tool", f"moe-convert {run.tool}, Python {run.python}"),
        ("libraries", text(", ".join(f"{name} {number}" for name, number in run.libraries.items()))),
        ("machine", text(", ".join(f"{name} {value}" for name, value in run.machine.items()))),
        ("device", text(run.device)),
    ]
    return f"<h2>Run</h2>{_listed(pairs)}"
