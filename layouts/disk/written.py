"""JSON as `json.dumps` writes it, where there is much of it.

In: texts, numbers, lists and objects. Out: their JSON. It never writes a file.

The encoder of CPython that is written in C does not indent, and the one in Python takes 8 us for the entry of a tensor, of
which there may be 100,000. `indented` gives the same text in about half the time.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

__all__ = ["indented", "quoted"]


def indented(found: Any, step: int) -> str:
    """The text of `json.dumps(found, indent=step)`; the keys of objects have to be texts."""
    return _text(found, "\n", " " * step)


def _text(found: Any, line: str, step: str) -> str:
    """The text of a value that begins in a line so far from the left; `line` is a line's end and this space."""
    if type(found) is int:
        return str(found)
    if not found or not isinstance(found, dict | list | tuple):
        return json.dumps(found)
    inner = line + step
    if isinstance(found, dict):  # texts are most of what there is, and in lists numbers: no call for them
        entries = [
            f"{quoted(key)}: {quoted(value) if type(value) is str else _text(value, inner, step)}"
            for key, value in found.items()
        ]
        return f"{{{inner}{f',{inner}'.join(entries)}{line}}}"
    values = [str(value) if type(value) is int else _text(value, inner, step) for value in found]
    return f"[{inner}{f',{inner}'.join(values)}{line}]"
