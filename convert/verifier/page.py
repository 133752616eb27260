"""The verdict as one offline HTML file: verdict, levels, a map of layers and experts, the environment.

In: a verdict. Out: the text of a page. It never loads anything from elsewhere.
"""

from __future__ import annotations

import html
import platform
from collections.abc import Iterator
from importlib.metadata import version

from convert.errors import one_line
from convert.verifier.verdict import Level, Verdict

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1a1a1a }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } code { overflow-wrap: anywhere }
.equal { color: #0a6b2d } .different { color: #b00020 } .incomplete { color: #7a4b00 }
table { border-collapse: collapse } td, th { text-align: left; padding: .3rem .8rem .3rem 0; vertical-align: top }
.map { display: grid; gap: 1px; overflow-x: auto } .map div { height: 14px; min-width: 6px }
.row { display: flex; gap: .6rem; align-items: center } .row span { width: 9rem; font-size: 12px; flex: none }
.row .map { flex: 1 } .scale { font-size: 12px; color: #555 }
"""
_CLASSES = {
    "equal": "equal",
    "EQUAL": "equal",
    "DIFFERENT": "different",
    "not run": "incomplete",
    "INCOMPLETE": "incomplete",
}
"""State of a level, or outcome of all -> its class in the style."""
_PACKAGES = ("jax", "numpy", "safetensors", "tensorstore", "ml_dtypes")


def page(verdict: Verdict) -> str:
    """The page; it loads nothing."""
    state, summary = _CLASSES[verdict.outcome], _text(verdict.summary)
    rows = "".join(f"<tr>{''.join(_cells(level))}</tr>" for level in verdict.levels)
    maps = "".join(map(_map, (level for level in verdict.levels if level.errors)))
    differences = "".join(_differences(level) for level in verdict.levels if level.differences)
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{summary}: {_text(verdict.subject)}</title>"
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>"
        f"<h1><span class={state}>{verdict.outcome}</span>{_beside(verdict)} <code>{_text(verdict.subject)}</code></h1>"
        f"<p>{_text(verdict.counts)}</p>"
        f"<table><tr><th>level<th>result<th>what it covered</tr>{rows}</table>{maps}{differences}"
        f"<h2>Environment</h2><p>Python {platform.python_version()}, {html.escape(platform.platform())}; {packages}</p></html>"
    )


def _text(text: str) -> str:
    """Names of an input as they are shown: without a control character, or half a letter, which no page can hold."""
    return html.escape(one_line(text))


def _cells(level: Level) -> Iterator[str]:
    told = level.covered if not level.why else f"({level.why})"
    yield f"<td>{level.name}</td><td class={_CLASSES[level.state]}>{level.state}</td><td>{_text(told)}</td>"


def _beside(verdict: Verdict) -> str:
    """What the verdict is about, if not about all, and what is missing from it."""
    return _text(verdict.summary.removeprefix(verdict.outcome))


def _map(level: Level) -> str:
    """A row for each MoE layer, a cell for each expert, darker where the error is larger."""
    largest = max((error for worst in level.errors.values() for error in worst), default=0.0)
    rows = []
    for layer, worst in level.errors.items():
        cells = "".join(
            f"<div title='{_text(layer)}, expert {e}: {error:.1e}' style='background:{_colour(error, largest)}'></div>"
            for e, error in enumerate(worst)
        )
        grid = f"grid-template-columns:repeat({max(1, len(worst))},1fr)"
        rows.append(f"<div class=row><span>{_text(layer)}</span><div class=map style='{grid}'>{cells}</div></div>")
    scale = f"<p class=scale>largest difference of an expert's outputs relative to their norm; darkest is {largest:.1e}</p>"
    return f"<h2>Layers and experts: {level.name}</h2>{''.join(rows)}{scale}"


def _colour(error: float, largest: float) -> str:
    if not error:
        return "#dff0e3"
    return f"hsl(10 80% {90 - 60 * error / largest:.0f}%)"


def _differences(level: Level) -> str:
    lines = "".join(f"<li>{_text(line)}</li>" for line in level.differences)
    return f"<h2 class=different>{level.name}: {len(level.differences)} differences</h2><ul>{lines}</ul>"
