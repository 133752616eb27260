"""Code of the guides, which tests run as it stands on the page."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def run(page: str, heading: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the block of code below a heading, with these names in it, and gives the names that are there in the end."""
    lines = (ROOT / page).read_text().splitlines()
    below = lines[lines.index(heading) + 1 :]
    start = next(at for at, line in enumerate(below) if line.startswith("    "))
    assert not any(line.startswith("#") for line in below[:start]), f"{heading} has no code"
    block = []
    for line in below[start:]:
        if line and not line.startswith("    "):
            break
        block.append(line)
    names = dict(given)
    exec(compile(textwrap.dedent("\n".join(block)), f"{page}: {heading}", "exec"), names)
    return names
