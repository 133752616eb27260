"""What has to lie on a disk: in the place of pytest's own fixtures; `disk` and `disks` are in `conftest.py`."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tmp_path_factory(disks):
    return disks


@pytest.fixture
def tmp_path(disk: Path) -> Path:
    return disk
