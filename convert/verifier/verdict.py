"""What a verification found, level by level.

In: levels, sides, a self-test. Out: text and JSON. It never compares, and calls nothing equal that was not looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from convert.errors import one_line
from convert.verifier.environment import Run
from convert.verifier.questions import question_of

SHOWN = 20
WIDTH = 9
"""Of a level's name, where it has no backend's behind it."""
VERSION = 1
"""Of the JSON, which `convert/answers/verdict.schema.json` describes; another form has another one."""
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
    worst: float | None = None
    """The largest difference that was measured, and `bound` what is allowed, relative to the norm of a row of outputs."""
    bound: float | None = None

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

    def to_dict(self) -> dict[str, Any]:
        """With what it asks and allows, all its differences, and the errors of each expert where rounding is allowed."""
        question = question_of(self.name)
        return {
            "name": self.name,
            "state": self.state,
            "equal": self.state == EQUAL,
            "why": self.why,
            "asked": self.asked,
            "question": question.asks,
            "method": question.method,
            "bound": question.bound,
            "allowed": self.bound,
            "worst": self.worst,
            "covered": self.covered,
            "compared": self.compared,
            "differences": self.differences,
            "errors": self.errors,
        }

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
class Side:
    """One of the checkpoints: where it is, the bytes of all its files (unknown in a store), what it is, in words.

    `content` is the digest of what it holds (`convert.verifier.content`) as JSON has it; empty where there is none.
    """

    path: str
    nbytes: int | None
    format: str
    family: str
    layout: tuple[str, ...]
    tensors: int
    content: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    """Why a tree's digest does not go by the names of Hugging Face."""

    @property
    def digest(self) -> str:
        """The content digest, `sha256:...`; empty where there is none."""
        return f"sha256:{self.content['model']['sha256']}" if self.content else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A negative control: one bit was flipped in memory, and the levels that had to see it did or did not.

    `untried` are levels for which it could not be told, each with the reason.
    """

    flipped: str
    seen: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    untried: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        seen = f"seen by {', '.join(self.seen) or 'no level'}"
        unseen = f"; NOT SEEN by {', '.join(self.unseen)}" if self.unseen else ""
        untried = "".join(f"; {level} not tried ({why})" for level, why in self.untried.items())
        return f"{self.flipped}: {seen}{unseen}{untried}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The outcome of `convert --verify`. `narrowed` says which layers and experts it is about, if not about all."""

    subject: str
    levels: tuple[Level, ...]
    narrowed: str = ""
    counts: str = ""
    """How much was compared, against what config.json says there is (`convert.verifier.bits.counts`)."""
    allow_not_run: bool = False
    sides: tuple[Side, ...] = ()
    """Both checkpoints, or the one, where a report was asked for."""
    self_test: tuple[Trial, ...] = ()

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
    def blind(self) -> tuple[str, ...]:
        """The levels that did not see a flipped bit: what they say proves nothing."""
        return tuple(level for trial in self.self_test for level in trial.unseen)

    @property
    def outcome(self) -> str:
        """`EQUAL`, `DIFFERENT`, or `INCOMPLETE` where no level differs and one that was asked for did not run, or is blind."""
        states = {level.state for level in self.levels}
        if DIFFERENT in states:
            return "DIFFERENT"
        lacking = EQUAL not in states or self.blind or (self.missing and not self.allow_not_run)
        return "INCOMPLETE" if lacking else "EQUAL"

    @property
    def summary(self) -> str:
        """The outcome, what it is about, and the levels that are missing from it."""
        missing = f"not run: {', '.join(self.missing)}" if self.missing else ""
        blind = f"the self-test was not seen by: {', '.join(self.blind)}" if self.blind else ""
        beside = "; ".join(filter(None, (self.narrowed, missing, blind)))
        return f"{self.outcome} ({beside})" if beside else self.outcome

    def __str__(self) -> str:
        counts = [f"covered   {self.counts}"] if self.counts else []
        digests = [one_line(f"digest    {side.digest}  {side.path}") for side in self.sides if side.content]
        trials = [one_line(f"self-test {trial}") for trial in self.self_test]
        return "\n".join(
            [one_line(f"verify   {self.subject}"), *map(str, self.levels), *counts, *digests, *trials, self.summary]
        )

    def to_dict(self, run: Run | None = None) -> dict[str, Any]:
        """For programs, as `--json` has it; `run` says where and how, if the caller knows. No number is NaN or infinite."""
        found = {
            "schema": "verdict.schema.json",
            "version": VERSION,
            "subject": self.subject,
            "equal": self.equal,
            "outcome": self.outcome,
            "verdict": self.summary,
            "narrowed": self.narrowed,
            "counts": self.counts,
            "sides": [asdict(side) | {"digest": side.digest} for side in self.sides],
            "levels": [level.to_dict() for level in self.levels],
            "not_run": {level.name: level.why for level in self.levels if level.why},
            "self_test": [asdict(trial) for trial in self.self_test],
            "run": asdict(run) if run else None,
        }
        return {key: _finite(value) for key, value in found.items()}

    def json(self, run: Run | None = None) -> str:
        """The same as text, for who signs it."""
        return json.dumps(self.to_dict(run), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """A document without NaN and infinities, which JSON lacks: what is no number is worse than the largest one."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else sys.float_info.max
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
