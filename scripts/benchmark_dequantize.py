"""Time `--dequantize bf16`: bytes of bfloat16 that one core computes in a second, for each quantised format.

    python scripts/benchmark_dequantize.py --directory /tmp/bench-dequantize [--other OLD_TREE]

Makes a matrix [2048, 7168] (an expert of Kimi-K2) of random bits in each format, in the page cache, and reads 256 of its rows
as bfloat16 with one thread, again and again, into the same memory. Each round is a process of its own for each tree, in turn.
Prints the best read of all by its CPU seconds, which other programs on the machine change least. With `--other`, another
checkout of this repository runs in the same rounds. With `--experts`, a layer of so many experts in each format is prefused
instead (`--prefuse --dequantize bf16 --jobs 1`): what is printed then are bytes of the output by CPU seconds of the command,
less those of its `--dry-run`, which a checkpoint of hundreds of GB does not notice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
N, K = 2048, 7168
ROWS = 256
READ = """
import json, sys, time
from pathlib import Path
import numpy as np
from layouts.checkpoint import open_checkpoint
from layouts.dequantize import dequantized
reader = dequantized(open_checkpoint(Path(sys.argv[1])))
out = np.zeros((int(sys.argv[2]), reader.tensors["x.weight"].shape[1]), "u2")
reader.read("x.weight", (slice(0, len(out)), slice(None)))  # glibc keeps blocks once one as large was freed, as in a longer run
best, end = 1e9, time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    start = time.process_time()
    reader.read("x.weight", (slice(0, len(out)), slice(None)), lambda shape, dtype: out)
    best = min(best, time.process_time() - start)
print(json.dumps(out.nbytes / best / 1e9))
"""
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def formats() -> Mapping[str, tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Tensors and config of each."""
    rng = np.random.default_rng(0)

    def data(width: int, kind: str = "u1") -> np.ndarray:
        return rng.integers(0, 256, (N, width), dtype="u1").view(kind)

    def floats(shape: tuple[int, ...], kind: Any = BF16) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.01).astype(kind)

    def powers(columns: int) -> np.ndarray:
        return rng.integers(110, 130, (N, columns), dtype="u1")

    def groups(bits: int) -> dict[str, Any]:
        weights = {"num_bits": bits, "group_size": 32}
        return {"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}}

    int4, sizes, one = data(K // 2, "i4"), np.array([N, K], "i8"), np.array(1.5, "f4")
    fp8 = rng.integers(0, 126, (N, K), dtype="u1").view(E4M3)
    scales = rng.integers(8, 100, (N, K // 16), dtype="u1").view(E4M3)
    blocks = {"quantization_config": {"weight_block_size": [128, 128]}}
    return {
        "INT4, groups of 32, BF16": (
            {"weight_packed": int4, "weight_scale": floats((N, K // 32)), "weight_shape": sizes}, groups(4)),
        "INT4, groups of 32, F32": (
            {"weight_packed": int4, "weight_scale": floats((N, K // 32), "f4"), "weight_shape": sizes}, groups(4)),
        "INT4, channels": (
            {"weight_packed": int4, "weight_scale": floats((N, 1)), "weight_shape": sizes}, {}),
        "INT8, channels": ({"weight": data(K, "i1"), "weight_scale": floats((N, 1))}, {}),
        "NVFP4": ({"weight": data(K // 2), "weight_scale": scales, "weight_scale_2": one}, {}),
        "MXFP4": ({"weight_packed": data(K // 2), "weight_scale": powers(K // 32)}, {}),
        "MXFP8": ({"weight": fp8, "weight_scale": powers(K // 32)}, {}),
        "FP8, blocks of 128 x 128": ({"weight": fp8, "weight_scale_inv": floats((N // 128, K // 128), "f4")}, blocks),
        "FP8, channels": ({"weight": fp8, "weight_scale": floats((N, 1))}, {}),
    }  # fmt: skip


def rate(tree: Path, source: Path, seconds: float) -> float:
    """GB/s of bfloat16 that a tree computes from a checkpoint, of one process."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", READ, str(source), str(ROWS), str(seconds)]
    done = subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.PIPE)
    return float(json.loads(done.stdout))


def whole(tree: Path, source: Path, out: Path) -> float:
    """GB/s of bfloat16 that a tree's command writes."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["--quiet", "--prefuse", "--dequantize", "bf16", "--jobs", "1", str(source), str(out)]
    seconds = cpu(tree, words) - cpu(tree, [*words, "--dry-run"])
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return nbytes / seconds / 1e9


def cpu(tree: Path, words: Sequence[str]) -> float:
    """CPU seconds of a tree's command."""
    environment, before = os.environ | {"PYTHONPATH": str(tree)}, os.times()
    subprocess.run([sys.executable, "-m", "convert", *words], env=environment, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    return sum(os.times()[2:4]) - sum(before[2:4])


def layer(tensors: Mapping[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
    """The matrix as gate and up of each of so many experts, and as large a down."""
    found = {"model.layers.0.mlp.gate.weight": np.zeros((experts, K), BF16)}
    turned = {"weight_shape": np.array([K, N], "i8")}
    for e, word in itertools.product(range(experts), ("gate_proj", "up_proj", "down_proj")):
        for part, array in tensors.items():
            down = turned.get(part, np.resize(array, _turned(array.shape)) if array.ndim == 2 else array)
            found[f"model.layers.0.mlp.experts.{e}.{word}.{part}"] = (down if word == "down_proj" else array).copy()
    return found


def _turned(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape for (K, N) of what is (N, K), or has a part of each; of scales of channels there is one for each row."""
    rows, columns = shape
    return (K, 1) if columns == 1 else (rows * K // N, columns * N // K)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--other", type=Path, help="another checkout of this repository, run in turn")
    parser.add_argument("--seconds", type=float, default=2, help="of each round of each tree and format")
    parser.add_argument("--only", default="", help="formats that have this in their names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--experts", type=int, default=0, help="time whole conversions of so many (14: 1.2 GB)")
    options = parser.parse_args()
    trees = [*([options.other.resolve()] if options.other else []), ROOT]
    print(f"| format | {' | '.join(['other', 'this'][-len(trees) :])} | GB/s of bfloat16 from one core |")
    print(f"| --- | {'--- | ' * len(trees)} --- |")
    for number, (name, (tensors, config)) in enumerate(formats().items()):
        if options.only not in name:
            continue
        source, experts = options.directory.resolve() / str(number), options.experts
        source.mkdir(parents=True, exist_ok=True)
        held = layer(tensors, experts) if experts else {f"x.{word}": array for word, array in tensors.items()}
        save_file(held, source / "model.safetensors", {"format": "pt"})
        sizes = {"num_hidden_layers": 1, "num_experts": experts, "hidden_size": K, "moe_intermediate_size": N}
        (source / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"} | sizes | config if experts else config))
        of = partial(whole, out=source.with_name("out")) if experts else partial(rate, seconds=options.seconds)
        rounds = [[of(tree, source) for tree in trees] for _ in range(options.rounds)]
        (source / "model.safetensors").unlink()
        print(f"| {name} | {' | '.join(f'{max(each):.2f}' for each in zip(*rounds, strict=True))} | |", flush=True)


if __name__ == "__main__":
    main()
