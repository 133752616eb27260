"""What is killed or fails writes past the page cache of a disk."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tmp_path_factory(disks):
    return disks


@pytest.fixture
def tmp_path(disk: Path) -> Path:
    return disk
