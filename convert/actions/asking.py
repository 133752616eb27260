"""`--inspect`, `--families`, `--layouts` and `--version`: what is answered without reading data.

In: parsed arguments. Out: an `Answer`. Nothing here prints or exits.
"""

from __future__ import annotations

import argparse
import shlex
import sys

import convert
from convert.actions.answer import Answer, counted, no_paths
from convert.answers.envelope import envelope
from convert.arguments import options
from convert.errors import UsageError
from convert.terminal import at_most
from convert.version import TOOL


def inspect(arguments: argparse.Namespace) -> Answer:
    """What a checkpoint is; see `convert.inspect`."""
    from convert.answers.inspection import WIDTH

    given = options(arguments, "--inspect")
    if len(arguments.paths) != 1:
        raise UsageError(f"--inspect takes one checkpoint; found {counted(arguments.paths)}")
    found = convert.inspect(arguments.paths[0], **given)
    code = found.problem.exit_code if found.problem else 0
    text = found.told(at_most(WIDTH, sys.stdout))
    return Answer(text=text, document=envelope("inspect", code, found.to_dict()), exit_code=code, problem=found.problem)


def families(arguments: argparse.Namespace) -> Answer:
    """All families, or one."""
    from convert.answers import tables

    options(arguments, "--families")
    if len(arguments.paths) > 1:
        raise UsageError(f"--families takes the name of one family, or none; found {shlex.join(arguments.paths)}")
    name = next(iter(arguments.paths), None)
    text = tables.families_text(name, at_most(tables.WIDTH, sys.stdout))
    return Answer(text=text, document=envelope("families", 0, tables.families(name)))


def layouts(arguments: argparse.Namespace) -> Answer:
    """All layouts."""
    from convert.answers import tables

    options(arguments, "--layouts")
    no_paths(arguments, "--layouts")
    text = tables.layouts_text(at_most(tables.WIDTH, sys.stdout))
    return Answer(text=text, document=envelope("layouts", 0, tables.layouts()))


def version(arguments: argparse.Namespace) -> Answer:
    """The version of this tool."""
    options(arguments, "--version")
    no_paths(arguments, "--version")
    found = {"tool": TOOL, "python": sys.version.split()[0]}
    return Answer(text=f"moe-convert {TOOL} (Python {found['python']})", document=envelope("version", 0, found))
