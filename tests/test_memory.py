"""Peak resident memory stays under the bound that the plan prints, whatever the size of the checkpoint or of a tensor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from convert.engine.budget import make_budget
from scripts.make_checkpoint import make_checkpoint

CHILD = """
import sys, convert
convert.{action}(sys.argv[1], sys.argv[2], memory=int(sys.argv[3]), jobs=2)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
MEMORY = 256 << 20


@pytest.fixture
def tmp_path(disk):
    """These are large, and written past the page cache."""
    return disk


def peak(action: str, source: Path, out: Path) -> int:
    command = [sys.executable, "-c", CHILD.format(action=action), str(source), str(out), str(MEMORY)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    return int(done.stdout)


def check(tmp_path: Path, **sizes: int) -> int:
    source = make_checkpoint(tmp_path / "in", family="mixtral", shard=1 << 40, **sizes)
    peaks = [peak("prefuse", source, tmp_path / "fused"), peak("split", tmp_path / "fused", tmp_path / "again")]
    assert max(peaks) < make_budget(MEMORY, 2).peak, peaks
    return max(peaks)


def test_many_layers_take_no_more_than_few(tmp_path):
    sizes = {"experts": 8, "embed": 512, "mlp": 512, "vocab": 256}
    peaks = [check(tmp_path / str(layers), layers=layers, **sizes) for layers in (1, 4, 16)]
    assert peaks[2] < peaks[0] + (32 << 20), f"{peaks}, where the largest checkpoint has 200 MB more than the smallest"


def test_one_large_expert_is_streamed(tmp_path):
    check(tmp_path, experts=1, embed=4096, mlp=16384, layers=1, vocab=256)  # 134 MB a projection, 268 MB the fused tensor


@pytest.mark.slow
def test_a_large_embedding_and_a_large_stack_are_streamed(tmp_path):
    check(tmp_path, experts=16, embed=2048, mlp=8192, layers=1, vocab=200_000)  # 0.8 GB each


def test_the_plan_prints_the_bound(tmp_path):
    source = make_checkpoint(tmp_path / "in", family="mixtral")
    command = [sys.executable, "-m", "convert", "--prefuse", "--dry-run", "--memory", "256MiB", str(source), "out"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    assert "memory: at most" in done.stdout
    assert json.loads((source / "config.json").read_text())["model_type"] == "mixtral"
