"""How the value of an option is read: a word of the command line, or what a caller gives in Python.

In: a value. Out: the value as the tool takes it, or a `ValueError` that says what it should be. It knows no option.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Integral

UNITS = {"": 1} | {f"{each}{i}": base**n for n, each in enumerate("kmgtp", 1) for i, base in (("", 1000), ("i", 1024))}
_SHOWN = 60
"""Letters of a wrong value that are shown: a slip of the hand may paste a page."""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def size(value: object) -> int:
    """Bytes: `512MiB`, `5GB`, `1.5g`, or a number.

    Raises:
        ValueError: it is no size above zero.
    """
    if (number := _integer(value)) is None:
        text = value.strip().lower().removesuffix("b") if isinstance(value, str) else "?"
        digits = text.rstrip("kmgtpi")
        try:
            number = int(float(digits) * UNITS[text[len(digits) :]])
        except (ValueError, KeyError, OverflowError):
            raise ValueError(f"{_shown(value)} is not a size such as 512MiB or 5GB") from None
    if number <= 0:
        raise ValueError(f"{_shown(value)} is no size above zero")
    return number


def positive(value: object) -> int:
    """A number from 1.

    Raises:
        ValueError: it is none.
    """
    return _from(1, value, "a positive whole number")


def natural(value: object) -> int:
    """A number from 0.

    Raises:
        ValueError: it is none.
    """
    return _from(0, value, "a whole number from 0")


def _from(least: int, value: object, what: str) -> int:
    number = _number(value)
    if number is None or number < least:
        raise ValueError(f"{_shown(value)} is not {what}")
    return number


def _number(value: object) -> int | None:
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < 20 else None
    return _integer(value)


def _integer(value: object) -> int | None:
    """A whole number of any type, NumPy's too; True and False are none."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def axis(value: object) -> int:
    """0 or 1.

    Raises:
        ValueError: it is neither.
    """
    number = _number(value)
    if number not in (0, 1):
        raise ValueError(f"{_shown(value)} is neither 0 nor 1")
    return number


def align(value: object) -> int | str:
    """Columns, or a word for them: `maxtext`, `maxtext-pow2`.

    Raises:
        ValueError: it is neither.
    """
    from layouts.tables.targets import ALIGNMENTS  # all tables, which a look at the options needs not

    return value if isinstance(value, str) and value in ALIGNMENTS else positive(value)


def numbers(value: object) -> frozenset[int]:
    """`0,3-5` is 0, 3, 4 and 5; so is any collection of these.

    Raises:
        ValueError: it is no list of numbers.
    """
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        return frozenset(natural(each) for each in value)
    found: set[int] = set()
    for part in value.split(",") if isinstance(value, str) else [""]:
        first, dash, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or (dash and not last) or len(part) > 20:
            raise ValueError(f"{_shown(value)} is not a list of numbers such as 0,3-5")
        if int(last or first) < int(first):
            raise ValueError(f"{part!r} ends before it begins; did you mean {last}-{first}?")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def mesh(value: object) -> dict[str, int]:
    """`expert=4,model=2`, or the same as a mapping.

    Raises:
        ValueError: it is no mesh.
    """
    if isinstance(value, Mapping):
        return {str(name): positive(count) for name, count in value.items()}
    pairs = [part.partition("=") for part in value.split(",")] if isinstance(value, str) else [("", "", "")]
    if not all(equals for _, equals, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ValueError(f"{_shown(value)} is not a mesh such as expert=4,model=2")
    return {name: positive(count) for name, _, count in pairs}


def word(value: object) -> str:
    """A word.

    Raises:
        ValueError: it is no text.
    """
    if not isinstance(value, str):
        raise ValueError(f"{_shown(value)} is not a word")
    return value


def switch(value: object) -> bool:
    """On or off.

    Raises:
        ValueError: it is neither `True` nor `False`.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{_shown(value)} is neither True nor False")
    return value


def location(value: object) -> str:
    """A path, or the address of a place in a store, as text.

    Raises:
        ValueError: it is neither.
    """
    from layouts.disk.places import RemotePath  # not for `convert --help`

    found = os.fspath(value) if isinstance(value, str | os.PathLike) else str(value) if isinstance(value, RemotePath) else None
    if not isinstance(found, str):
        raise ValueError(f"{_shown(value)} is not a path")
    return found


def function(value: object) -> object:
    """What can be called.

    Raises:
        ValueError: it cannot.
    """
    if not callable(value):
        raise ValueError(f"{_shown(value)} is not a function")
    return value


def mapping(value: object) -> object:
    """Names, or sizes, by words.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{_shown(value)} is not a mapping")
    return value


def processes(value: object) -> object:
    """What `convert.connect` gives.

    Raises:
        ValueError: it is something else.
    """
    if not hasattr(value, "together"):
        raise ValueError(f"{_shown(value)} is not what convert.connect gives")
    return value


def counted(number: int, word: str) -> str:
    """`1 file`, `12,000 files`."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def in_units(nbytes: float) -> str:
    """Bytes for people: decimal units, as disks and `ls --si` use them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def in_time(seconds: float) -> str:
    """Seconds for people, in the unit of which there are some."""
    for unit, least in (("h", 3600), ("min", 60)):
        if seconds >= 2 * least:
            return f"{seconds / least:.0f} {unit}"
    return f"{seconds:.0f} s"
