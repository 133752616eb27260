"""What `--json` prints: one envelope of one version around the result of every action.

In: what `to_dict()` of plans, reports, inspections, verdicts and digests gives. Out: JSON text. `output.schema.json` beside
this file describes it, and `verdict.schema.json` the verdicts in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

SCHEMA, VERSION = "output.schema.json", 1
"""The version grows when a field goes or changes its meaning; fields may be added."""


def envelope(action: str, exit_code: int, result: Mapping[str, Any] | None, error: str | None = None) -> str:
    """The one line of an answer; of an error, `result` is None."""
    found = {"schema": SCHEMA, "version": VERSION, "action": action, "exit_code": exit_code, "result": result, "error": error}
    return json.dumps(found, allow_nan=False)


def ahead_json(ahead: Any) -> dict[str, int | None]:
    """What a conversion will take; see `convert.engine.outlook`."""
    found = {"read_bytes": ahead.read, "write_bytes": ahead.write, "padding_bytes": ahead.padding}
    return {**found, "free_bytes": ahead.free, "seconds": round(ahead.seconds)}
