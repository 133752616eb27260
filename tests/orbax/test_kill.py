"""`kill -9` at any moment of an Orbax conversion leaves the output absent or complete, and the same command goes on."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from convert.orbax import copy as orbax_copy, write as write_orbax
from convert.orbax.keeping import keep as orbax_keep
write_orbax.SYNC = orbax_copy.SYNC = 1 << 20
if sys.argv[3] == "written":
    orbax_keep._is_one = lambda reader, name: True
from convert.cli import main
sys.exit(main(["--prefuse", *sys.argv[1:3], "--quiet"]))
"""


def save(path, layers=12):
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)

    up, down = (8, 128, 256), (8, 256, 128)
    block = {f"layers_{i}": {"moe": {"wi_0": noise(*up), "wi_1": noise(*up), "wo": noise(*down)}} for i in range(layers)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(block))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kept", "written"])
def test_killed_runs_go_on(way, tmp_path):
    save(tmp_path / "in")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "in"), str(tmp_path / "out"), way]
    started = time.monotonic()
    assert not subprocess.run(command, cwd=ROOT, check=False).returncode
    whole = time.monotonic() - started
    shutil.rmtree(tmp_path / "out")
    moments = random.Random(0)
    for _ in range(25):
        process = subprocess.Popen(command, cwd=ROOT)
        time.sleep(moments.uniform(0.3, 1.0) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal
            assert json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
            shutil.rmtree(tmp_path / "out")
    assert not subprocess.run(command, cwd=ROOT, check=False).returncode
    assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal
    assert convert.verify(tmp_path / "out").equal
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).rglob("*") if f.is_file()) for d in ("in", "out")]
    assert sizes[1] < 1.3 * sizes[0], "nothing of the killed runs is left"
