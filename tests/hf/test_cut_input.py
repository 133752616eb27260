"""An input that is cut while it is read ends the run with its name and exit code 3; it does not kill the process."""

import pytest

from scripts.make_checkpoint import make_checkpoint

CHILD = """
import os, sys
from convert import cli
from layouts.hf import HFReader

real = HFReader.read if sys.argv[1] == "read" else HFReader.extent
path = sys.argv[2]
def cut(self, *rest, **named):
    for file in os.scandir(path):
        if file.name.endswith(".safetensors"):
            os.truncate(file.path, 100_000)
    return real(self, *rest, **named)
setattr(HFReader, sys.argv[1], cut)
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.mark.parametrize("function", ["read", "extent"])
@pytest.mark.parametrize(
    "arguments", [("--prefuse",), ("--prefuse", "--layout", "transformers"), ("--to", "orbax", "--no-scan")]
)
def test_a_conversion(forks, tmp_path, arguments, function):
    source = make_checkpoint(tmp_path / "in", family="qwen3_moe", layers=2, experts=4, embed=128, mlp=128)
    done = forks.run(CHILD, function, source, *arguments, "--quiet", source, tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert ".safetensors: it ends at byte 100,000" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_verification(forks, tmp_path):
    source = make_checkpoint(tmp_path / "in", family="qwen3_moe", layers=2, experts=4, embed=128, mlp=128)
    done = forks.run(CHILD, "read", source, "--verify", "--quiet", "--no-gemm", source, source)
    assert done.returncode == 3, done.stderr
    assert ".safetensors: it ends at byte 100,000" in done.stderr
