"""Time Orbax -> Orbax beside `cp -r` of the same bytes, and beside plain Orbax: restore, concatenate, save.

    python scripts/benchmark_orbax.py --layers 4 --repeats 3 --directory /tmp/bench-orbax

Makes a Qwen3-MoE-like tree as MaxText saves it (scanned; E = 64, K = 2048, N = 768, bfloat16 normal values; 0.6 GB a layer) in
four stores: sharded over 16 devices as MaxText's converter shards by default, the same with a directory for each array in
place of a database, as one chunk for each leaf, and sharded without compression. Each row runs in a process of its own, all
rows in turn, finds its input in the page cache, and ends with its output on the disk (fsync); a first round is thrown away.
Prints medians, ratios to `cp`, and peak resident memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmark import warm

ROOT = Path(__file__).resolve().parents[1]
MAKE = """
import sys, numpy as np, ml_dtypes, jax, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
out, kind, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
E, K, N = 64, 2048, 768
rng = np.random.default_rng(0)
mesh = Mesh(np.array(jax.devices()), ("expert",))
def weights(*shape):
    array = np.empty(shape, ml_dtypes.bfloat16)
    for part in array:
        part[...] = (rng.standard_normal(part.shape, np.float32) / 50).astype(array.dtype)
    if kind == "one chunk":
        return array
    return jax.device_put(array, NamedSharding(mesh, P("expert" if shape[0] % 16 == 0 else None)))
L = layers
moe = {name: weights(E, L, K, N) for name in ("wi_0", "wi_1")} | {"wo": weights(E, L, N, K)}
moe["gate"] = {"kernel": weights(K, L, E)}
attention = {name: {"kernel": weights(K, L, K)} for name in ("query", "out")}
tree = {"params": {"params": {"decoder": {"layers": {"moe_block": moe, "self_attention": attention}}}}, "step": 7}
database = kind != "directories"
handler = ocp.PyTreeCheckpointHandler(use_ocdbt=database, use_zarr3=database, use_compression=kind != "not compressed")
with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(out, args=ocp.args.PyTreeSave(tree))
"""
SYNC = 'find "$OUT" -type f -exec sync {} +'
PLAIN = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
source, out = sys.argv[1:]
with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(source).item_metadata.tree
    numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    tree = checkpointer.restore(source, restore_args=numpy)
    moe = tree["params"]["params"]["decoder"]["layers"]["moe_block"]
    moe["wi"] = np.concatenate((moe.pop("wi_0"), moe.pop("wi_1")), -1)
with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)) as checkpointer:
    checkpointer.save(out, args=ocp.args.PyTreeSave(tree))
"""
KINDS = ("16 shards", "directories", "one chunk", "not compressed")


def rows(kind: str, no_peers: bool) -> dict[str, list[str]]:
    """Name -> shell words; SRC, OUT and FUSED (what the second row has made) are filled in."""
    ours = [sys.executable, "-m", "convert", "--quiet"]
    found = {
        "cp -r, then fsync": ["sh", "-c", 'cp -r "$SRC" "$OUT" && ' + SYNC],
        "--prefuse": [*ours, "--prefuse", "$SRC", "$FUSED"],
        "--prefuse --memory 300MiB": [*ours, "--prefuse", "--memory", "300MiB", "$SRC", "$OUT"],
        "--split": [*ours, "--split", "$FUSED", "$OUT"],
    }
    if kind == "one chunk":
        found["--prefuse --keep-chunks"] = [*ours, "--prefuse", "--keep-chunks", "$SRC", "$OUT"]
    plain = f'{sys.executable} -W ignore -c "$PLAIN" "$SRC" "$OUT" && {SYNC}'
    return found if no_peers else found | {"Orbax: restore, concatenate, save": ["sh", "-c", plain]}


def measure(command: list[str], paths: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak resident MB of one run."""
    words = [paths.get(word.removeprefix("$"), word) if word.startswith("$") else word for word in command]
    target = paths["FUSED"] if "$FUSED" in command and "--prefuse" in command else paths["OUT"]
    shutil.rmtree(target, ignore_errors=True)
    warm(Path(paths["FUSED" if "--split" in command else "SRC"]))
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env={**os.environ, **paths})
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(words)} failed:\n{process.stderr.read().decode() if process.stderr else ''}")
    shutil.rmtree(paths["OUT"], ignore_errors=True)
    return seconds, usage.ru_maxrss / 1000


def main() -> None:
    """Make the checkpoints, run all rows in turn, print a table for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/convert-benchmark-orbax"), help="where to work")
    parser.add_argument("--layers", type=int, default=4, help="MoE layers of 0.6 GB each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS, help="stores (default: all)")
    parser.add_argument("--no-peers", action="store_true", help="only cp and this tool")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    print(f"{arguments.repeats} repeats, {machine}")
    for kind in arguments.kinds:
        _one(kind, arguments)


def _one(kind: str, arguments: argparse.Namespace) -> None:
    source = arguments.directory.resolve() / kind.replace(" ", "-")
    if not source.exists():
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=16", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-W", "ignore", "-c", MAKE, str(source), kind, str(arguments.layers)]
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    nbytes = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    paths = {"SRC": str(source), "OUT": str(source) + "-out", "FUSED": str(source) + "-fused", "PLAIN": PLAIN}
    table(f"{kind}: {nbytes / 1e9:.2f} GB on the disk", rows(kind, arguments.no_peers), paths, arguments.repeats)


def table(title: str, commands: dict[str, list[str]], paths: dict[str, str], repeats: int) -> None:
    """Run all rows in turn, a first round for nothing, and print medians beside the first row."""
    times: dict[str, list[tuple[float, float]]] = {}
    for repeat in range(repeats + 1):
        for name, command in commands.items():
            result = measure(command, paths)
            if repeat:
                times.setdefault(name, []).append(result)
    base = statistics.median(seconds for seconds, _ in times[next(iter(commands))])
    print(f"\n{title}\n\n| what | seconds (median) | relative to cp | peak RSS |\n| --- | --- | --- | --- |")
    for name, found in times.items():
        seconds, peak = statistics.median(s for s, _ in found), max(m for _, m in found)
        print(f"| {name} | {seconds:.2f} | {seconds / base:.2f} | {peak:,.0f} MB |", flush=True)


if __name__ == "__main__":
    main()
