"""Kill -9 at any system call that changes the disk: the output is absent or complete, and the same command finishes it."""

import os
import shutil
from pathlib import Path

import pytest

import convert
from scripts.make_checkpoint import make_checkpoint

CHILD = """
import os, signal, sys
point, left = int(sys.argv[1]), [int(sys.argv[1])]
def wrap(real):
    def call(*arguments, **keywords):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return call
for name in ("posix_fallocate", "pwrite", "copy_file_range", "fsync", "rename", "mkdir", "unlink", "open"):
    setattr(os, name, wrap(getattr(os, name)))
from convert.engine import direct
from convert.cli import main
direct.LEAST = direct.PAGE  # so that these small blocks go past the page cache, too
sys.exit(main([sys.argv[2], sys.argv[3], sys.argv[4], "--quiet", "--jobs", "2"]))
"""


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    root = tmp_path_factory.mktemp("case")
    source = make_checkpoint(root / "in", family="qwen3_moe", experts=3, layers=1, shard=60_000)
    convert.prefuse(source, root / "out")
    return source, contents(source), contents(root / "out")


def check(forks, points: range, case, tmp_path: Path) -> None:
    source, before, wanted = case
    killed = 0
    for point in points:
        out = tmp_path / f"out{point}"
        code = forks.run(CHILD, point, "--prefuse", source, out).returncode
        if out.exists():
            assert contents(out) == wanted, point
        killed += code == -9
        if code == -9 and not out.exists():
            again = forks.run(CHILD, 0, "--prefuse", source, out).returncode
            assert again == 0, point
        assert contents(out) == wanted, point
        assert os.listdir(tmp_path) == [out.name] or killed, point
        for leftover in tmp_path.iterdir():
            shutil.rmtree(leftover)
    assert killed > len(points) // 2
    assert contents(source) == before


def test_killed_at_some_steps(forks, case, tmp_path):
    check(forks, range(1, 90, 12), case, tmp_path)


@pytest.mark.slow
def test_killed_at_every_step(forks, case, tmp_path):
    check(forks, range(1, 120), case, tmp_path)
