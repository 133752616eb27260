"""The one gate for names that become paths, or keys of a store.

In: a name, and where it stands. Out: the same name, or its parts. It never looks at a disk.
Shards of an index, headers that a manifest remembers, leaves of a tree, what is rendered from a record: all are input, and a
name such as `/home` or `../../x` would lead out of the directory that it is joined to.
"""

from __future__ import annotations

from layouts.errors import InputError

LONGEST = 255
"""Bytes that Linux allows in a part of a path."""
_SHOWN = 80


def part(text: str, where: object) -> str:
    """A name that is one part of a path: a file's or a directory's own.

    Raises:
        InputError: it would be something else, or nothing that every system can store.
    """
    if "/" in text:
        raise _refused(text, where, "holds '/'")
    _check(text, text, where)
    if len(text.encode()) > LONGEST:
        raise _refused(text, where, f"is longer than {LONGEST} bytes")
    return text


def parts(text: str, where: object) -> tuple[str, ...]:
    """The parts of a relative path that leads down, and nowhere else.

    Raises:
        InputError: it leads elsewhere, or one of its parts is no name.
    """
    found = key(text, where).split("/")
    for one in found:
        if len(one.encode()) > LONGEST:
            raise _refused(text, where, f"has a part that is longer than {LONGEST} bytes")
    return tuple(found)


def key(text: str, where: object) -> str:
    """A key of a store, under the same rule as a path, but of any length.

    Raises:
        InputError: as a path it would lead elsewhere.
    """
    for one in text.split("/"):
        _check(one, text, where)
    return text


def _check(one: str, text: str, where: object) -> None:
    if text.startswith("/"):
        raise _refused(text, where, "is an absolute path")
    if one in ("", ".", ".."):
        raise _refused(text, where, f"has the part {one!r}" if one else "has an empty part")
    for letter in one:
        if letter < " " or "\x7f" <= letter < "\xa0":
            raise _refused(text, where, f"holds the control character {letter!r}")
        if "\ud800" <= letter <= "\udfff":
            raise _refused(text, where, f"holds {letter!r}, which is no character")


def _refused(text: str, where: object, why: str) -> InputError:
    shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
    return InputError(
        f"{where}: the name {shown} {why}, so that it is not safe as the name of a file; nothing is read or written there. "
        "Get the checkpoint from where you trust it, or correct the name"
    )
