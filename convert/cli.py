"""The `convert` command: arguments in, one call of the library, text and an exit code out.

In: the words of a command line. Out: text, and an exit code. It never reads or writes a checkpoint itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import convert
from convert.arguments import ACTIONS, EXAMPLES, IMAGES, OTHER_PROGRAM, options, parser
from convert.errors import ConvertError, UsageError, one_line, printable, readable
from convert.options import Choices, Running, Verification
from convert.options.option import complete, named
from convert.progress import bars

if TYPE_CHECKING:
    from convert.commit.processes import Processes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are one message on stderr."""
    arguments = parser().parse_intermixed_args(argv)
    arguments.command = shlex.join(["convert", *(sys.argv[1:] if argv is None else argv)])
    try:
        with _signals():
            return _run(arguments)
    except _Stopped as stopped:
        print(f"convert: interrupted; run the same command again to go on (signal {stopped.signal})", file=sys.stderr)
        return 128 + stopped.signal
    except ConvertError as error:
        return _complain(str(error), error.exit_code, arguments.debug)
    except BrokenPipeError:
        return _reader_left()
    except OSError as error:
        return _complain(f"{error.strerror or error}: {error.filename or ''}", 6, arguments.debug)
    except Exception as error:
        return _complain(f"this is a bug, please report it (--debug shows where): {error!r}", 70, arguments.debug)


def verify_main(argv: Sequence[str] | None = None) -> int:
    """`convert-verify A B` is `convert --verify A B`."""
    return main(["--verify", *(sys.argv[1:] if argv is None else argv)])


def _run(arguments: argparse.Namespace) -> int:
    if arguments.families:
        from convert.report import families_table

        options(arguments, "--families")

        print(families_table())
        return 0
    if arguments.digest:
        return _digest(arguments)
    if arguments.verify:
        return _verify(arguments)
    action = next((word for word in ("prefuse", "split", "merge", "to") if getattr(arguments, word, None)), None)
    if action is None:
        return _nothing_to_do(arguments.paths)
    given = options(arguments, f"--{action}")
    source, out = _two_paths(arguments.paths)
    if action == "merge" and "base" not in given:
        raise UsageError("--merge ADAPTER OUT needs the checkpoint that the adapter is for: --base CKPT")
    if arguments.dry_run:
        return _dry_run(arguments, source, out, given)
    call: Callable[..., object] = getattr(convert, "reformat" if action == "to" else action)
    processes = _processes(arguments)
    quiet = arguments.quiet or bool(processes and not processes.first)
    with nullcontext() if quiet else bars() as progress:  # the plan says how much there is to do
        report = call(source, out, processes=processes, progress=progress, **given)
    print(printable(str(report)))
    return 0


def _nothing_to_do(paths: Sequence[str]) -> int:
    """What to say to a command without an action."""
    if not paths:
        print(f"convert: say what to do; convert --help shows all\n\n{EXAMPLES}", end="", file=sys.stderr)
        return 2
    if any(Path(path).suffix.lower() in IMAGES for path in paths):
        raise UsageError(OTHER_PROGRAM)
    if f"--{paths[0]}" in ACTIONS or paths[0] in ("families",):
        raise UsageError(f"did you mean: {shlex.join(['convert', f'--{paths[0]}', *paths[1:]])}")
    raise UsageError("say what to do: --prefuse, --split, --merge, --verify, --digest, --families, or --to the other format")


def _processes(arguments: argparse.Namespace) -> Processes | None:
    if arguments.distributed or arguments.coordinator:
        import jax

        # Nothing is computed together, and Gloo would print to stdout.
        jax.config.update("jax_cpu_collectives_implementation", None)  # type: ignore[no-untyped-call]
        return convert.connect(arguments.coordinator, arguments.num_processes, arguments.process_id)
    if arguments.num_processes or arguments.process_id is not None:
        raise UsageError("--num-processes and --process-id go with --coordinator HOST:PORT, or with --dry-run")
    return None


def _dry_run(arguments: argparse.Namespace, source: str, out: str, given: Mapping[str, Any]) -> int:
    from convert.commit.processes import Processes
    from convert.planning.planner import Plan
    from convert.report import describe_division, describe_plan
    from convert.run import writer_of
    from layouts.checkpoint import open_checkpoint

    choices = {each.name for each in named(Choices)}
    chosen = {name: value for name, value in given.items() if name in choices}
    planned = convert.plan(source, out, prefuse=arguments.prefuse, split=arguments.split, merge=arguments.merge, **chosen)
    if not isinstance(planned, Plan):
        from convert.adapters.report import describe_plan as describe_adapter

        print(printable(describe_adapter(planned)))
        return 0
    processes = Processes(count=arguments.num_processes or 1)
    with readable(source), closing(open_checkpoint(planned.source)) as reader:
        writer = writer_of(planned, reader, complete(Running, given), processes)
        pieces = writer.pieces()
    print(printable(describe_plan(planned, writer.budget.peak + processes.held, writer.budget.jobs)))
    if arguments.num_processes:
        print(printable(describe_division(pieces, arguments.num_processes)))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from convert.verifier.environment import run_of
    from convert.verifier.page import page

    if len(arguments.paths) not in (1, 2):
        raise UsageError("--verify takes two checkpoints to compare, or one whose digests to re-check")
    whole = bool(arguments.json or arguments.report)
    given = {"content": whole, "self_test": whole, **options(arguments, "--verify")}
    if arguments.dry_run:
        if arguments.distributed or arguments.coordinator or arguments.num_processes or arguments.process_id is not None:
            raise UsageError("--verify --dry-run tells what one process takes; leave out what is said of several")
        from convert.verifier import estimate_cost
        from layouts.disk.places import place

        one, other = map(place, _two_paths(arguments.paths))
        print(printable(str(estimate_cost(one, other, complete(Verification, given, of=2)))))
        return 0
    processes = _processes(arguments)
    quiet = arguments.quiet or bool(processes and not processes.first)
    started = datetime.now(UTC)
    with nullcontext() if quiet else bars("opening") as progress:
        verdict = convert.verify(*arguments.paths, processes=processes, progress=progress, **given)
    if processes and not processes.first:
        return 0 if verdict.equal else 1
    run = run_of(arguments.command, started)
    print(verdict.json(run) if arguments.json else printable(str(verdict)))
    if arguments.report:
        Path(arguments.report).write_text(page(verdict, run), encoding="utf-8")
    return 0 if verdict.equal else 1


def _digest(arguments: argparse.Namespace) -> int:
    if not arguments.paths:
        raise UsageError("--digest takes one checkpoint or more")
    given, found = options(arguments, "--digest"), {}
    for path in arguments.paths:
        with nullcontext() if arguments.quiet else bars(total=_input_bytes(path) or None) as progress:
            found[path] = convert.digest(path, progress=progress, **given)
    if arguments.json:
        print(json.dumps({path: each.json() for path, each in found.items()}, indent=1))
    else:
        print("\n".join(each.told(path) for path, each in found.items()))
    return 0


def _two_paths(paths: Sequence[str]) -> tuple[str, str]:
    if len(paths) != 2:
        raise UsageError(f"give an input and an output checkpoint; found {len(paths)} paths. See convert --help")
    return paths[0], paths[1]


def _input_bytes(path: str) -> int:
    """What lies in a directory; nobody knows in a store."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


class _Stopped(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def _signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into one exception, so that workers stop tidily and the run can be resumed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise _Stopped(number)

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _reader_left() -> int:
    """Whoever read our text has seen enough (`| head`); closing stdout must not complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"convert: {one_line(message)}", file=sys.stderr)
    return code
