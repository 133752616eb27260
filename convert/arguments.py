"""The arguments of the `convert` command, made from the definitions of options.

In: `convert.options`. Out: a parser whose namespace holds only what the user gave, and `options`, which checks that it fits.
It defines no option of the library; those of the command alone stand in `_COMMAND`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from convert.errors import UsageError, did_you_mean
from convert.options import values
from convert.options.keywords import Digesting, MergingInto, Prefusing, Reformatting, Splitting, Verifying, options_of
from convert.options.option import Named

EXAMPLES = """\
examples:
  convert --prefuse ckpt ckpt-fused                      wi_0, wi_1 -> wi (E, K, 2N), wo (E, N, K)
  convert --prefuse ckpt ckpt-v5 --layout transformers   gate_up_proj (E, 2N, K), as transformers 5 loads it
  convert --split ckpt-fused ckpt-again                  the exact inverse
  convert --merge adapter merged --base ckpt             base + LoRA adapter, computed in float32
  convert --verify ckpt ckpt-fused                       equal weights and equal grouped GEMMs
  convert --verify ckpt-fused                            the digests in its manifest
  convert --digest ckpt ckpt-fused                       what they hold, by one sha256 each
"""
EPILOG = f"""{EXAMPLES}
exit codes: 0 done or equal, 1 a difference, 2 usage, 3 input missing or corrupt, 4 cannot plan, 5 output exists or in use,
6 disk full or failing (run again to go on), 70 a bug, 130 / 143 interrupted (run again to go on)
"""
ACTIONS: Mapping[str, type] = {
    "--prefuse": Prefusing,
    "--split": Splitting,
    "--merge": MergingInto,
    "--to": Reformatting,
    "--verify": Verifying,
    "--digest": Digesting,
}
"""What each action takes; `--to` alone is the one that only changes the format."""
IMAGES = frozenset(
    [f".{end}" for end in ("png", "jpg", "jpeg", "gif", "webp", "tif", "tiff", "bmp", "svg", "pdf", "heic")]
    + [f"-{word}" for word in ("resize", "quality", "crop", "rotate", "density")]
)
"""How files end, and options begin, of the other program that is called `convert`."""
OTHER_PROGRAM = "this converts MoE checkpoints; for pictures, call ImageMagick's convert by its full path, or magick"
_NATURAL, _POSITIVE = values.natural, values.positive
_PLANNED = ("--prefuse", "--split", "--merge", "--to", "--verify")
_EVERY = (*_PLANNED, "--digest", "--families")
_COMMAND: tuple[tuple[str, tuple[str, ...], dict[str, Any]], ...] = (
    ("--dry-run", _PLANNED, {"action": "store_true", "help": "print the plan and touch nothing; --verify: the cost"}),
    (
        "--distributed",
        _PLANNED,
        {"action": "store_true", "help": "one of several processes, found by JAX (SLURM, GKE, TPU)"},
    ),
    ("--coordinator", _PLANNED, {"metavar": "HOST:PORT", "help": "where process 0 of several is; implies --distributed"}),
    ("--num-processes", _PLANNED, {"type": _POSITIVE, "metavar": "P", "help": "how many; --dry-run: divide the work"}),
    ("--process-id", _PLANNED, {"type": _NATURAL, "metavar": "I", "help": "which of them this is, from 0"}),
    ("--json", ("--verify", "--digest"), {"action": "store_true", "help": "print the verdict, or the digests, as JSON"}),
    ("--report", ("--verify",), {"metavar": "FILE.html", "help": "--verify: write the verdict as one offline page, too"}),
    ("--quiet", _EVERY, {"action": "store_true", "help": "no progress bar"}),
    ("--debug", _EVERY, {"action": "store_true", "help": "show tracebacks"}),
)
"""Arguments that the library has no option for, and the actions that take them."""


class _Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        """Say it, and leave with exit code 2."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        word = unknown.split(" ")[0].partition("=")[0]
        if word in IMAGES:
            message = OTHER_PROGRAM
        elif word:
            message += did_you_mean(word, self._option_string_actions)
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help shows all options\n")


def parser() -> argparse.ArgumentParser:
    """All options, with their help."""
    found = _Parser(
        prog="convert",
        allow_abbrev=False,
        description="Fuse the gate and up projections of MoE checkpoints (safetensors, Orbax) offline, split them, prove it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = found.add_mutually_exclusive_group()
    action.add_argument("--prefuse", action="store_true", help="write CKPT_IN to CKPT_OUT with one fused tensor wi")
    action.add_argument("--split", action="store_true", help="write CKPT_IN to CKPT_OUT with separate gate and up")
    action.add_argument("--merge", action="store_true", help="write --base CKPT with the adapter CKPT_IN in it to CKPT_OUT")
    action.add_argument("--verify", action="store_true", help="compare two checkpoints, or re-check one's digests")
    action.add_argument(
        "--digest", action="store_true", help="print a sha256 of what checkpoints hold, the same in every layout"
    )
    action.add_argument("--families", action="store_true", help="print the model families in the table")
    found.add_argument("paths", nargs="*", metavar="CKPT", help="input and output, or the two to compare")
    for each, actions in _taken().values():
        _add(found, each, "--verify: " if actions == ["--verify"] else "")
    for flag, _, words in _COMMAND:
        found.add_argument(flag, **_read(words))
    return found


def _taken() -> dict[str, tuple[Named, list[str]]]:
    """Every option once, with the actions that take it."""
    found: dict[str, tuple[Named, list[str]]] = {}
    for action, keywords in ACTIONS.items():
        for each in options_of(keywords):
            found.setdefault(each.name, (each, []))[1].append(action)
    return found


def _add(parser: argparse.ArgumentParser, each: Named, before: str) -> None:
    option, text = each.option, f"{before}{each.sentence}"
    if each.is_switch and (each.default or option.either):
        flag = f"--{each.name.replace('_', '-')}"
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
    elif each.is_switch:
        parser.add_argument(each.flag, action="store_true", default=argparse.SUPPRESS, help=text)
    else:
        words = {"choices": option.choices} if option.choices else {"metavar": option.show, "type": option.read}
        parser.add_argument(each.flag, default=argparse.SUPPRESS, help=text, **_read(words))


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
