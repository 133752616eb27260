"""Settings of all tests."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from hypothesis import settings

from scripts._forked import Forks
from scripts._sandbox import in_memory

# Here XLA compiles for much longer than it computes. Processes that tests start have this from them. The flag of the emitters
# is gone in JAX 0.12, where XLA would end the process for it.
_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true{_EMITTERS}")

# Tests wait for a disk as long as they compute. Those that need one, because what is written to it goes past the page cache,
# have their `tmp_path` there.
if (memory := in_memory(room=4 << 30)) is not None:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))

# Meshes are tried on simulated devices, which have to be there before JAX begins.
jax.config.update("jax_num_cpu_devices", 8)

# Examples take as long as the machine is busy, so time says nothing about them.
settings.register_profile("tests", max_examples=60, deadline=None)
settings.load_profile("tests")


@pytest.hookimpl(optionalhook=True)  # clients run where it is not installed
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: half as many again as cores, as tests wait for disks and for processes that they start."""
    return max(2, (os.cpu_count() or 1) * 3 // 2)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Processes of xdist take neighbours, then each other's last tests: what a module makes once is made once, not in each."""
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


class Disk(NamedTuple):
    """What stands for `tmp_path_factory` where inputs have to lie on a disk, too: the kernel copies within one alone."""

    root: Path

    def mktemp(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.root))


@pytest.fixture(scope="session")
def disks() -> Iterator[Disk]:
    with tempfile.TemporaryDirectory() as name:
        yield Disk(Path(name).resolve())


@pytest.fixture
def disk(disks: Disk) -> Iterator[Path]:
    """A directory where the system has its temporary files."""
    with tempfile.TemporaryDirectory(dir=disks.root) as name:
        yield Path(name)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs code in processes of their own, at a tenth of the cost: none has to start Python."""
    with Forks(JAX_PLATFORMS="cpu") as forks:
        yield forks
