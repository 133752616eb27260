"""What a verification found, level by level.

In: levels. Out: text and JSON. It never compares, and calls nothing equal that was not looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from convert.errors import one_line

SHOWN = 20
WIDTH = 9
"""Of a level's name, where it has no backend's behind it."""
EQUAL, DIFFERENT, NOT_RUN = "equal", "DIFFERENT", "not run"
"""The states of a level, as text, JSON and page have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One kind of proof: what it covered, and every difference it met, in words.

    `compared` says how much was looked at, in whatever a level counts (bytes, rows, files); nothing is never equal. `not_run`
    is why a level, or what it is there for, could not run. Levels that nobody `asked` for may be without a result.
    """

    name: str
    covered: str
    compared: int
    differences: tuple[str, ...] = ()
    errors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """MoE layer -> the largest error of each of its experts, for levels that allow rounding."""
    not_run: str = ""
    asked: bool = True

    @property
    def state(self) -> str:
        """`equal`, `DIFFERENT` or `not run`."""
        if self.differences:
            return DIFFERENT
        return NOT_RUN if self.not_run or not self.compared else EQUAL

    @property
    def why(self) -> str:
        """Why it did not run; empty if it did."""
        return (self.not_run or "there was nothing to compare") if self.state == NOT_RUN else ""

    def __str__(self) -> str:
        if self.state != DIFFERENT:
            told = self.covered if self.state == EQUAL else f"({self.why})"
            return one_line(f"{self.name:<{WIDTH}} {self.state:<{WIDTH}}  {told}")
        shown = [f"  {line}" for line in self.differences[:SHOWN]]
        if len(self.differences) > SHOWN:
            shown.append(f"  and {len(self.differences) - SHOWN} more")
        head = f"{self.name:<{WIDTH}} DIFFERENT  {self.covered}; {len(self.differences)} differences:"
        return "\n".join(map(one_line, [head, *shown]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of `convert --verify`. `narrowed` says which layers and experts it is about, if not about all."""

    subject: str
    levels: tuple[Level, ...]
    narrowed: str = ""
    counts: str = ""
    """How much was compared, against what config.json says there is (`convert.verifier.bits.counts`)."""
    allow_not_run: bool = False

    @property
    def equal(self) -> bool:
        """Whether levels compared something, none met a difference, and each that was asked for ran.

        With `allow_not_run` those that could not run are no obstacle. A narrowed verdict is about what `narrowed` names.
        """
        return self.outcome == "EQUAL"

    @property
    def missing(self) -> tuple[str, ...]:
        """The levels that were asked for and did not run."""
        return tuple(level.name for level in self.levels if level.state == NOT_RUN and level.asked)

    @property
    def outcome(self) -> str:
        """`EQUAL`, `DIFFERENT`, or `INCOMPLETE` where no level differs and one that was asked for did not run."""
        states = {level.state for level in self.levels}
        if DIFFERENT in states:
            return "DIFFERENT"
        return "INCOMPLETE" if EQUAL not in states or (self.missing and not self.allow_not_run) else "EQUAL"

    @property
    def summary(self) -> str:
        """The outcome, what it is about, and the levels that are missing from it."""
        missing = f"not run: {', '.join(self.missing)}" if self.missing else ""
        beside = "; ".join(filter(None, (self.narrowed, missing)))
        return f"{self.outcome} ({beside})" if beside else self.outcome

    def __str__(self) -> str:
        counts = [f"covered   {self.counts}"] if self.counts else []
        return "\n".join([one_line(f"verify   {self.subject}"), *map(str, self.levels), *counts, self.summary])

    def json(self) -> str:
        """For programs: every level with all its differences, and the errors of each expert where rounding is allowed."""
        levels = [
            {
                "name": level.name,
                "state": level.state,
                "equal": level.state == EQUAL,
                "why": level.why,
                "covered": level.covered,
                "differences": list(level.differences),
                "errors": {layer: list(worst) for layer, worst in level.errors.items()},
            }
            for level in self.levels
        ]
        head = {"subject": self.subject, "equal": self.equal, "verdict": self.summary, "counts": self.counts}
        return json.dumps({**head, "levels": levels}, indent=1)
