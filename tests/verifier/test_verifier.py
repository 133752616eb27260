"""The verifier must not be vacuous: every kind of damage is caught, by the level that is there for it, and named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from convert.cli import main
from scripts.make_checkpoint import make_checkpoint

K, N, E = 32, 16, 12  # 2N == K: a transposed matrix has the same shape


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    make_checkpoint(root / "in", family="qwen3_moe", experts=E, embed=K, mlp=N, layers=2, values="normal")
    convert.prefuse(root / "in", root / "fused")
    return root / "in", root / "fused"


@pytest.fixture
def broken(pair, tmp_path) -> Callable[..., Path]:
    """A copy of the fused checkpoint in which one tensor's bits are changed in place."""

    def damage(change: Callable[[Any], None], name: str = "model.layers.1.mlp.experts.wi") -> Path:
        copy = shutil.copytree(pair[1], tmp_path / "broken")
        for path in copy.glob("*.safetensors"):
            size = int.from_bytes(path.read_bytes()[:8], "little")
            header = json.loads(path.read_bytes()[8 : 8 + size])
            if name in header:
                offset = 8 + size + header[name]["data_offsets"][0]
                change(np.memmap(path, np.uint16, "r+", offset, tuple(header[name]["shape"])))
                return copy
        raise LookupError(name)

    return damage


def levels(a: Path, b: Path) -> dict[str, tuple[str, ...]]:
    return {level.name: level.differences for level in convert.verify(a, b).levels if level.differences}


def swap_halves(wi):
    wi[5] = np.concatenate((wi[5, :, N:], wi[5, :, :N]), -1)


def test_the_exact_level_names_the_projection_and_the_place(pair, broken):
    def flip(wi):
        wi[7, 3, N + 2] ^= 1

    found = levels(pair[0], broken(flip))["exact"]
    assert found == (f"layer 1, expert 7, up (wi_1): 1 of {K * N} elements, first at (k, n) = (3, 2)",)


def test_a_flipped_bit_outside_the_experts_is_named(pair, broken):
    def flip(weight):
        weight[0, 0] ^= 1

    found = levels(pair[0], broken(flip, "lm_head.weight"))
    assert found == {"others": ("lm_head.weight: 1 elements differ",)}


def test_a_dropped_layer_is_named(pair, tmp_path):
    make_checkpoint(tmp_path / "short", family="qwen3_moe", experts=E, embed=K, mlp=N, layers=1, values="normal")
    found = levels(pair[1], tmp_path / "short")
    assert found["exact"][0] == "layer 1: only one of the two has this MoE layer"
    assert any("model.layers.1.self_attn" in line for line in found["others"])


def test_another_number_of_experts_is_named(pair, tmp_path):
    make_checkpoint(tmp_path / "few", family="qwen3_moe", experts=E - 1, embed=K, mlp=N, layers=2, values="normal")
    assert "layer 0: wi is BF16 with (E, K, N) (12, 32, 16) in one" in levels(pair[0], tmp_path / "few")["exact"][0]


@pytest.mark.parametrize("layout", ["concat", "transformers"])
def test_equal_checkpoints_are_equal_in_any_layout(pair, tmp_path, layout):
    convert.prefuse(pair[0], tmp_path / "other", layout=layout)
    verdict = convert.verify(tmp_path / "other", pair[1])
    assert verdict.equal, verdict
    names = ["exact", "others", "identity", "gemm", "gradients", "layer", "files", "recorded"]
    assert [level.name for level in verdict.levels] == names
    assert "'e k (g n)'" in verdict.levels[3].covered


LAYOUTS = {
    "vllm": {}, "flashinfer": {}, "interleaved": {}, "gmm-ep": {}, "fused-moe": {},
    "per-shard": {"shards": 4, "align": 3}, "lane": {"shards": 2, "align": 256}, "concat": {},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_run_as_its_kernel_does(pair, tmp_path, layout):
    convert.prefuse(pair[0], tmp_path / "other", layout=layout, **LAYOUTS[layout])
    verdict = convert.verify(pair[0], tmp_path / "other")
    assert verdict.equal, verdict
    assert verdict.levels[3].covered.startswith("grouped GEMM (ragged_dot): 'e g k n' against 'e ")


def test_xla_may_compile_as_it_does_for_users(forks, pair, monkeypatch):
    """For all other tests `tests/conftest.py` says that it shall compile fast."""
    monkeypatch.setenv("XLA_FLAGS", "")
    code = "import sys; from convert.cli import main; sys.exit(main(sys.argv[1:]))"
    done = forks.run(code, "--verify", *pair, "--layers", "1", "--quiet")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^gradients +equal", done.stdout, re.MULTILINE)


def test_what_stands_in_the_padding_is_found(pair, tmp_path):
    convert.prefuse(pair[0], tmp_path / "other", layout="per-shard", shards=4, align=3)
    (path,) = (tmp_path / "other").glob("*.safetensors")
    size = int.from_bytes(path.read_bytes()[:8], "little")
    entry = json.loads(path.read_bytes()[8 : 8 + size])["model.layers.1.mlp.experts.wi"]
    wi = np.memmap(path, np.uint16, "r+", 8 + size + entry["data_offsets"][0], tuple(entry["shape"]))
    wi[5, 3, 5] = 1  # n is 16, so a shard has 4 columns of gate and 2 of padding
    found = levels(pair[0], tmp_path / "other")
    assert list(found) == ["exact"]
    assert "layer 1, expert 5" in found["exact"][0]
    assert "more than zeros behind the first 4 (n)" in found["exact"][0]
    assert main(["--split", str(tmp_path / "other"), str(tmp_path / "back"), "--quiet"]) == 3
    assert not (tmp_path / "back").exists()


def test_the_manifest_notices_a_flipped_bit(pair, broken, capsys):
    assert main(["--verify", str(pair[1]), "--quiet"]) == 0

    def flip(wi):
        wi[0, 0, 0] ^= 0x8000

    assert main(["--verify", str(broken(flip)), "--quiet"]) == 1
    assert "model.layers.1.mlp.experts.wi" in capsys.readouterr().out


def test_exit_codes(pair, broken, tmp_path, capsys):
    assert main(["--verify", *map(str, pair), "--quiet"]) == 0
    assert main(["--verify", str(pair[0]), str(broken(swap_halves)), "--quiet"]) == 1
    assert "expert 5, gate" in capsys.readouterr().out
    assert main(["--verify", str(pair[0]), "--quiet"]) == 3  # no manifest
    assert main(["--verify", str(pair[0]), str(tmp_path / "nothing"), "--quiet"]) == 3
