"""The one place that waits for TensorStore, and that says in our words what it says when something fails.

In: what TensorStore has been asked for. Out: its answer, or `InputError` where the checkpoint is at fault and `OSError` where
the system is. It never shows its specs, which are 900 characters of JSON and may hold the names of others.

Source: absl's status codes (https://abseil.io/docs/cpp/guides/status-codes), which its messages begin with.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layouts.errors import InputError

PATIENCE = 600.0
"""Seconds in which a store must have answered."""
AT_FIRST = 60.0
"""The same for the first question: who gives no answer at all is called by a wrong name, or there is no way there."""
BEHIND = "OUT_OF_RANGE"
"""What TensorStore says of bytes behind the end of an object."""
WIDTH = 200
"""Characters of TensorStore's message that are shown."""
_SYSTEM = (
    (("No space left", "Disk quota", "RESOURCE_EXHAUSTED"), errno.ENOSPC),
    (("Permission denied", "PERMISSION_DENIED", "UNAUTHENTICATED", "Access Denied"), errno.EACCES),
    (("Too many open files",), errno.EMFILE),
    (("Read-only file system",), errno.EROFS),
    (("DEADLINE_EXCEEDED",), errno.ETIMEDOUT),
    (("Input/output error", "UNAVAILABLE", "ABORTED", "INTERNAL", "CANCELLED", "UNKNOWN"), errno.EIO),
)
"""What messages of the system's faults hold, and the error that it is; the first that fits."""


def answer(future: Any, patience: float | None = None) -> Any:
    """The result of something that TensorStore does, within `PATIENCE` or so many seconds.

    Raises:
        TimeoutError: a store has not answered in time.
        ValueError: it failed; see `told`.
    """
    seconds = patience or PATIENCE
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:.0f} seconds") from None


@contextmanager
def told(place: Path | str, what: str) -> Iterator[None]:
    """Say of TensorStore's errors within which `place` and `what` of it they are about, for who reads.

    Raises:
        InputError: data is missing or damaged.
        OSError: the disk or the store is failing.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if (code := system_error(error)) is not None:
            raise OSError(code, f"{os.strerror(code)} ({short(error)})", f"{place}: {what}") from error
        raise InputError(f"{place}: {what} cannot be read: {short(error)}") from error


@contextmanager
def writing(what: str) -> Iterator[None]:
    """The same for who writes: all that can go wrong there is the system's fault.

    Raises:
        OSError: the disk is full or failing, or the store is.
    """
    try:
        yield
    except ValueError as error:
        code = system_error(error) or errno.EIO
        text = os.strerror(code) if code == errno.ENOSPC else f"{os.strerror(code)} ({short(error)})"
        raise OSError(code, text, what) from error


def system_error(error: Exception) -> int | None:
    """The number of the system's error, where it is one and not the data's."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    text = str(error)
    return next((code for words, code in _SYSTEM if any(word in text for word in words)), None)


def short(error: Exception) -> str:
    """Its message in a line, without specs and places in TensorStore's source."""
    text = re.split(r" \[(?:tensorstore_spec|source locations|domain|\w+_spec|http_\w+|x-[\w-]+)=?", str(error), maxsplit=1)[0]
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
