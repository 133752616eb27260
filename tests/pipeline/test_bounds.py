"""What a process that loads holds and reads: the arrays and the budget, and no bytes but those of its own devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.make_checkpoint import make_checkpoint

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
MEMORY = 300 << 20

PEAK = """
import sys, jax, convert

def high():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

jax.block_until_ready(jax.device_put(0))
convert.load(sys.argv[2], layout="concat")
before = high()
params = convert.load(sys.argv[1], layout="concat", memory=int(sys.argv[3]), jobs=2)
print(high() - before, sum(array.nbytes for array in jax.tree.leaves(params)))
"""

PART = """
import sys, jax, numpy as np, convert
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
mesh, seen = Mesh(np.array(jax.devices()), ("expert",)), []

def cut(name, shape):
    return NamedSharding(mesh, P("expert") if len(shape) == 3 else P())

options = {"layout": "per-shard", "shards": 2} if sys.argv[4] == "per-shard" else {"layout": "concat"}
params = convert.load(sys.argv[1], sharding=cut, progress=seen.append, **options)
whole = convert.load(sys.argv[1], **options)
for name, array in params.items():
    assert len(array.sharding.device_set) == 4 and len(array.addressable_shards) == 2
    for shard in array.addressable_shards:
        assert np.array_equal(shard.data, np.asarray(whole[name])[shard.index]), name
experts = sum(array.nbytes for array in whole.values() if array.ndim == 3)
others = sum(array.nbytes for array in whole.values() if array.ndim != 3)
print(sum(seen), experts // 2 + others)
"""


def start(program, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], env=environment, stdout=-1, stderr=-1, text=True
    )


def ended(child):
    out, said = child.communicate(timeout=300)
    assert child.returncode == 0, said[-3000:]
    return [int(word) for word in out.split()]


def test_the_host_holds_the_arrays_and_the_budget(tmp_path):
    sizes = {"family": "qwen3_moe", "experts": 16, "embed": 1024}
    small = make_checkpoint(tmp_path / "small", layers=1, mlp=8, **sizes)
    large = make_checkpoint(tmp_path / "large", layers=4, mlp=2048, shard=1 << 40, **sizes)
    peak, held = ended(start(PEAK, large, small, MEMORY))
    assert held > 2 * MEMORY
    assert peak < held + MEMORY, f"{(peak - held) >> 20} MiB beside the arrays"


@pytest.mark.parametrize("layout", ["concat", "per-shard"])
def test_each_of_two_processes_reads_its_own_bytes(tmp_path, layout):
    source = make_checkpoint(tmp_path / "hf", family="qwen3_moe", experts=8, values="normal")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    for read, own in map(ended, [start(PART, source, address, index, layout) for index in range(2)]):
        assert read == own
