"""The `convert` command: arguments in, one call of the library, text and an exit code out.

In: the words of a command line. Out: text, and an exit code. It never reads or writes a checkpoint itself.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from convert.actions import act, action_of
from convert.answers.envelope import envelope
from convert.answers.words import EXAMPLES
from convert.arguments import ACTIONS, parser
from convert.errors import ConvertError, StorageError, no_memory, one_line, printable, to_do
from convert.terminal import columns, fitted, mention, open_streams, say


def command() -> int:
    """`main` in a process of its own: at its end Python would look through all objects for garbage, a sixth of a short run."""
    open_streams()
    try:
        return main()
    finally:
        for stream in (sys.stdout, sys.stderr):  # argparse prints by itself
            mention("", stream)
        gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are one message on stderr."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _parsed(words)
    arguments.command = shlex.join(["convert", *words])
    got: list[int] = []
    try:
        with _signals(got):
            return _run(arguments)
    except _Stopped:
        return _interrupted(arguments, got[0])
    except BrokenPipeError:  # whoever read our text has seen enough (`| head`)
        return 128 + signal.SIGPIPE
    except Exception as error:
        if got:  # while a library in C was imported, which makes another error of it
            return _interrupted(arguments, got[0])
        return _failed(arguments, *_told(error), debug=arguments.debug)


def _interrupted(arguments: argparse.Namespace, number: int) -> int:
    text = f"interrupted; run the same command again to go on (signal {number})"
    return _failed(arguments, text, 128 + number, debug=False)


def _failed(arguments: argparse.Namespace, text: str, code: int, *, debug: bool) -> int:
    """Say why there is no answer, to programs on stdout, too."""
    if arguments.json:
        mention(envelope(action_of(arguments), code, None, text), sys.stdout)
    return _complain(text, code, debug)


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; who reads JSON is told in JSON what is wrong with them, too."""
    found = parser()
    try:
        return _completed(found).parse_intermixed_args(words)
    except SystemExit:
        if found.said and any(word.partition("=")[0] == "--json" for word in words):
            action = next((word[2:] for word in words if word in ACTIONS), "none")
            mention(envelope(action, 2, None, found.said), sys.stdout)
        raise


def _completed(found: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The same, after it has answered a shell that asks what a word may become (`pip install moe-convert[completion]`)."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(found)
    return found


def verify_main(argv: Sequence[str] | None = None) -> int:
    """`convert-verify A B` is `convert --verify A B`."""
    return main(["--verify", *(sys.argv[1:] if argv is None else argv)])


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.paths and action_of(arguments) == "none":
        _failed(arguments, "say what to do; convert --help shows all", 2, debug=False)
        mention(f"\n{EXAMPLES.rstrip()}", sys.stderr)
        return 2
    answer = act(arguments)
    shown = answer.document if arguments.json else fitted(printable(answer.text), columns(sys.stdout))
    if shown:
        _answer(shown)
    if answer.problem:
        _complain(str(answer.problem), answer.exit_code, debug=False)
    return answer.exit_code


def _answer(text: str) -> None:
    try:
        say(text, sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"what there is to say cannot be written to stdout: {error.strerror}{to_do(error)}") from error


class _Stopped(BaseException):
    pass


@contextmanager
def _signals(got: list[int]) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into one exception, so that workers stop tidily and the run can be resumed; note what came."""

    def stop(number: int, _: FrameType | None) -> None:
        got.append(number)
        raise _Stopped(number)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _told(error: Exception) -> tuple[str, int]:
    """What is said of an error, and its exit code."""
    if isinstance(error, ConvertError):
        return error.command or str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}{to_do(error)}", 6
    if isinstance(error, MemoryError):
        return no_memory(error), 6
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] not in ("convert", "layouts"):
        package = error.name.partition(".")[0]
        return f"this needs the package {package}, which is not installed here: pip install {_wanted(package)}", 2
    return f"this is a bug, please report it (--debug shows where): {error!r}", 70


def _wanted(package: str) -> str:
    """A package with the versions that this tool works with, as `pip` takes it."""
    from importlib.metadata import PackageNotFoundError, requires  # which import email, sockets and archives

    with suppress(PackageNotFoundError):
        for each in requires("moe-convert") or ():
            if re.match(rf"{package}\b", each.replace("-", "_")):
                return shlex.quote(each.partition(";")[0])
    return package


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        mention(traceback.format_exc().rstrip(), sys.stderr)
    mention(fitted(f"convert: {one_line(message)}", columns(sys.stderr)), sys.stderr)
    return code
