"""What the actions of the command share: an answer, paths, how progress is shown, other processes.

In: parsed arguments. Out: values. Nothing here prints or exits.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import convert
from convert.answers.words import STRAY
from convert.errors import ConvertError, UsageError, printable

if TYPE_CHECKING:
    from convert.commit.processes import Processes


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an action has to say: `text` for people, `document` for programs, and the command's exit code."""

    text: str
    document: str
    exit_code: int = 0
    problem: ConvertError | None = None
    """What could not be told, though there is an answer to the rest."""


def shown(arguments: argparse.Namespace, processes: Processes | None) -> str:
    """How progress is shown; one of several processes shows it."""
    return "none" if arguments.quiet or (processes and not processes.first) else arguments.progress or "auto"


def processes_of(arguments: argparse.Namespace) -> Processes | None:
    """This process among those that share the work, if there are several.

    Raises:
        UsageError: what is said of them does not go together.
    """
    if arguments.distributed or arguments.coordinator:
        import jax

        # Nothing is computed together, and Gloo would print to stdout.
        jax.config.update("jax_cpu_collectives_implementation", None)  # type: ignore[no-untyped-call]
        return convert.connect(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.num_processes or arguments.process_id is not None:
        raise UsageError("--num-processes and --process-id go with --coordinator HOST:PORT, or with --dry-run")
    return None


def two_paths(paths: Sequence[str]) -> tuple[str, str]:
    """The input and the output, or the two to compare.

    Raises:
        UsageError: there are not two.
    """
    if len(paths) != 2:
        raise UsageError(f"give an input and an output checkpoint; found {counted(paths)}")
    return paths[0], paths[1]


def counted(paths: Sequence[str]) -> str:
    """How many paths these are, and which; and what to do, where one of them is none."""
    stray = (words.format(repr(path)) for path in paths for begin, words in STRAY if re.match(begin, path))
    why = next((f"; {words}" for words in stray), "") if len(paths) > 1 else ""
    return f"{len(paths)} path{'s' * (len(paths) != 1)}{f': {printable(shlex.join(paths))}' if paths else ''}{why}"


def no_paths(arguments: argparse.Namespace, action: str) -> None:
    """See that nobody gives a path to what takes none.

    Raises:
        UsageError: somebody does.
    """
    if arguments.paths:
        raise UsageError(f"{action} takes no path; found {counted(arguments.paths)}")
