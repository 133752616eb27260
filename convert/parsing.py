"""How the words of a command line are read: what is wrong with them is said in one line, and an option has one value.

In: words. Out: a namespace, or exit code 2. It knows no option of this tool.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from typing import Any, NoReturn

from convert.answers.words import IMAGES, MEANT, OTHER_PROGRAM
from convert.errors import did_you_mean
from convert.terminal import columns, fitted


class Parser(argparse.ArgumentParser):
    """One that says in one line what is wrong with a command, and keeps what it said."""

    said: str | None = None

    def error(self, message: str) -> NoReturn:
        """Say it, and leave with exit code 2."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        word = unknown.split(" ")[0].partition("=")[0]
        if word in IMAGES:
            message = OTHER_PROGRAM
        elif word:
            known = MEANT.get(word) or MEANT.get(word.lower().replace("_", "-"))
            message += f" ({known})" if known else self._nearest(word)
        self.said = f"{self._in_our_words(message)}; {self.prog} --help shows all options"
        self.exit(2, fitted(f"{self.prog}: {self.said}", columns(sys.stderr)) + "\n")

    def _nearest(self, word: str) -> str:
        no = word.startswith("--no-")  # the nearest of these must not be the opposite of what was meant
        bare = {flag.lstrip("-"): flag for flag in self._option_string_actions if flag.startswith("--no-") or not no}
        return did_you_mean(word.lstrip("-"), bare).replace("did you mean ", "did you mean --")

    def _in_our_words(self, message: str) -> str:
        """What argparse says of a value, as the library says it, and with what to do."""
        about, chosen, others = message.partition(" (choose from ")
        flags = about.removeprefix("argument ").partition(":")[0].replace("/", ", ")
        flag = flags.rpartition(", ")[2]
        if chosen:  # "argument --to: invalid choice: 'maxtext' (choose from 'hf', 'orbax')"
            known, wrong = others.strip(")").replace("'", "").split(", "), about.rpartition(": ")[2].strip("'")
            return f"argument {flag}: {wrong!r} is none of {', '.join(known)}{did_you_mean(wrong, known)}"
        action = self._option_string_actions.get(flag)
        if action and message.endswith("expected one argument"):
            shown = action.metavar or "{" + ",".join(map(str, action.choices or ())) + "}"
            return f"argument {flag}: it takes a value: {flag} {shown}"
        if action and "ignored explicit argument" in message:
            value = message.rpartition("ignored explicit argument ")[2]
            return f"argument {flags}: it takes no value; put a space in the place of = before {value}, or leave it out"
        return message


class Format(argparse.RawDescriptionHelpFormatter):
    """One that cuts no word at its hyphen: `megatron-bridge` is typed as it stands."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _set(parser: argparse.ArgumentParser, namespace: argparse.Namespace, name: str, value: Any, flag: str) -> None:
    if (before := getattr(namespace, name, None)) is not None and before != value:
        parser.error(f"argument {flag}: it is given twice, and says two things; give it once")
    setattr(namespace, name, value)


class Once(argparse.Action):
    """An option whose value is given once, or twice the same."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keep it."""
        _set(parser, namespace, self.dest, values, str(option_string))


class OnceSwitch(argparse.BooleanOptionalAction):
    """The same of a switch, which its `--no-` turns off."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keep it."""
        del values  # a switch has none
        _set(parser, namespace, self.dest, not str(option_string).startswith("--no-"), str(option_string))
