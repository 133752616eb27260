"""Where and how a verification ran: what somebody needs who runs it again.

In: the command, when it began. Out: `Run`. It never looks at a checkpoint.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from convert.version import TOOL

_LIBRARIES = ("jax", "numpy", "safetensors", "tensorstore", "ml_dtypes", "einops", "xxhash")
NO_DEVICE = "none: no GEMM ran"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run: `started` is UTC, `machine` and `libraries` are names with what they are; the device is JAX's."""

    command: str
    started: str
    seconds: float
    tool: str
    python: str
    libraries: Mapping[str, str]
    machine: Mapping[str, str]
    device: str


def run_of(command: str, started: datetime) -> Run:
    """A run that is over now."""
    return Run(
        command=command,
        started=started.astimezone(UTC).isoformat(timespec="seconds"),
        seconds=round((datetime.now(UTC) - started).total_seconds(), 3),
        tool=TOOL,
        python=platform.python_version(),
        libraries=dict(_libraries()),
        machine=_machine(),
        device=_device(),
    )


def _libraries() -> Iterator[tuple[str, str]]:
    """Those that are installed: bits are compared without JAX."""
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _machine() -> dict[str, str]:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{pages * page / 2**30:.1f} GiB",
    }


def _processor() -> str:
    """Its name, which Linux says in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _device() -> str:
    """What JAX ran on, if it ran."""
    if (jax := sys.modules.get("jax")) is None:
        return NO_DEVICE
    from jax._src.xla_bridge import backends_are_initialized  # which JAX does not export; to ask for devices would begin one

    if not backends_are_initialized():
        return NO_DEVICE
    kinds = Counter(f"{device.platform} ({device.device_kind})" for device in jax.devices())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
