"""A verification stays within `--memory`, also where an expert is as large as that: in a process of its own, by its peak."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.progress import ignore
from convert.verifier.bits.exact import compare_experts
from convert.verifier.bits.logical import Scope, blocks
from convert.verifier.bits.work import Scratch
from layouts.checkpoint import open_checkpoint
from layouts.matching.describe import describe
from scripts.make_checkpoint import make_checkpoint
from tests.layouts.test_hf import QWEN
from tests.tiny import checkpoint, config, tensors

CHILD = """
import sys, convert
verdict = convert.verify(sys.argv[1], sys.argv[2], memory=sys.argv[3], gemm=sys.argv[4] == "gemm", jobs=2)
print({level.name: level.state for level in verdict.levels})
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10)
"""


def check(tmp_path: Path, layout: str, memory: int, gemm: bool, **sizes: int) -> str:
    make_checkpoint(tmp_path / "in", family="mixtral", layers=1, vocab=256, shard=1 << 40, values="normal", **sizes)
    convert.prefuse(tmp_path / "in", tmp_path / "out", layout=layout)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "in"), str(tmp_path / "out"), f"{memory}MiB", "gemm" if gemm else ""]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    states, peak = done.stdout.splitlines()
    assert int(peak) < memory, states
    assert "'exact': 'equal'" in states
    return states


def test_an_expert_that_fits_once_goes_through_gemms_one_side_at_a_time(tmp_path):
    states = check(tmp_path, "concat", 520, True, experts=2, embed=1024, mlp=8192)  # 50 MB an expert
    assert "'gemm': 'equal', 'gradients': 'not run'" in states


@pytest.mark.parametrize("layout", ["concat", "transformers"])
def test_the_bits_of_an_expert_that_memory_does_not_hold_are_compared_in_parts(tmp_path, layout):
    check(tmp_path, layout, 150, False, experts=1, embed=4096, mlp=8192)  # 201 MB, twice


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["concat", "transformers", "per-shard"])
@pytest.mark.parametrize("memory", [2048, 4096, 8192])
def test_experts_of_mixtral(tmp_path, layout, memory):
    check(tmp_path, layout, memory, True, experts=2, embed=4096, mlp=14336)  # 352 MB an expert


@pytest.mark.parametrize("sizes", [{"n": 1 << 15, "k": 2}, {"n": 2, "k": 1 << 15}, {"n": 1 << 9, "k": 1 << 6}], ids=str)
def test_an_expert_is_cut_along_an_axis_that_is_long_enough(sizes, tmp_path, monkeypatch):
    """A header of 3 kB may say rows that no memory holds."""
    reader, most, given = open_checkpoint(checkpoint(tmp_path / "in", tensors(QWEN, **sizes), config(QWEN))), 1 << 16, []
    monkeypatch.setattr(Scratch, "empty", lambda _, shape, dtype: (given.append(np.empty(shape, dtype)), given[-1])[1])
    found = blocks(reader, describe(reader))
    level = compare_experts(found, found, ignore, Scope(), 2 * most)
    assert level.compared == sum(spec.nbytes for name, spec in reader.tensors.items() if ".mlp.experts." in name)
    assert not level.differences
    assert 2 * max(block.nbytes for block in given) <= most
