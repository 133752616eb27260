"""What a verification found, level by level."""

from __future__ import annotations

from dataclasses import dataclass

SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One kind of proof: what it covered, and every difference it met, in words."""

    name: str
    covered: str
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.differences:
            return f"{self.name:<8} equal      {self.covered}"
        shown = [f"  {line}" for line in self.differences[:SHOWN]]
        if len(self.differences) > SHOWN:
            shown.append(f"  and {len(self.differences) - SHOWN} more")
        return "\n".join([f"{self.name:<8} DIFFERENT  {self.covered}; {len(self.differences)} differences:", *shown])


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
