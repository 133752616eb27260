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

import convert
from convert.errors import ConvertError, UsageError

EPILOG = """\
examples:
  convert --prefuse ckpt ckpt-fused                      wi_0, wi_1 -> wi (E, K, 2N), wo (E, N, K)
  convert --prefuse ckpt ckpt-v5 --layout transformers   gate_up_proj (E, 2N, K), as transformers 5 loads it
  convert --split ckpt-fused ckpt-again                  the exact inverse
  convert --verify ckpt ckpt-fused                       equal weights and equal grouped GEMMs
  convert --verify ckpt-fused                            the digests in its manifest

exit codes: 0 done or equal, 1 a difference, 2 usage, 3 input missing or corrupt, 4 cannot plan, 5 output exists or in use,
6 disk full or failing (run again to go on), 70 a bug, 130 / 143 interrupted (run again to go on)
"""
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; errors are one message on stderr."""
    arguments = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convert",
        description="Fuse the gate and up projections of MoE checkpoints (safetensors, Orbax) offline, split them, prove it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--prefuse", action="store_true", help="write CKPT_IN to CKPT_OUT with one fused tensor wi")
    action.add_argument("--split", action="store_true", help="write CKPT_IN to CKPT_OUT with separate gate and up")
    action.add_argument("--verify", action="store_true", help="compare two checkpoints, or re-check one's digests")
    action.add_argument("--families", action="store_true", help="print the model families in the table")
    parser.add_argument("paths", nargs="*", metavar="CKPT", help="input and output, or the two to compare")
    parser.add_argument("--layout", metavar="NAME", help="target of --prefuse (default: concat); --families lists them")
    parser.add_argument("--shards", type=_positive, default=1, metavar="S", help="tensor-parallel shards of per-shard and lane")
    parser.add_argument(
        "--align", type=_align, default=128, metavar="A", help="per-shard: columns to pad to (default: 128), or maxtext"
    )
    parser.add_argument("--to", choices=("hf", "orbax"), help="format of CKPT_OUT, if another than CKPT_IN's")
    parser.add_argument("--params-only", action="store_true", help="--to hf: leave out step and optimizer state")
    parser.add_argument("--no-scan", action="store_true", help="--to orbax: a subtree for each layer, not stacked ones")
    parser.add_argument(
        "--source-layout",
        metavar="NAME",
        help="the layout of a fused input that does not say so itself; per-shard:8 has 8 shards",
    )
    parser.add_argument("--family", metavar="NAME", help="take this family instead of what config.json says")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and touch nothing")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="workers (default: one per CPU, at most 8)")
    parser.add_argument("--memory", type=_bytes, default="2GiB", metavar="SIZE", help="memory budget (default: 2GiB)")
    parser.add_argument("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="data per shard (default: 5GB)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on after an interruption")
    parser.add_argument("--overwrite", action="store_true", help="replace CKPT_OUT once the new one is complete")
    parser.add_argument("--no-gemm", action="store_true", help="--verify: compare the weights only")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.families:
        from convert.report import families_table

        print(families_table())
        return 0
    if arguments.verify:
        return _verify(arguments)
    if not (arguments.prefuse or arguments.split or arguments.to):
        raise UsageError("say what to do: --prefuse, --split, --verify, --families, or --to the other format")
    source, out = _two_paths(arguments.paths)
    if arguments.split and arguments.layout:
        raise UsageError("--layout is for --prefuse; --split restores the family's own layout. Did you mean --source-layout?")
    if arguments.dry_run:
        return _dry_run(arguments, source, out)
    call, extra = _call(arguments)
    total = None if arguments.quiet else _input_bytes(source)
    with _progress(total, arguments.quiet) as progress:
        report = call(
            source,
            out,
            family=arguments.family,
            to=arguments.to,
            scan=not arguments.no_scan,
            params_only=arguments.params_only,
            jobs=arguments.jobs,
            memory=arguments.memory,
            max_shard_size=arguments.max_shard_size,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            progress=progress,
            **extra,
        )
    print(report)
    return 0


def _call(arguments: argparse.Namespace) -> tuple[Callable[..., object], dict[str, object]]:
    """The function of the library, and what only it takes."""
    if not (arguments.prefuse or arguments.split):
        return convert.reformat, {}
    if arguments.split:
        return convert.split, {"source_layout": arguments.source_layout}
    layout = {"layout": arguments.layout} if arguments.layout else {}
    return convert.prefuse, {
        **layout,
        "shards": arguments.shards,
        "align": arguments.align,
        "source_layout": arguments.source_layout,
    }


def _dry_run(arguments: argparse.Namespace, source: str, out: str) -> int:
    from convert.report import describe_plan
    from convert.run import budget_of
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
        params_only=arguments.params_only,
    )
    with closing(open_checkpoint(source)) as reader:
        budget = budget_of(planned, reader, arguments.memory, arguments.jobs)
    print(describe_plan(planned, budget.peak, budget.jobs))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    if len(arguments.paths) not in (1, 2):
        raise UsageError("--verify takes two checkpoints to compare, or one whose digests to re-check")
    total = None if arguments.quiet else _input_bytes(arguments.paths[-1])
    with _progress(total, arguments.quiet) as progress:
        verdict = convert.verify(*arguments.paths, progress=progress, gemm=not arguments.no_gemm)
    print(verdict)
    return 0 if verdict.equal else 1


def _two_paths(paths: Sequence[str]) -> tuple[str, str]:
    if len(paths) != 2:
        raise UsageError(f"give an input and an output checkpoint; found {len(paths)} paths. See convert --help")
    return paths[0], paths[1]


def _input_bytes(path: str) -> int:
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


def _bytes(text: str) -> int:
    """`512MiB`, `5GB`, `1.5g` or a plain number of bytes."""
    number = text.strip().lower().removesuffix("b")
    digits = number.rstrip("kmgti")
    unit = number[len(digits) :]
    try:
        value = int(float(digits) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512MiB or 5GB") from None
    if value <= 0:
        raise argparse.ArgumentTypeError("a size must be above zero")
    return value


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _align(text: str) -> int | str:
    return text if text == "maxtext" else _positive(text)


def _reader_left() -> int:
    """Whoever read our text has seen enough (`| head`); closing stdout must not complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _complain(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"convert: {message}", file=sys.stderr)
    return code
