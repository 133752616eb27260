"""The actions of the command: each is one call of the library, and its answer for people and for programs.

In: parsed arguments. Out: an `Answer`. Nothing here prints or exits, and nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from convert.actions.answer import Answer
from convert.actions.asking import families, inspect, layouts, version
from convert.actions.converting import convert_with
from convert.actions.proving import digest, verify
from convert.answers.words import IMAGES, OTHER_PROGRAM
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
    if action in _DOING:
        return _DOING[action](arguments)
    if action == "none":
        raise _nothing_to_do(arguments.paths)
    return convert_with(arguments, action)


def action_of(arguments: argparse.Namespace) -> str:
    """The name of the action that is asked for; `none` if none is."""
    names = (*_DOING, "prefuse", "split", "merge", "to")
    return next((name for name in names if getattr(arguments, name, None)), "none")


def _nothing_to_do(paths: Sequence[str]) -> UsageError:
    """What to say to a command without an action."""
    if any(Path(path).suffix.lower() in IMAGES for path in paths):
        return UsageError(OTHER_PROGRAM)
    paths = paths[1:] if paths[0] == "convert" and paths[1:] else paths
    if f"--{paths[0]}" in (*ACTIONS, "--families", "--layouts", "--version", "--help"):
        return UsageError(f"did you mean: {shlex.join(['convert', f'--{paths[0]}', *paths[1:]])}")
    return UsageError(
        "say what to do: --prefuse, --split, --merge, --verify, --digest, --inspect, --families, or --to the other format"
    )


_DOING: Mapping[str, Callable[[argparse.Namespace], Answer]] = {
    "inspect": inspect,
    "families": families,
    "layouts": layouts,
    "version": version,
    "digest": digest,
    "verify": verify,
}
