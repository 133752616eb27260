"""Peak memory of safetensors to and from a store stays under the bound of the plan, whatever the size; against a local S3."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.make_checkpoint import make_checkpoint
from tests.commit.test_remote import BUCKET, environment, server  # noqa: F401

pytestmark = pytest.mark.slow
CHILD = """
import sys
from convert.cli import main
code = main(sys.argv[1:])
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""
SIZES = {"family": "mixtral", "experts": 8, "embed": 1024, "mlp": 2048, "vocab": 256}
LIMITS = ["--memory", "400MiB", "--jobs", "2", "--max-shard-size", "100MB"]


def run(*words: object) -> str:
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=300)
    return done.stdout


def peak(*words: object) -> int:
    """Bytes that the command takes, which are no more than its plan says."""
    said = json.loads(run(*words, *LIMITS, "--dry-run", "--json").rpartition("\n")[0].rpartition("\n")[0])
    found = int(run(*words, *LIMITS, "--quiet").split()[-1])
    assert found < said["result"]["peak_bytes"], words
    return found


def test_out_and_in_take_no_more_for_more(tmp_path):
    peaks = []
    for layers in (1, 4):
        source = make_checkpoint(tmp_path / f"in{layers}", layers=layers, shard=100 << 20, **SIZES)  # 101 MB a layer
        with (source / "notes.txt").open("wb") as file:
            file.truncate((layers - 1) * (60 << 20))
        there = f"s3://{BUCKET}/memory/{layers}"
        peaks.append((peak("--prefuse", source, there), peak("--split", there, tmp_path / f"back{layers}")))
    for few, many in zip(*peaks, strict=True):
        assert many < few + (64 << 20), f"{peaks}, where the larger checkpoint has 300 MB more"
