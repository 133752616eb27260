"""What an error says of options to who calls the library: arguments, where the command has flags.

In: a message with flags, as all of them are written. Out: the same with arguments. A value stands in it behind `=`, as in
`--layout=per-shard`, which both can copy. A flag behind the word `convert` belongs to a command that is quoted, and stays.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from convert.options import Choices, Running, Verification
from convert.options.option import named
from layouts.errors import ConvertError

_FLAG = re.compile(r"(?<![\w/.-])(?<!convert )--([a-z][a-z-]*[a-z])(?:=(\w(?:[\w.:-]*\w)?))?(?![\w/])")
_CALLS = ("prefuse", "split", "merge", "verify", "digest", "inspect")
_OTHERS: Mapping[str, str] = {
    **{call: f"convert.{call}" for call in _CALLS},
    **{name: f"{name}=" for name in ("coordinator", "num_processes", "process_id")},
    "debug": "__cause__",
}
"""What else the command has a flag for."""


@contextmanager
def in_python() -> Iterator[None]:
    """Let errors speak of arguments; `ConvertError.command` keeps what the command prints."""
    try:
        yield
    except ConvertError as error:
        if error.command is None:
            error.command = str(error)
            error.args = (as_arguments(error.command),)
        raise


def as_arguments(text: str) -> str:
    """A message with arguments in the place of flags: `overwrite=True`, `gemm=False`, `layout='per-shard'`, `memory=`."""
    return _FLAG.sub(_argument, text)


def _argument(found: re.Match[str]) -> str:
    name, value = found[1].replace("-", "_"), found[2]
    word = _options().get(name) or _OTHERS.get(name)
    if word is None:
        return found[0]
    return word if value is None else f"{word}{value if value.isdecimal() else repr(value)}"


@functools.cache
def _options() -> dict[str, str]:
    """Every flag, without its dashes, and its argument; a switch with what the flag sets it to, another one without a value."""
    found: dict[str, str] = {}
    for each in (option for kind in (Choices, Running, Verification) for option in named(kind)):
        found[each.name] = f"{each.name}={'True' if each.is_switch else ''}"
        if each.is_switch:
            found[f"no_{each.name}"] = f"{each.name}=False"
    return found
