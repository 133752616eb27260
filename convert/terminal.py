"""Text as wide as the terminal that shows it, and streams that are closed, full or whose terminal has gone.

In: text, and where it is printed. Out: text in which no word and no pattern of axes is cut; files, pipes and programs have
every line as it is. What cannot be printed changes no exit code but that of the answer itself.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from contextlib import suppress
from typing import TextIO

_GAP = re.compile(r"(?<=\S) {2,}(?=\S)|^ +|^(?:verify|wrote|load|split|merge|note:) +")
"""What stands before a column of text."""
_DEEPEST, _LEAST = 24, 4
"""Columns: the deepest that further lines of a text begin, and the least."""
_WHOLE = re.compile(r"(?<!\w)'[^']{1,40}'(?!\w)|\d [kMGT]?i?B\b|convert --help")
"""Axes, sizes with their unit, and the short command."""
_PASTED = re.compile(r"convert --(?!help)|hf download |pip ")
"""How commands begin; a line with one stays whole, so that it can be copied."""
_TIED = "\u00a0"


def open_streams() -> None:
    """Have all three streams, also where a process is started without one (`2>&-`).

    Else a file of a checkpoint would get the number of stderr, and what a library in C has to say would be written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def say(text: str, stream: TextIO) -> None:
    """Print it now: what is left over would be tried again at the end of Python, which then gives an exit code of its own.

    Raises:
        OSError: the stream is full, or nobody reads it; from now on it leads nowhere.
    """
    try:
        print(text, file=stream, end="\n" if text else "", flush=True)
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def mention(text: str, stream: TextIO) -> None:
    """Print what is no answer, if that is possible."""
    with suppress(OSError):
        say(text, stream)


def columns(stream: TextIO) -> int | None:
    """How many columns the terminal has that this stream is; None if it is none."""
    with suppress(OSError, ValueError):
        if stream.isatty():
            return os.get_terminal_size(stream.fileno()).columns or None
    return None


def at_most(most: int, stream: TextIO) -> int:
    """The same, where so many columns are enough, also for what is no terminal."""
    return min(most, columns(stream) or most)


def fitted(text: str, width: int | None) -> str:
    """Lines that are wider go on in the next one, below the column where their text began."""
    if not width or width < 2 * _DEEPEST:
        return text
    return "\n".join(line for long in text.split("\n") for line in _lines(long, width))


def _lines(line: str, width: int) -> list[str]:
    if len(line) <= width or " " not in line.strip() or _PASTED.search(line):
        return [line]
    gaps = [gap.end() for gap in _GAP.finditer(line) if gap.end() <= _DEEPEST]
    indent = " " * max([_LEAST, *gaps])
    tied = _WHOLE.sub(lambda found: found[0].replace(" ", _TIED), line)
    parts = textwrap.wrap(tied, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
    return [part.replace(_TIED, " ") for part in parts]
