"""JSON as `json.dumps` writes it, where there is much of it.

In: texts, numbers, lists and objects. Out: their JSON. It never writes a file.

The encoder of CPython that is written in C does not indent, and the one in Python takes 8 us for the entry of a tensor, of
which there may be 100,000. `indented` gives the same text in about half the time, and in a sixth where they are `Entries`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

__all__ = ["Entries", "compact", "indented", "quoted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The object `{name: {**kind, last: value}}` of (T,) names, without an object for each: they are of few `kinds`.

    `kind` (T,) is the number of each one's kind, whose texts are made once; `values` (T,) are most often texts.
    """

    names: Sequence[str]
    kind: Sequence[int]
    kinds: Sequence[Mapping[str, Any]]
    last: str
    values: Sequence[Any]

    def compact(self) -> str:
        """The text of `json.dumps`."""
        heads = [json.dumps({**kind, self.last: None}).removesuffix("null}") for kind in self.kinds]
        return f"{{{', '.join(self._entries(heads, '}', json.dumps))}}}"

    def indented(self, line: str, step: str) -> str:
        """The text of a value that begins in a line so far from the left, as `_text` has it."""
        if not self.names:
            return "{}"
        inner = line + step
        heads = [_text({**kind, self.last: None}, inner, step).removesuffix(f"null{inner}}}") for kind in self.kinds]
        entries = self._entries(heads, f"{inner}}}", lambda value: _text(value, inner + step, step))
        return f"{{{inner}{f',{inner}'.join(entries)}{line}}}"

    def _entries(self, heads: Sequence[str], end: str, text: Callable[[Any], str]) -> list[str]:
        return [
            f"{quoted(name)}: {heads[kind]}{quoted(value) if type(value) is str else text(value)}{end}"
            for name, kind, value in zip(self.names, self.kind, self.values, strict=True)
        ]


def compact(found: Mapping[str, Any]) -> str:
    """The text of `json.dumps(found)`; its values may be `Entries`."""
    values = (value.compact() if isinstance(value, Entries) else json.dumps(value) for value in found.values())
    return f"{{{', '.join(f'{quoted(key)}: {value}' for key, value in zip(found, values, strict=True))}}}"


def config_text(config: Mapping[str, Any]) -> str:
    """`config.json` as transformers writes it, but for the order of its keys, which stays."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def indented(found: Any, step: int) -> str:
    """The text of `json.dumps(found, indent=step)`; the keys of objects have to be texts, and values may be `Entries`."""
    return _text(found, "\n", " " * step)


def _text(found: Any, line: str, step: str) -> str:
    """The text of a value that begins in a line so far from the left; `line` is a line's end and this space."""
    if type(found) is int:
        return str(found)
    if isinstance(found, Entries):
        return found.indented(line, step)
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
