"""What a verification found, level by level.

In: levels. Out: text and JSON. It never compares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

SHOWN = 20
WIDTH = 9
"""Of a level's name, where it has no backend's behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One kind of proof: what it covered, and every difference it met, in words."""

    name: str
    covered: str
    differences: tuple[str, ...] = ()
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """MoE layer -> the largest error of each of its experts, for levels that allow rounding."""

    def __str__(self) -> str:
        if not self.differences:
            return f"{self.name:<{WIDTH}} equal      {self.covered}"
        shown = [f"  {line}" for line in self.differences[:SHOWN]]
        if len(self.differences) > SHOWN:
            shown.append(f"  and {len(self.differences) - SHOWN} more")
        return "\n".join([f"{self.name:<{WIDTH}} DIFFERENT  {self.covered}; {len(self.differences)} differences:", *shown])


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of `convert --verify`."""

    subject: str
    levels: tuple[Level, ...]

    @property
    def equal(self) -> bool:
        """Whether no level met a difference."""
        return not any(level.differences for level in self.levels)

    def __str__(self) -> str:
        return "\n".join([f"verify   {self.subject}", *map(str, self.levels), "EQUAL" if self.equal else "DIFFERENT"])

    def json(self) -> str:
        """For programs: every level with all its differences, and the errors of each expert where rounding is allowed."""
        levels = [
            {
                "name": level.name,
                "equal": not level.differences,
                "covered": level.covered,
                "differences": list(level.differences),
                "errors": {layer: list(worst) for layer, worst in level.errors.items()},
            }
            for level in self.levels
        ]
        return json.dumps({"subject": self.subject, "equal": self.equal, "levels": levels}, indent=1)
