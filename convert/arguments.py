"""The arguments of the `convert` command, made from the definitions of options.

In: `convert.options`. Out: a parser whose namespace holds only what the user gave, and `options`, which checks that it fits.
It defines no option of the library; those of the command alone stand in `_COMMAND`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from convert.answers.completion import COMPLETERS, paths_or_families
from convert.answers.words import ABOUT, EPILOG, EXAMPLES
from convert.errors import UsageError, did_you_mean
from convert.options import values
from convert.options.keywords import (
    Digesting,
    Inspecting,
    MergingInto,
    Prefusing,
    Reformatting,
    Splitting,
    Verifying,
    options_of,
)
from convert.options.option import Named
from convert.parsing import Format, Once, OnceSwitch, Parser
from convert.progress import KINDS

ACTIONS: Mapping[str, type] = {
    "--prefuse": Prefusing,
    "--split": Splitting,
    "--merge": MergingInto,
    "--to": Reformatting,
    "--verify": Verifying,
    "--digest": Digesting,
    "--inspect": Inspecting,
}
"""What each action takes; `--to` alone is the one that only changes the format."""
_NATURAL, _POSITIVE = values.natural, values.positive
_PLANNED = ("--prefuse", "--split", "--merge", "--to", "--verify")
_TABLES = ("--families", "--layouts", "--version")
_EVERY = (*_PLANNED, "--digest", "--inspect", *_TABLES)
_COMMAND: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    (
        "--dry-run",
        _PLANNED,
        {"action": "store_true", "help": "print the plan and touch nothing, and fail as the run would; --verify: the cost"},
    ),
    (
        "--distributed",
        _PLANNED,
        {"action": "store_true", "help": "one of several processes, found by JAX (SLURM, GKE, TPU)"},
    ),
    ("--coordinator", _PLANNED, {"metavar": "HOST:PORT", "help": "where process 0 of several is; implies --distributed"}),
    ("--num-processes", _PLANNED, {"type": _POSITIVE, "metavar": "P", "help": "how many; --dry-run: divide the work"}),
    ("--process-id", _PLANNED, {"type": _NATURAL, "metavar": "I", "help": "which of them this is, from 0"}),
    ("--json", _EVERY, {"action": "store_true", "help": "print the answer, or the error, as JSON"}),
    ("--report", ("--verify",), {"metavar": "FILE.html", "help": "--verify: write the verdict as one offline page, too"}),
    (
        "--progress",
        (*_PLANNED, "--digest"),
        {
            "choices": KINDS,
            "help": "on stderr; plain is a line every 30 s (default: a bar on a terminal, else plain)",
        },
    ),
    ("--quiet", _EVERY, {"action": "store_true", "help": "no progress, and no line before the work begins"}),
    ("--debug", _EVERY, {"action": "store_true", "help": "show tracebacks"}),
)
"""Arguments that the library has no option for, and the actions that take them."""
_DO: Mapping[str, str] = {
    "--prefuse": "write CKPT_IN to CKPT_OUT with one fused tensor wi",
    "--split": "write CKPT_IN to CKPT_OUT with separate gate and up",
    "--merge": "write --base CKPT with the adapter ADAPTER in it to CKPT_OUT",
    "--verify": "compare two checkpoints, or re-check one's digests",
    "--digest": "print two digests of what checkpoints hold (sha256, xxh3), the same in every layout",
    "--inspect": "say what a checkpoint is, from its headers, and what could be done with it",
    "--families": "print the model families in the table, or what is known of one: --families NAME",
    "--layouts": "print the layouts, with what they are for",
    "--version": "print the version of this tool",
}
"""The actions that exclude each other; `--to` goes with some of them."""
_GROUPS: Mapping[str, str] = {
    "layout": "layout shards align glu_block source_layout family",
    "formats": "to scan scan_axis params_only drop_optimizer drop_mtp keep_chunks mesh sharding copy_all dequantize compute",
    "adapters": "from_writer base",
    "resources": "jobs memory max_shard_size resume overwrite",
    "several processes": "distributed coordinator num_processes process_id",
    "output": "dry_run json report progress quiet debug content",
}
"""Under which heading the help has each option; the others are under `verify`."""
_VERIFY = "verify"


_PATHS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("--prefuse", "--split", "--to"), ("CKPT_IN CKPT_OUT", "input and output")),
    "--merge": ("ADAPTER CKPT_OUT", "the adapter, and the output"),
    "--verify": ("CKPT [CKPT]", "the two to compare, or the one to re-check"),
    "--digest": ("CKPT [CKPT ...]", "one or more"),
    "--inspect": ("CKPT", "the one to look at"),
    "--families": ("[NAME]", argparse.SUPPRESS),
    "--layouts": ("", argparse.SUPPRESS),
    "--version": ("", argparse.SUPPRESS),
}
"""What each action takes besides options, and what its help says of that."""
_ANY = ("[CKPT ...]", "input and output, or the two to compare")


class _Help(argparse.Action):
    """`--help`, and `--help verify` or `--verify --help`, which have the options of one action alone."""

    def __call__(self, parser: argparse.ArgumentParser, given: object, values: Any, option_string: str | None = None) -> None:
        """Print it and leave."""
        values = None if f"{option_string}{values}" == "-help" else values
        flag = f"--{values}".replace("----", "--") if values else None
        if flag and flag not in _EVERY:
            parser.error(f"argument {option_string}: no action is called {values!r}{did_you_mean(flag, _EVERY)}")
        _made(flag or next((each for each in _EVERY if getattr(given, each[2:], None)), None)).print_help()
        parser.exit()


def parser() -> Parser:
    """All options, with their help."""
    return _made(None)


def _made(only: str | None) -> Parser:
    """All options, or those of one action."""
    shown, paths = _PATHS[only] if only else _ANY
    found = Parser(
        prog="convert",
        usage=" ".join(filter(None, ("convert", only or "ACTION", shown, "[options]"))),
        allow_abbrev=False,
        add_help=False,
        description=f"{ABOUT}\n\n{_examples(only)}",
        epilog=EPILOG,
        formatter_class=Format,
    )
    do = found.add_argument_group("do")
    given = do.add_argument("paths", nargs="*", metavar="CKPT", help=paths)
    given.completer = paths_or_families  # type: ignore[attr-defined]
    asked = do.add_argument(
        "-h", "--help", nargs="?", metavar="ACTION", action=_Help, help="show this, or the options of one action"
    )
    asked.completer = lambda **_: [each[2:] for each in _EVERY]  # type: ignore[attr-defined]
    action = do.add_mutually_exclusive_group()
    for flag, text in _DO.items():
        action.add_argument(flag, action="store_true", help=text if only in (None, flag) else argparse.SUPPRESS)
    groups = {title: found.add_argument_group(title) for title in (*list(_GROUPS)[:2], _VERIFY, *list(_GROUPS)[2:])}
    home = {name: groups[title] for title, names in _GROUPS.items() for name in names.split()}
    for each, actions in _taken().values():
        if only is None or only in actions:
            _add(home.get(each.name, groups[_VERIFY]), each, actions == ["--verify"])
    for flag, takers, words in _COMMAND:
        if only is None or only in takers:
            home[flag[2:].replace("-", "_")].add_argument(flag, **{"action": Once, **_read(words)})
    return found


def _examples(only: str | None) -> str:
    lines = EXAMPLES.splitlines(keepends=True)
    return "".join(line for line in lines if only is None or only in line or line == lines[0])


def _taken() -> dict[str, tuple[Named, list[str]]]:
    """Every option once, with the actions that take it."""
    found: dict[str, tuple[Named, list[str]]] = {}
    for action, keywords in ACTIONS.items():
        for each in options_of(keywords):
            found.setdefault(each.name, (each, []))[1].append(action)
    return found


def _add(parser: argparse._ArgumentGroup, each: Named, of_verify: bool) -> None:
    option, text = each.option, each.sentence if of_verify else each.sentence.removeprefix("of two: ")
    if each.is_switch and (each.default or option.either):
        flag = f"--{each.name.replace('_', '-')}"
        parser.add_argument(flag, action=OnceSwitch, default=argparse.SUPPRESS, help=text)
    elif each.is_switch:
        parser.add_argument(each.flag, action="store_true", default=argparse.SUPPRESS, help=text)
    else:
        words = {"choices": option.choices} if option.choices else {"metavar": option.show, "type": option.read}
        added = parser.add_argument(each.flag, action=Once, default=argparse.SUPPRESS, help=text, **_read(words))
        if each.name in COMPLETERS:
            added.completer = COMPLETERS[each.name]  # type: ignore[attr-defined]


def _read(words: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `add_argument` whose `type` tells argparse what is wrong in our own words."""
    if "type" not in words:
        return dict(words)

    def read(text: str, of: Callable[[object], Any] = words["type"]) -> Any:
        try:
            return of(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return {**words, "type": read}


def options(arguments: argparse.Namespace, action: str) -> dict[str, Any]:
    """The options of the library that the user gave.

    Raises:
        UsageError: one that was given does not belong to this action.
    """
    taken = _taken()
    for flag, actions, _ in _COMMAND:
        if getattr(arguments, flag[2:].replace("-", "_")) not in (None, False) and action not in actions:
            raise UsageError(f"{flag} is for {_listed(actions)}, not for {action}")
    given = {name: value for name, value in vars(arguments).items() if name in taken}
    for name in given:
        each, only = taken[name]
        if action not in only and each.flag != action:
            meant = f". Did you mean {each.option.instead}?" if each.option.instead else ""
            raise UsageError(f"{each.flag} is for {_listed(only)}, not for {action}{meant}")
    return given


def _listed(actions: Iterable[str]) -> str:
    *some, last = actions
    return f"{', '.join(some)} and {last}" if some else last
