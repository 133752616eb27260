"""Loading onto devices, saving from there and fusing there, beside what people write by hand; each way in a process of its own.

    python scripts/benchmark_memory.py --size 5GB [--runs 3] [--only load save fuse] [--folder /tmp]

It makes a checkpoint of Qwen3-MoE's form and runs each way in turn, as often as asked; the page cache is warm. It prints for
each the median of its seconds, and the largest peak of its memory beyond that of a process that has only imported JAX. What
saves or fuses holds the parameters from the start, once; both ways to save end with their last fsync.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
LAYERS, EXPERTS, EMBED = 4, 64, 1024
PLACE = "model.layers.{}.mlp.experts"


def load(path: Path) -> Any:
    """What this tool does."""
    import convert

    return convert.load(path, layout="concat")


def load_on_eight(path: Path) -> Any:
    """The same onto eight devices, cut along experts."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import convert

    mesh = Mesh(np.array(jax.devices()), ("expert",))

    def cut(_: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec("expert") if len(shape) == 3 else PartitionSpec())

    return convert.load(path, layout="concat", sharding=cut)


def by_hand(path: Path) -> Any:
    """`safetensors.flax.load_file`, then transpose, stack and concatenate."""
    import jax.numpy as jnp
    from safetensors.flax import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    for layer in range(LAYERS):
        place = PLACE.format(layer)
        parts = {
            word: jnp.stack([tensors.pop(f"{place}.{e}.{word}.weight").T for e in range(EXPERTS)])
            for word in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{place}.wi"] = jnp.concatenate([parts.pop("gate_proj"), parts.pop("up_proj")], -1)
        tensors[f"{place}.wo"] = parts["down_proj"]
    return tensors


def nothing(_: Path) -> Any:
    """A process that has only imported what the others need."""
    import jax

    import convert  # noqa: F401

    return jax.device_put(0)


def fuse(path: Path) -> Callable[[], Any]:
    """Fuse MaxText's leaves in memory, the old ones given up."""
    import convert

    params = convert.load(path, names="maxtext", scan=False)
    return lambda: convert.prefuse_params(params, donate=True)


def concatenate(path: Path) -> Callable[[], Any]:
    """The same by `jnp.concatenate`, layer by layer."""
    import jax.numpy as jnp

    import convert

    params = convert.load(path, names="maxtext", scan=False)

    def run() -> Any:
        for layer in params["params"]["params"]["decoder"].values():
            if moe := layer.get("moe_block"):
                moe["wi"] = jnp.concatenate([moe.pop("wi_0"), moe.pop("wi_1")], -1)
        return params

    return run


def save(path: Path) -> Callable[[], Any]:
    """Write fused parameters as the files that they were loaded from."""
    import convert

    params = convert.load(path, layout="concat")
    return lambda: convert.save(params, path.with_name("out"), like=path, layout="concat").seconds


def save_file(path: Path) -> Callable[[], Any]:
    """The same by `jnp.split`, transposes and `safetensors.flax.save_file`, file by file."""
    import jax.numpy as jnp
    from safetensors import safe_open
    from safetensors.flax import save_file

    import convert

    params, out = convert.load(path, layout="concat"), path.with_name("out")

    def run() -> Any:
        out.mkdir()
        for layer in range(LAYERS):
            place = PLACE.format(layer)
            parts = dict(zip(("gate_proj", "up_proj"), jnp.split(params.pop(f"{place}.wi"), 2, -1), strict=True))
            for word, array in (parts | {"down_proj": params.pop(f"{place}.wo")}).items():
                params.update({f"{place}.{e}.{word}.weight": array[e].T for e in range(EXPERTS)})
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, "np") as names:
                save_file({name: params.pop(name) for name in names.keys()}, out / file.name)  # noqa: SIM118
            with (out / file.name).open("rb") as written:
                os.fsync(written.fileno())
        return 0

    return run


WAYS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "imports alone": ("", nothing),
    "convert.load, one device": ("load", load),
    "convert.load, eight devices": ("load", load_on_eight),
    "safetensors.flax.load_file + jnp": ("load", by_hand),
    "convert.save": ("save", save),
    "jnp + safetensors.flax.save_file": ("save", save_file),
    "prefuse_params(donate=True)": ("fuse", fuse),
    "jnp.concatenate": ("fuse", concatenate),
}


def measured(way: str, path: Path) -> dict[str, float]:
    """Seconds of one way, and the peak of this process's memory in bytes."""
    import jax

    if "eight" in way:
        jax.config.update("jax_num_cpu_devices", 8)
    jax.block_until_ready(jax.device_put(0))
    kind, call = WAYS[way]
    begun = call(path) if kind in ("save", "fuse") else lambda: call(path)
    started = time.perf_counter()
    jax.block_until_ready(begun())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def run(way: str, path: Path) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Make the checkpoint, run every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2GB", help="of the checkpoint")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["load", "save", "fuse"], default=["load", "save", "fuse"])
    parser.add_argument("--folder", type=Path, default=None, help="where to make it")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measured(arguments.way, arguments.folder)))
        return
    from convert.options.values import in_units, size
    from scripts.make_checkpoint import make_checkpoint

    mlp = max(8, size(arguments.size) // (LAYERS * EXPERTS * 3 * EMBED * 2) // 8 * 8)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "hf"
        make_checkpoint(path, family="qwen3_moe", layers=LAYERS, experts=EXPERTS, embed=EMBED, mlp=mlp, values="normal")
        total = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        found: dict[str, list[dict[str, float]]] = {way: [] for way, (kind, _) in WAYS.items() if kind in ("", *arguments.only)}
        for _ in range(arguments.runs):
            for way, runs in found.items():
                runs.append(run(way, path))
                print(f"{way}: {runs[-1]}", file=sys.stderr, flush=True)
                shutil.rmtree(path.with_name("out"), ignore_errors=True)
    least = min(each["peak"] for each in found["imports alone"])
    shape = f"{LAYERS} layers of {EXPERTS} experts"
    print(f"{in_units(total)} of bfloat16, {shape}, median of {arguments.runs}, {os.cpu_count()} CPUs\n")
    print(f"{'way':34} {'seconds':>8} {'GB/s':>6} {'peak beyond imports':>20} {'of the size':>12}")
    for way, runs in found.items():
        if WAYS[way][0]:
            seconds, peak = statistics.median(each["seconds"] for each in runs), max(each["peak"] for each in runs) - least
            print(f"{way:34} {seconds:8.2f} {total / seconds / 1e9:6.2f} {in_units(peak):>20} {peak / total:12.2f}")


if __name__ == "__main__":
    main()
