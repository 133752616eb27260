"""The `convert` command: arguments in, one call of the library, text and an exit code out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import convert
from convert.arguments import parser
from convert.errors import ConvertError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are one message on stderr."""
    arguments = parser().parse_args(argv)
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

        print(families_table())
        return 0
    if arguments.verify:
        if arguments.distributed or arguments.coordinator:
            raise UsageError("--verify runs in one process; narrow it with --layers to divide it by hand")
        return _verify(arguments)
    if not (arguments.prefuse or arguments.split or arguments.to):
        raise UsageError("say what to do: --prefuse, --split, --verify, --families, or --to the other format")
    source, out = _two_paths(arguments.paths)
    if arguments.split and arguments.layout:
        raise UsageError("--layout is for --prefuse; --split restores the family's own layout. Did you mean --source-layout?")
    if arguments.split and arguments.dequantize:
        raise UsageError("--dequantize is for --prefuse and --to; --split only moves bits")
    if arguments.dry_run:
        return _dry_run(arguments, source, out)
    call, extra = _call(arguments)
    processes = None
    if arguments.distributed or arguments.coordinator:
        processes = convert.connect(arguments.coordinator, arguments.num_processes, arguments.process_id)
    elif arguments.num_processes or arguments.process_id is not None:
        raise UsageError("--num-processes and --process-id go with --coordinator HOST:PORT, or with --dry-run")
    quiet = arguments.quiet or bool(processes and not processes.first)
    total = None if quiet else _input_bytes(source) // (processes.count if processes else 1) or None
    with _progress(total, quiet) as progress:
        report = call(
            source,
            out,
            family=arguments.family,
            to=arguments.to,
            scan=not arguments.no_scan,
            scan_axis=arguments.scan_axis,
            params_only=arguments.params_only,
            drop_optimizer=arguments.drop_optimizer,
            jobs=arguments.jobs,
            memory=arguments.memory,
            max_shard_size=arguments.max_shard_size,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            processes=processes,
            progress=progress,
            **extra,
        )
    print(report)
    return 0


def _call(arguments: argparse.Namespace) -> tuple[Callable[..., object], dict[str, object]]:
    """The function of the library, and what only it takes."""
    if not (arguments.prefuse or arguments.split):
        return convert.reformat, {"dequantize": arguments.dequantize}
    if arguments.split:
        return convert.split, {"source_layout": arguments.source_layout, "keep_chunks": arguments.keep_chunks}
    layout = {"layout": arguments.layout} if arguments.layout else {}
    return convert.prefuse, {
        **layout,
        "dequantize": arguments.dequantize,
        "keep_chunks": arguments.keep_chunks,
        "shards": arguments.shards,
        "align": arguments.align,
        "source_layout": arguments.source_layout,
    }


def _dry_run(arguments: argparse.Namespace, source: str, out: str) -> int:
    from convert.commit.processes import Processes
    from convert.report import describe_division, describe_plan
    from convert.run import Options, writer_of
    from layouts.checkpoint import open_checkpoint

    planned = convert.plan(
        source,
        out,
        prefuse=arguments.prefuse,
        split=arguments.split,
        layout=arguments.layout or "concat",
        shards=arguments.shards,
        align=arguments.align,
        family=arguments.family,
        source_layout=arguments.source_layout,
        to=arguments.to,
        scan=not arguments.no_scan,
        scan_axis=arguments.scan_axis,
        params_only=arguments.params_only,
        drop_optimizer=arguments.drop_optimizer,
        keep_chunks=arguments.keep_chunks,
        dequantize=arguments.dequantize,
    )
    processes = Processes(count=arguments.num_processes or 1)
    options = Options(
        arguments.jobs, arguments.memory, arguments.max_shard_size, arguments.resume, arguments.overwrite, processes
    )
    with closing(open_checkpoint(source)) as reader:
        writer = writer_of(planned, reader, options)
        pieces = writer.pieces()
    print(describe_plan(planned, writer.peak + processes.held, writer.jobs))
    if arguments.num_processes:
        print(describe_division(pieces, arguments.num_processes))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if len(arguments.paths) not in (1, 2):
        raise UsageError("--verify takes two checkpoints to compare, or one whose digests to re-check")
    options: dict[str, Any] = {
        "gemm": not arguments.no_gemm,
        "layers": arguments.layers,
        "experts": arguments.experts,
        "tokens": arguments.tokens,
        "backend": arguments.backend,
        "mesh": arguments.mesh,
        "memory": arguments.memory,
        "scan_axis": arguments.scan_axis,
        "source_layout": arguments.source_layout,
    }
    if arguments.dry_run:
        from convert.verifier import Options, estimate_cost
        from layouts.places import place

        one, other = map(place, _two_paths(arguments.paths))
        print(estimate_cost(one, other, Options(**options)))
        return 0
    passes = 2 if len(arguments.paths) == 2 and not arguments.no_gemm else 1  # the bits, then the probes
    total = None if arguments.quiet else passes * _input_bytes(arguments.paths[-1])
    with _progress(total, arguments.quiet) as progress:
        verdict = convert.verify(*arguments.paths, progress=progress, **options)
    print(verdict.json() if arguments.json else verdict)
    if arguments.report:
        from convert.verifier.page import page

        Path(arguments.report).write_text(page(verdict), encoding="utf-8")
    return 0 if verdict.equal else 1


def _two_paths(paths: Sequence[str]) -> tuple[str, str]:
    if len(paths) != 2:
        raise UsageError(f"give an input and an output checkpoint; found {len(paths)} paths. See convert --help")
    return paths[0], paths[1]


def _input_bytes(path: str) -> int:
    """What lies in a directory; nobody knows in a store."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())


@contextmanager
def _progress(total: int | None, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    if quiet:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True, leave=False) as bar:

        def advance(done: int) -> None:
            bar.update(done)

        yield advance


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
    print(f"convert: {message}", file=sys.stderr)
    return code
