"""Restore a MaxText tree onto simulated devices, written without `--mesh` and with it: bytes read, and seconds.

    python scripts/benchmark_restore.py --mesh fsdp=4,tensor=2 --directory /tmp/bench-restore

Makes a Qwen3-MoE checkpoint (bfloat16, normal values), converts it twice, and lets Orbax restore every array of each tree in a
process of its own, each cut along the mesh as MaxText cuts it. Bytes are what the process asked the system for while it
restored (`rchar` of `/proc/self/io`), as compressed chunks are stored; the input is in the page cache. Rows run in turn, a
first round is thrown away. Prints medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESTORE = """
import json, sys, time, jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
item, sizes, cuts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
mesh = Mesh(np.array(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes))
def rchar():
    return int(open("/proc/self/io").read().split()[1])
with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(item).item_metadata.tree
    def args(path, leaf):
        name = ".".join(str(key.key) for key in path)
        spec = P(*[tuple(axes) or None for axes in cuts[name]])
        return ocp.ArrayRestoreArgs(sharding=NamedSharding(mesh, spec), dtype=leaf.dtype)
    wanted = jax.tree_util.tree_map_with_path(args, metadata)
    begin, started = rchar(), time.monotonic()
    tree = checkpointer.restore(item, restore_args=wanted)
    jax.block_until_ready(tree)
print(json.dumps([rchar() - begin, time.monotonic() - started]))
"""


def cuts(path: Path, mesh: dict[str, int]) -> dict[str, list[list[str]]]:
    """The axes of the mesh along each dimension of each array, as MaxText has them; none where it does not divide."""
    from convert.orbax.mesh import axes_of
    from convert.orbax.origin import Origin
    from convert.planning.planner import Plan

    plan = _plan(path)
    assert isinstance(plan, Plan)
    found = {}
    for target in plan.targets:
        names = [[axis for axis in each if axis in mesh] for each in axes_of(target, plan, Origin())]
        sizes = zip(names, target.spec.shape, strict=True)
        found[target.spec.name] = [each if size % math.prod(mesh[a] for a in each) == 0 else [] for each, size in sizes]
    return found


def _plan(path: Path) -> object:
    import convert

    return convert.plan(path, path.parent / "nothing", prefuse=True, to="orbax")


def main() -> None:
    """Make, convert, restore, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="fsdp=4,tensor=2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/bench-restore"))
    parser.add_argument("--sizes", default="layers=4,experts=16,embed=2048,mlp=768,vocab=32000")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import convert
    from convert.options.values import mesh
    from scripts.make_checkpoint import make_checkpoint

    devices, source = mesh(arguments.mesh), arguments.directory / "in"
    if not source.exists():
        sizes = {name: int(size) for name, _, size in (each.partition("=") for each in arguments.sizes.split(","))}
        make_checkpoint(source, family="qwen3_moe", values="normal", **sizes)
    rows = {"as it is written": None, f"--mesh {arguments.mesh}": devices}
    trees = {name: arguments.directory / f"tree-{at}-{arguments.mesh}" for at, name in enumerate(rows)}
    for name, tree in trees.items():
        if not tree.exists():
            convert.prefuse(source, tree, to="orbax", mesh=rows[name])
    wanted, count = cuts(source, devices), math.prod(devices.values())
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    found: dict[str, list[list[float]]] = {name: [] for name in rows}
    for _ in range(arguments.repeats + 1):
        for name, tree in trees.items():
            words = [str(tree / "0" / "items"), json.dumps(devices), json.dumps(wanted)]
            done = subprocess.run([sys.executable, "-c", RESTORE, *words], env=environment, capture_output=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    stored = {n: sum(f.stat().st_size for f in tree.rglob("*") if f.is_file()) for n, tree in trees.items()}
    for name, runs in found.items():
        nbytes, seconds = (statistics.median(each) for each in zip(*runs[1:], strict=True))
        print(f"{name}: {nbytes / 1e6:.0f} MB read of {stored[name] / 1e6:.0f} MB stored, {seconds:.2f} s")


if __name__ == "__main__":
    main()
