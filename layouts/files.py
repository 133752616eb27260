"""Small files of a checkpoint: JSON that is read with care.

In: a path. Out: what the file says. It never writes.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from layouts.errors import InputError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
RECORD = "moe_layout"
"""The key under which our record stands in `config.json`."""


def read_json(path: Path) -> Any:
    """Parse a JSON file of the checkpoint.

    Raises:
        InputError: unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        InputError: unreadable, not JSON, or no object.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose keys stands twice.

    Raises:
        ValueError: one does.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found
