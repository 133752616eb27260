"""Time what many small tensors cost: NVFP4 experts, each with scales, where names outweigh data.

    python scripts/benchmark_many.py --layers 40 --experts 256 --directory /tmp/bench-many [--other OLD_TREE]

Makes a checkpoint of `layers x experts x 3 projections x 4 tensors` (122,960 tensors, 34 MB) of random bits. Plans, prefuses,
inspects, verifies and splits it, each in a process of its own, and compares the split files with the first ones. Prints CPU
seconds (user and system, which other programs on the machine change less than they change the time), and CPU for a tensor.
With `--other`, another checkout of this repository runs each row as well, in turn with this one.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[1]
K, N, FILES = 32, 16, 8
ROWS = {
    "plan": ["--prefuse", "--dry-run", "{src}", "{out}"],
    "prefuse": ["--prefuse", "{src}", "{out}"],
    "inspect": ["--inspect", "{src}"],
    "of prefused": ["--inspect", "{out}"],
    "verify": ["--verify", "--no-gemm", "{src}", "{out}"],
    "plan of split": ["--split", "--dry-run", "{out}", "{back}"],
    "split": ["--split", "{out}", "{back}"],
}


def make(folder: Path, layers: int, experts: int) -> int:
    """The checkpoint, unless it is there; how many tensors it has."""
    rng = np.random.default_rng(0)
    total = layers * (2 + experts * 12)
    if (folder / "config.json").exists():
        return total
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(FILES):
        found: dict[str, np.ndarray] = {}
        for layer in range(number * layers // FILES, (number + 1) * layers // FILES):
            at = f"model.layers.{layer}"
            found[f"{at}.input_layernorm.weight"] = np.ones(K, ml_dtypes.bfloat16)
            found[f"{at}.mlp.gate.weight"] = np.ones((experts, K), ml_dtypes.bfloat16)
            for e in range(experts):
                for word, (out, into) in {"gate_proj": (N, K), "up_proj": (N, K), "down_proj": (K, N)}.items():
                    name = f"{at}.mlp.experts.{e}.{word}"
                    found[f"{name}.weight"] = rng.integers(0, 256, (out, into // 2), dtype=np.uint8)
                    scales = rng.integers(8, 100, (out, into // 16), dtype=np.uint8)
                    found[f"{name}.weight_scale"] = scales.view(ml_dtypes.float8_e4m3fn)
                    found[f"{name}.weight_scale_2"] = np.array(rng.random(), np.float32)
                    found[f"{name}.input_scale"] = np.array(rng.random(), np.float32)
        save_file(found, folder / f"model-{number + 1:05}-of-{FILES:05}.safetensors", metadata={"format": "pt"})
    words = f'"num_hidden_layers": {layers}, "num_experts": {experts}, "hidden_size": {K}, "moe_intermediate_size": {N}'
    (folder / "config.json").write_text(f'{{"model_type": "qwen3_moe", {words}}}')
    return total


def cpu(tree: Path, words: list[str]) -> float:
    """CPU seconds of one command of a checkout."""
    before = os.times()
    command = [sys.executable, "-m", "convert", "--quiet", *words]
    subprocess.run(command, check=True, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Make the checkpoint, run the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--other", type=Path, help="another checkout, run in turn with this one")
    given = parser.parse_args()
    trees = {"this": ROOT} | ({"other": given.other.resolve()} if given.other else {})
    given.directory = given.directory.resolve()
    source = given.directory / "in"
    total = make(source, given.layers, given.experts)
    seconds = {}
    for row, words in ROWS.items():
        for name, tree in trees.items():
            places = {"src": source, "out": given.directory / f"out-{name}", "back": given.directory / f"back-{name}"}
            if row in ("prefuse", "split"):
                shutil.rmtree(places["out" if row == "prefuse" else "back"], ignore_errors=True)
            seconds[row, name] = cpu(tree, [word.format(**places) for word in words])
    for name in trees:
        for file in source.glob("*.safetensors"):
            assert filecmp.cmp(file, given.directory / f"back-{name}" / file.name, shallow=False), f"{name}: {file.name}"
    print(f"{total:,} tensors; CPU seconds, and microseconds for a tensor")
    for row in ROWS:
        print(
            f"{row:14}", *(f"{name} {seconds[row, name]:7.1f} s {seconds[row, name] / total * 1e6:6.0f} us  " for name in trees)
        )


if __name__ == "__main__":
    main()
