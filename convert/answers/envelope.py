"""What `--json` prints: one envelope of one version around the result of every action but `--verify` and `--digest`.

In: plans, reports, results. Out: JSON text. `output.schema.json` beside this file describes it; a verdict has its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SCHEMA, VERSION = "output.schema.json", 1
"""The version grows when a field goes or changes its meaning; fields may be added."""
_PLAN = ("action", "source", "out", "format", "family", "layout", "computed", "left_out", "never_copied", "remarks")


def envelope(action: str, exit_code: int, result: Mapping[str, Any] | None, error: str | None = None) -> str:
    """The one line of an answer; of an error, `result` is None."""
    found = {"schema": SCHEMA, "version": VERSION, "action": action, "exit_code": exit_code, "result": result, "error": error}
    return json.dumps(found)


def plan_json(plan: Any) -> dict[str, Any]:
    """A plan, or that of an adapter, which has no layout but a form."""
    found: dict[str, Any] = {name: _plain(getattr(plan, name, None)) for name in _PLAN}
    names = plan.targets if hasattr(plan, "targets") else plan.specs
    return found | {
        "tensors": len(names),
        "nbytes": plan.nbytes,
        "side_files": list(plan.side_files),
        "left_out_files": list(plan.left_out_files),
    }


def report_json(report: Any) -> dict[str, Any]:
    """What a conversion did; `written` is False where the output was there already, and `proof` says what was looked at."""
    content = getattr(report.plan, "content", None)
    return {
        "plan": plan_json(report.plan),
        "written": report.written,
        "proof": report.proof or None,
        "seconds": round(report.seconds, 3),
        "resumed": report.resumed,
        "notes": list(getattr(report, "notes", ())),
        "content": content["model"]["sha256"] if content else None,
    }


def _plain(value: Any) -> Any:
    return (
        value
        if value is None or isinstance(value, str | bool | int)
        else list(value)
        if isinstance(value, tuple)
        else str(value)
    )
