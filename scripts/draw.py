"""Draw the two pictures of README: what is fused, and the ways between forms and formats.

    python scripts/draw.py scripts/results

In: the texts below. Out: `fusion.svg` and `ways.svg` in the given folder. No library: an SVG is text, and these need
rectangles, words and arrows. A white ground keeps them readable on dark pages.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from pathlib import Path

GATE, UP, DOWN, OTHER, INK = "#2a7f62", "#d1603d", "#5b6c8f", "#b9b9b9", "#222222"
CELL, GAP, EXPERTS = 26, 5, 4
APART, TOGETHER = 3, 0
"""Pixels of a matrix, between matrices; experts that are drawn; pixels between gate and up of one expert."""


def box(x: float, y: float, width: float, height: float, colour: str) -> str:
    """One matrix."""
    return f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='2' fill='{colour}'/>"


def word(x: float, y: float, text: str, colour: str = INK, anchor: str = "start", weight: int = 400) -> str:
    """One line of text, its base at (x, y)."""
    style = f"fill='{colour}' text-anchor='{anchor}' font-weight='{weight}'"
    return f"<text x='{x}' y='{y}' {style}>{html.escape(text)}</text>"


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head at its end."""
    return f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{INK}' stroke-width='1.5' marker-end='url(#head)'/>"


def fusion() -> Iterator[str]:
    """Gate and up of each expert, apart on the left, as one tensor on the right; down is the same on both sides."""
    rows = [("wi_0", "gate", GATE), ("wi_1", "up", UP), ("wo", "down", DOWN)]
    for row, (name, role, colour) in enumerate(rows):
        y = 40 + row * (CELL + 22)
        yield word(12, y + 18, name, weight=600)
        yield word(58, y + 18, role, colour)
        for expert in range(EXPERTS):
            yield box(106 + expert * (CELL + GAP), y, CELL, CELL, colour)
    yield word(12, 22, "3 x E tensors, each (K, N) or (N, K)", weight=600)
    yield word(106, 190, "expert 0, 1, 2, ... E - 1")
    yield arrow(252, 88, 352, 88)
    yield word(302, 78, "--prefuse", anchor="middle", weight=600)
    yield arrow(352, 112, 252, 112)
    yield word(302, 130, "--split", anchor="middle", weight=600)
    yield word(378, 22, "wi (E, K, 2N) and wo (E, N, K)", weight=600)
    yield word(378, 58, "wi", weight=600)
    yield word(378, 154, "wo", weight=600)
    width = 2 * CELL * 0.9
    for expert in range(EXPERTS):
        x = 412 + expert * width
        yield box(x, 40, width / 2 - 0.5, CELL, GATE) + box(x + width / 2, 40, width / 2 - 1, CELL, UP)
        yield box(412 + expert * CELL, 136, CELL - 1, CELL, DOWN)
    yield word(412, 88, "gate and up of an expert lie side by side:")
    yield word(412, 106, "one GEMM reads the activations once")
    yield word(412, 190, "every other tensor and file: as it was, bit for bit")


FORMS = {
    "Hugging Face safetensors": [
        (APART, "one tensor for each expert"),
        (APART, "stacked, gate and up apart"),
        (TOGETHER, "transformers 5: gate_up_proj"),
        (TOGETHER, "concat, vllm, flashinfer, ..."),
    ],
    "Orbax, as MaxText has it": [
        (APART, "wi_0, wi_1 (E, K, N)"),
        (TOGETHER, "wi, concat (E, K, 2N)"),
        (TOGETHER, "wi, per shard and padded"),
        (TOGETHER, "lane, gmm-ep, glu, ..."),
    ],
}
"""The forms that `ways` draws, by format: pixels between gate and up, and a name."""


def ways() -> Iterator[str]:
    """Two columns of forms: within a format by --prefuse, --split and --layout, between them by --to."""
    for column, (name, forms) in enumerate(FORMS.items()):
        x = 12 + column * 440
        yield f"<rect x='{x}' y='10' width='260' height='176' rx='6' fill='none' stroke='{OTHER}' stroke-width='1.5'/>"
        yield word(x + 130, 34, name, anchor="middle", weight=600)
        for row, (between, form) in enumerate(forms):
            y = 48 + row * 34
            yield box(x + 14, y, 10, 24, GATE) + box(x + 24 + between, y, 10, 24, UP)
            yield word(x + 48, y + 17, form)
    yield arrow(276, 80, 448, 80)
    yield word(362, 70, "--to orbax", anchor="middle", weight=600)
    yield arrow(448, 122, 276, 122)
    yield word(362, 140, "--to hf", anchor="middle", weight=600)
    yield word(12, 212, "Within a box: --prefuse --layout NAME, --split. Between boxes: the same with --to.")
    yield word(
        12, 232, "--verify compares any two of all these, bit for bit and through grouped GEMMs. --digest is the same for all."
    )


def page(width: int, height: int, parts: Iterator[str]) -> str:
    """A whole SVG, with the head of its arrows."""
    size = f"width='{width}' height='{height}' viewBox='0 0 {width} {height}'"
    shape = f"<path d='M0,0 L6,3 L0,6 Z' fill='{INK}'/>"
    head = f"<marker id='head' markerWidth='8' markerHeight='8' refX='6' refY='3' orient='auto'>{shape}</marker>"
    start = f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-family='sans-serif' font-size='13'>"
    return "\n".join(
        [start, f"<defs>{head}</defs>", f"<rect width='{width}' height='{height}' fill='white'/>", *parts, "</svg>", ""]
    )


def main(folder: Path) -> None:
    """Write both pictures into `folder`."""
    (folder / "fusion.svg").write_text(page(740, 206, fusion()))
    (folder / "ways.svg").write_text(page(770, 246, ways()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
