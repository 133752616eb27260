"""Time MaxText -> Hugging Face and the proof of it, for stacks as they are saved on many devices, beside `cp -r`.

    python scripts/benchmark_across.py --repeats 3 --directory /tmp/bench-across

Makes a Qwen3-MoE checkpoint (16 layers; E = 32, K = 1024, N = 512, bfloat16 normal values; 2.0 GB), converts it to MaxText's
tree, and lets Orbax save that again on 16 simulated devices: its experts cut along the experts, or along the rows (`k` of
`wi_0` and `wi_1`, `k` of `wo`), so that a chunk reaches across all layers. Rows run in turn, each in a process of its own, the
input in the page cache; a first round is thrown away. Prints medians, ratios to `cp`, and peak resident memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmark_orbax import SYNC, table

ROOT = Path(__file__).resolve().parents[1]
SAVE = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
source, out, kind = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), ("d",))
with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(source).item_metadata.tree
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    tree = checkpointer.restore(source, restore_args=numpy)
def place(path, array):
    name = jax.tree_util.keystr(path)
    at = {"wi_0": 2, "wi_1": 2, "wo": 3}.get(name.split("'")[-2], 0) if kind == "rows" else 0
    spec = [("d" if i == at and size % 16 == 0 else None) for i, size in enumerate(array.shape)]
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
    checkpointer.save(out, args=ocp.args.PyTreeSave(jax.tree_util.tree_map_with_path(place, tree)))
"""
SIZES = ("--experts", "32", "--layers", "16", "--embed", "1024", "--mlp", "512", "--vocab", "32000")
KINDS = ("chunks of 1 MiB", "experts", "rows")


def rows() -> dict[str, list[str]]:
    """Name -> shell words; SRC, OUT and HF are filled in."""
    ours = [sys.executable, "-m", "convert", "--quiet"]
    return {
        "cp -r, then fsync": ["sh", "-c", 'cp -r "$SRC" "$OUT" && ' + SYNC],
        "--to hf": [*ours, "--to", "hf", "$SRC", "$OUT"],
        "--to hf --memory 500MiB": [*ours, "--to", "hf", "--memory", "500MiB", "$SRC", "$OUT"],
        "--verify --no-gemm": [*ours, "--verify", "--no-gemm", "$HF", "$SRC"],
        "--verify": [*ours, "--verify", "$HF", "$SRC"],
    }


def make(folder: Path) -> None:
    """The checkpoint, its tree, and the tree as 16 devices save it."""
    if (folder / "rows").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, str(ROOT / "scripts/make_checkpoint.py"), str(folder / "hf"), "--family", "qwen3_moe"]
    subprocess.run([*script, "--size", "bench", "--values", "normal", *SIZES], check=True, stdout=subprocess.DEVNULL)
    tree = folder / KINDS[0].replace(" ", "-")
    command = [sys.executable, "-m", "convert", "--quiet", "--to", "orbax", str(folder / "hf"), str(tree)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=16", "JAX_PLATFORMS": "cpu"}
    for kind in KINDS[1:]:
        save = [sys.executable, "-W", "ignore", "-c", SAVE, str(tree / "0/items"), str(folder / kind / "0/items"), kind]
        subprocess.run(save, check=True, env=environment, stderr=subprocess.DEVNULL)
        (folder / kind / "config.json").write_bytes((tree / "config.json").read_bytes())


def main() -> None:
    """Make the checkpoints, run all rows in turn, print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/convert-benchmark-across"), help="where to work")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.directory.resolve()
    make(folder)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    print(f"{arguments.repeats} repeats, {machine}")
    for kind in KINDS:
        source = folder / kind.replace(" ", "-")
        paths = {"SRC": str(source), "OUT": str(source) + "-out", "HF": str(folder / "hf")}
        table(kind, rows(), paths, arguments.repeats)


if __name__ == "__main__":
    main()
