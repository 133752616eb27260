"""Plans and reports as documents: what `to_dict()` of them gives to programs, and so `--json`.

In: plans and reports, of checkpoints and of adapters. Out: dictionaries of what JSON has: words, numbers, lists, dictionaries.
`convert/answers/output.schema.json` describes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_WORDS = ("action", "source", "out", "format", "family", "layout", "computed", "left_out", "never_copied", "remarks")
"""Fields as they are. The plan of an adapter has not all of them; its layout is a form."""


def plan_document(plan: Any, tensors: Collection[object]) -> dict[str, Any]:
    """A plan, and how many tensors the output has; not which."""
    return {name: _plain(getattr(plan, name, None)) for name in _WORDS} | {
        "tensors": len(tensors),
        "nbytes": plan.nbytes,
        "side_files": list(plan.side_files),
        "left_out_files": list(plan.left_out_files),
    }


def report_document(report: Any) -> dict[str, Any]:
    """What a conversion did; `written` is False where the output was there already, and `proof` says what was looked at."""
    content = getattr(report.plan, "content", None)
    return {
        "plan": report.plan.to_dict(),
        "written": report.written,
        "proof": report.proof or None,
        "seconds": round(report.seconds, 3),
        "resumed": report.resumed,
        "notes": list(getattr(report, "notes", ())),
        "content": content["model"].get("sha256") if content else None,
        "content_xxh3": content["model"].get("xxh3") if content else None,
    }


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return list(value)
    return value if value is None or isinstance(value, str | bool | int) else str(value)
