"""Every error a user can meet, and its exit code. Each message says what is wrong, where, and what to do.

    ConvertError                 70  a bug of ours, when nothing more exact is raised
    |- UsageError                 2  the call contradicts itself
    |- InputError                 3  the input is missing, corrupt or unsafe   (raised by `layouts` too)
    |- PlanError                  4  no lossless plan: unknown family or layout, experts unlike each other
    |- OutputError                5  the output exists, is in use, or overlaps the input
    `- StorageError               6  the disk is full or failing; run the same command again

Codes 0 (done, equal) and 1 (`--verify` found a difference) are results, not errors; 130 and 143 are SIGINT and SIGTERM.
"""

import difflib
import errno
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from layouts.errors import ConvertError, InputError, PlanError

__all__ = [
    "ConvertError",
    "InputError",
    "OutputError",
    "PlanError",
    "StorageError",
    "UsageError",
    "did_you_mean",
    "no_memory",
    "one_line",
    "printable",
    "readable",
    "to_do",
    "too_little",
]

_LEFT_OVER = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)
"""What code raises that reads something it was not written for."""


_CALLED: Mapping[str, tuple[str, ...]] = {
    "maxtext": ("orbax", "concat"),
    "tensorstore": ("orbax",),
    "zarr": ("orbax",),
    "orbax": ("concat",),
    "hf": ("transformers",),
    "huggingface": ("hf", "transformers"),
    "hugging-face": ("hf", "transformers"),
    "transformers": ("hf",),
    "safetensors": ("hf", "transformers"),
    "bfloat16": ("bf16",),
    "megablocks": ("megablox",),
    "gmm": ("megablox", "per-shard"),
    "gmm-tp": ("per-shard",),
    "gpt-oss": ("interleaved",),
    "w13": ("vllm",),
    "gate_up_proj": ("transformers",),
    "wi": ("concat",),
    "gpt_oss": ("interleaved",),
    "default": ("concat",),
}
"""What others call formats, layouts, types and backends -> what this tool calls them; those that there are."""


_TO_DO: Mapping[tuple[int, ...], str] = {
    (errno.EACCES, errno.EPERM): "ask its owner for the right, or take another place",
    (errno.EROFS,): "it lies on a disk that is only read; take another place",
    (errno.ENOSPC, errno.EDQUOT): "make room there",
    (errno.EMFILE, errno.ENFILE): "allow more open files (ulimit -n)",
    (errno.ENAMETOOLONG,): "give a shorter name",
    (errno.EIO, errno.ESTALE): "the disk, or the way to it, is failing",
}
"""What the system says -> what to do."""


class UsageError(ConvertError):
    """The call contradicts itself, or names something that does not exist."""

    exit_code = 2


class OutputError(ConvertError):
    """The output exists already, another run is writing it, or it overlaps the input."""

    exit_code = 5


class StorageError(ConvertError):
    """Reading or writing failed for a reason outside the checkpoint, such as a full disk."""

    exit_code = 6


def no_memory(error: MemoryError) -> str:
    """What is said where memory is at its end, be it that a part of a tensor needs more than there is."""
    what = str(error) or "a part of a tensor needs more than there is"
    return f"there is not enough memory here ({what}): lower --memory, which makes parts smaller, or use a larger machine"


def to_do(error: OSError) -> str:
    """What to do where the system refuses, if there is something; who says more than the system says it all."""
    if error.strerror != os.strerror(error.errno or 0):
        return ""
    return next((f"; {words}" for codes, words in _TO_DO.items() if error.errno in codes), "")


def too_little(memory: int, why: str) -> UsageError:
    """The error that `memory` bytes are less than a run can do with."""
    shown, unit = (f"{memory >> 20}MiB", "") if memory >> 20 else (memory, "; a number without a unit is bytes")
    return UsageError(f"--memory={shown} is too little: {why}{unit}")


@contextmanager
def readable(source: str | Path) -> Iterator[None]:
    """The last resort around opening, describing and planning: whatever an input makes them raise is the input's fault.

    Raises:
        InputError: something was raised that names no fault of the input's; the cause is attached.
        StorageError: there is not enough memory.
    """
    try:
        yield
    except MemoryError as error:
        raise StorageError(f"{source}: {no_memory(error)}") from error
    except _LEFT_OVER as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        raise InputError(
            f"{source}: cannot be read as a checkpoint: {type(error).__name__} in {last.name}: {str(error)[:200]}; "
            f"--debug shows where"
        ) from error


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The word of these that is nearest to one that is none of them, as a question; nothing if none is near."""
    small = {each.lower(): each for each in known}
    others = [small[each] for each in _CALLED.get(word.lower(), ()) if each in small]
    near = others or [small[each] for each in difflib.get_close_matches(word.lower(), small, n=1, cutoff=0.7)]
    return f" (did you mean {near[0]}?)" if near else ""


def printable(text: str) -> str:
    """A text whose control characters, and half letters, stand as escapes: names of an input must not steer a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else f"{letter!r}"[1:-1] for letter in text)


def one_line(text: str) -> str:
    """The same with its line breaks, for what becomes a line of a plan or a report: a name must not add one of its own."""
    return printable(text).replace("\n", "\\n")
