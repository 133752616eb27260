"""The actions of the command: each is one call of the library, and its answer for people and for programs.

In: parsed arguments. Out: an `Answer`. Nothing here prints or exits, and nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from convert.actions.answer import Answer
from convert.actions.asking import families, inspect, layouts, version
from convert.actions.converting import convert_with
from convert.actions.proving import digest, verify
from convert.answers.words import IMAGES, OTHER_PROGRAM, SAME
from convert.arguments import ACTIONS
from convert.errors import UsageError

__all__ = ["Answer", "act", "action_of"]


def act(arguments: argparse.Namespace) -> Answer:
    """Do what the arguments say.

    Raises:
        ConvertError: see `convert.errors`.
    """
    if "" in arguments.paths:
        raise UsageError("a path is empty; if it is a variable of your shell, it is not set")
    action = action_of(arguments)
    if action == "none":
        raise _nothing_to_do(arguments.paths)
    with nullcontext() if action == "verify" else _no_products():
        return _DOING[action](arguments) if action in _DOING else convert_with(arguments, action)


@contextmanager
def _no_products() -> Iterator[None]:
    """What multiplies no matrices: OpenBLAS starts a thread on each core when NumPy is imported, and each spins for a while."""
    word = "OPENBLAS_NUM_THREADS"
    said = os.environ.get(word)
    os.environ.setdefault(word, "1")
    try:
        yield
    finally:
        if said is None:
            del os.environ[word]


def action_of(arguments: argparse.Namespace) -> str:
    """The name of the action that is asked for; `none` if none is."""
    names = (*_DOING, "prefuse", "split", "merge", "to")
    return next((name for name in names if getattr(arguments, name, None)), "none")


def _nothing_to_do(paths: Sequence[str]) -> UsageError:
    """What to say to a command without an action."""
    if any(Path(path).suffix.lower() in IMAGES for path in paths):
        return UsageError(OTHER_PROGRAM)
    words = paths[0].split() if len(paths) == 1 else list(paths)
    words = words[1:] if words[0] == "convert" and words[1:] else words
    flags = [f"--{word.lstrip(_BEFORE).lower()}" for word in words]
    flags[0] = SAME.get(flags[0], flags[0])
    if (at := next((at for at, flag in enumerate(flags) if flag in _EVERY), None)) is not None:
        return UsageError(f"did you mean: {shlex.join(['convert', flags[at], *words[:at], *words[at + 1 :]])}")
    return UsageError(
        "say what to do: --prefuse, --split, --merge, --verify, --digest, --inspect, --families, or --to the other format"
    )


_EVERY = frozenset((*ACTIONS, "--families", "--layouts", "--version", "--help"))
_BEFORE = "-/\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""What stands before the name of an action that was meant: dashes that a page has made of two, and what Windows has."""
_DOING: Mapping[str, Callable[[argparse.Namespace], Answer]] = {
    "inspect": inspect,
    "families": families,
    "layouts": layouts,
    "version": version,
    "digest": digest,
    "verify": verify,
}
