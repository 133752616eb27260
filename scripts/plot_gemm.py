"""Draw the medians of benchmark_gemm.py's JSON files as one SVG: a panel for each file, model and pass, bars in a log scale.

    python scripts/plot_gemm.py scripts/results/*.json > scripts/results/benchmark_gemm.svg

No library: an SVG is text, and this one needs rectangles.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

COLOURS: Mapping[str, str] = {"unfused": "#8c8c8c", "concat": "#d1603d", "prefused": "#2a7f62"}
PUBLISHED = ("published: MaxText, TPU, 48 layers, decode", [("", {"unfused": 28.4, "concat": 20.4, "prefused": 6.1})])
"""What our numbers stand beside, in milliseconds."""
WIDTH, HEIGHT, BAR, GAP, ACROSS = 420, 210, 15, 16, 2
TOP, BOTTOM = 44, 40
"""Pixels of a panel, its bars and margins; panels in a row."""

Groups = Sequence[tuple[str, Mapping[str, float]]]
"""A label below each group of bars, and milliseconds of each variant."""


def panels(paths: Sequence[str]) -> Iterator[tuple[str, Groups]]:
    """A title and the groups of each panel."""
    yield PUBLISHED
    for path in paths:
        document = json.loads(Path(path).read_text())
        rows, environment = document["rows"], document["environment"]
        for model, work in dict.fromkeys((row["shape"]["model"], row["pass"]) for row in rows):
            mine = [row for row in rows if (row["shape"]["model"], row["pass"]) == (model, work)]
            k, n = mine[0]["shape"]["embed"], mine[0]["shape"]["mlp"]
            passes = "forward + backward" if work == "both" else work
            title = f"{model}, {passes}, one layer, K {k}, N {n}; {_where(environment)}"
            yield title, [(str(row["tokens"]), {v: 1e3 * s for v, s in row["median_seconds"].items()}) for row in mine]


def _where(environment: Mapping[str, str]) -> str:
    """The device, and what computes on it where its name does not say so."""
    backend, device = environment["backend"], " ".join(dict.fromkeys(environment["device"].split()))
    return backend if backend == device else f"{backend} on {device}"


def panel(title: str, groups: Groups) -> Iterator[str]:
    """The parts of one panel; bars begin at the power of ten below the smallest."""
    values = [value for _, group in groups for value in group.values()]
    low, high = math.floor(math.log10(min(values))), math.log10(max(values)) + 0.15
    base, room = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    yield f"<text x='0' y='14' font-weight='600'>{html.escape(title)}</text>"
    for power in range(low, math.ceil(high)):
        y = base - room * (power - low) / (high - low)
        yield f"<line x1='0' x2='{WIDTH - 30}' y1='{y:.1f}' y2='{y:.1f}' stroke='#ddd'/>"
        yield f"<text x='0' y='{y - 2:.1f}' fill='#888'>{10.0**power:g} ms</text>"
    x = 58
    for label, group in groups:
        for at, (variant, value) in enumerate(group.items()):
            tall = room * (math.log10(value) - low) / (high - low)
            left = x + at * BAR
            yield f"<rect x='{left}' y='{base - tall:.1f}' width='{BAR - 2}' height='{tall:.1f}' fill='{COLOURS[variant]}'/>"
            turned = f"translate({left + 9} {base - tall - 3:.1f}) rotate(-60)"
            yield f"<text transform='{turned}' font-size='8'>{_digits(value)}</text>"
        yield f"<text x='{x + BAR * 1.4:.1f}' y='{base + 13}' text-anchor='middle'>{label}</text>"
        x += 3 * BAR + GAP
    if groups[0][0]:
        yield f"<text x='58' y='{base + 27}' fill='#888'>tokens in the step</text>"


def _digits(value: float) -> str:
    """Three of them, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def picture(paths: Sequence[str]) -> str:
    """The whole SVG."""
    parts = []
    for number, (title, groups) in enumerate(panels(paths)):
        x, y = 14 + number % ACROSS * (WIDTH + 90), 34 + number // ACROSS * HEIGHT
        parts.append(f"<g transform='translate({x} {y})'>{''.join(panel(title, groups))}</g>")
    rows = math.ceil(len(parts) / ACROSS)
    legend = "".join(
        f"<rect x='{14 + 90 * at}' y='8' width='11' height='11' fill='{colour}'/><text x='{30 + 90 * at}' y='17'>{name}</text>"
        for at, (name, colour) in enumerate(COLOURS.items())
    )
    size = f"width='{ACROSS * (WIDTH + 90)}' height='{40 + rows * HEIGHT}'"
    style = "font-family='system-ui, sans-serif' font-size='11' fill='#222'"
    ground = "<rect width='100%' height='100%' fill='white'/>"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} {style}>{ground}{legend}{''.join(parts)}</svg>\n"


if __name__ == "__main__":
    sys.stdout.write(picture(sys.argv[1:]))
