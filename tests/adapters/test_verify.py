"""Each mutant is caught by its level, with layer, expert and projection; what cannot be told is said."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.adapters.test_forms import run, same, tensors
from tests.adapters.tiny import PREFIX, E, K, N, R, adapter, fused, logical, store, whole

ROOT = Path(__file__).parents[2]
PLACE = f"{PREFIX}.1.mlp.experts"
A0, B0, A1, B1 = (f"{PLACE}.{inner}lora_{side}.weight" for inner in ("base_layer.", "") for side in "AB")


def _swapped_experts(found):
    columns = np.arange(R * E).reshape(R, E)[:, [1, 0, 2]].reshape(-1)
    return {B1: found[B1][:, columns]}


def _regrouped(found):
    return {B0: found[B0].reshape(2 * N, R, E).transpose(0, 2, 1).reshape(2 * N, -1)}


def _reversed(found):
    a, b = found[A1].reshape(E, R, N), found[B1].reshape(K, R, E).transpose(2, 0, 1)
    return {A1: a[::-1].reshape(E * R, N), B1: b.transpose(1, 2, 0).reshape(K, -1)}


def _exchanged(found):
    return {B0: np.concatenate((found[B0][N:], found[B0][:N]))}


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (_swapped_experts, {}, "mlp.experts, expert 0, down: 24 of 24 elements of delta W differ"),
        (_regrouped, {}, "mlp.experts, expert 0, gate: "),
        (_reversed, {}, "expert 0, down"),
        (_exchanged, {}, "expert 2, up: "),
        (lambda found: {B0: found[B0] * np.float32(1 + 2**-23)}, {}, "expert 1, gate: "),
        (lambda found: {}, {"alpha_pattern": {"gate_up_proj": 4 * 2**0.5}}, "expert 0, gate: "),
        (lambda found: {}, {"lora_alpha": 8}, "self_attn.q_proj.lora_A.weight has scale 2 and 4"),
        (
            lambda found: dict.fromkeys(n for n in found if "shared_expert" in n),
            {},
            "shared_expert.up_proj.lora_A.weight is only in",
        ),
        (
            lambda found: {f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": np.zeros((K, R), "f4")},
            {},
            "q_proj.lora_B.weight differs",
        ),
        (lambda found: dict.fromkeys((A0, B0, A1, B1)), {}, "only in the first"),
        (lambda found: {}, {"base_model_name_or_path": "another"}, "base_model_name_or_path is 'some/model' and 'another'"),
    ],
)
@pytest.mark.parametrize("source", ["packed", "per-expert"])
def test_mutants_are_caught(source, change, config, words, tmp_path, capsys):
    found = fused("packed")
    one = found
    if source == "per-expert":
        one = {name: array for name, array in found.items() if ".mlp.experts." not in name}
        for layer in range(2):
            pairs = logical(seed=layer, units=("gate_up", "down"))
            a, b = pairs["gate_up"]
            one |= store("per-expert", layer, {"gate": (a, b[:, :N]), "up": (a, b[:, N:]), "down": pairs["down"]})
    given = adapter(tmp_path / "in", one)
    changed = {name: np.ascontiguousarray(array) for name, array in {**found, **change(found)}.items() if array is not None}
    other = adapter(tmp_path / "other", changed, **config)
    assert run("--verify", given, other, "--family", "qwen3_moe") == 1
    assert words in capsys.readouterr().out


FILES = {
    "a side file": (lambda folder: (folder / "tokenizer.json").write_text("{} "), "tokenizer.json differs"),
    "one more": (lambda folder: (folder / "vocab.txt").write_text("a"), "vocab.txt is only in "),
    "one less": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is only in "),
    "the card": (lambda folder: (folder / "README.md").write_text("# Another"), "README.md differs"),
    "metadata": (lambda folder: _say(folder / "adapter_model.safetensors", rank="8"), "__metadata__: rank is absent in one"),
    "the manifest": (lambda folder: _forge(folder / "convert_manifest.json"), "convert_manifest.json is not what was written"),
}


def _say(path, **words):
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    header["__metadata__"] = header.get("__metadata__", {}) | words
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + path.read_bytes()[8 + size :])


def _forge(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"input": "another"}))


def test_what_stands_beside_two_adapters_is_compared(tmp_path, capsys):
    given = adapter(tmp_path / "in", fused("packed"))
    (given / "tokenizer.json").write_text("{}")
    (given / "README.md").write_text("# Mine")
    assert run("--split", given, tmp_path / "out", "--family", "qwen3_moe") == 0
    assert run("--verify", given, tmp_path / "out", "--family", "qwen3_moe") == 0
    assert "1 side files by their digests" in " ".join(capsys.readouterr().out.split())
    for name, (edit, words) in FILES.items():
        other = shutil.copytree(tmp_path / "out", tmp_path / name)
        edit(other)
        assert run("--verify", given, other, "--family", "qwen3_moe") == 1, name
        assert words in " ".join(capsys.readouterr().out.split()), name


def test_other_factors_of_the_same_product_are_equal_by_delta_alone(tmp_path, capsys):
    given = adapter(tmp_path / "in", whole("per-expert"))
    turned = {
        name: np.ascontiguousarray(array[::-1] if name.endswith("A.weight") else array[:, ::-1])
        for name, array in whole("per-expert").items()
        if ".mlp.experts." in name
    }
    other = adapter(tmp_path / "other", whole("per-expert") | turned)
    assert run("--verify", given, other) == 0
    assert "exact     not run    (18 projections have other factors" in capsys.readouterr().out


def test_an_untrained_adapter_proves_nothing(tmp_path, capsys):
    zeros = {n: np.zeros_like(a) if n.endswith("B.weight") else a for n, a in whole("per-expert", beside=False).items()}
    given = adapter(tmp_path / "in", zeros)
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert run("--verify", given, tmp_path / "out") == 1
    assert "INCOMPLETE (not run: delta" in capsys.readouterr().out
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    same(tensors(tmp_path / "back"), zeros)
    bare = adapter(tmp_path / "bare", fused("packed", beside=False) | {
        name: np.zeros_like(array) for name, array in fused("packed", beside=False).items() if name.endswith("B.weight")
    })  # fmt: skip
    assert run("--split", bare, tmp_path / "whole", "--family", "qwen3_moe") == 0
    assert tensors(tmp_path / "whole")[f"{PLACE}.0.gate_proj.lora_A.weight"].shape == (R, K)


def test_nan_and_negative_zero_keep_their_bits(tmp_path):
    found = whole("per-expert", beside=False)
    name = f"{PLACE}.1.up_proj.lora_A.weight"
    found[name] = found[name].copy()
    found[name].view("u4")[0, :3] = (0x7FC01234, 0x80000000, 0xFF800000)
    given = adapter(tmp_path / "in", found)
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert run("--verify", given, tmp_path / "out") == 0
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    same(tensors(tmp_path / "back"), found)


CHILD = """
import sys, convert
verdict = convert.verify(*sys.argv[1:3], family="qwen3_moe", memory="192MiB")
print([level.state for level in verdict.levels[:2]], verdict.outcome, verdict.levels[1].differences)
print(next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_bounds_the_products_that_are_compared(tmp_path):
    """delta W of one expert is 75 MB in float64, and several of these were held; what differs is in the last strip of it."""
    rng, size = np.random.default_rng(0), 3072
    shapes = {"A": (R, size), "B": (size, R)}
    one = {
        f"{PLACE}.0.{word}_proj.lora_{side}.weight": rng.standard_normal(shape).astype("f4")
        for word in ("gate", "up", "down")
        for side, shape in shapes.items()
    }
    scales = {"up_proj.lora_A": 2, "up_proj.lora_B": np.float32(0.5)}
    other = {name: each * next((scales[key] for key in scales if key in name), 1) for name, each in one.items()}
    other[f"{PLACE}.0.up_proj.lora_B.weight"][-1] *= 3
    paths = [str(adapter(tmp_path / name, found)) for name, found in (("one", one), ("other", other))]
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    said, peak = done.stdout.splitlines()
    assert int(peak) < 192 << 20
    assert f"expert 0, up: {size} of {size * size} elements of delta W differ, first [{size - 1}, 0]: " in said


def test_too_little_memory_is_said(tmp_path, capsys):
    given = adapter(tmp_path / "in", whole("per-expert"))
    assert run("--verify", given, given, "--memory", "100MiB") == 2
    assert "--memory=100MiB is too little: to compare these adapters takes 105 MiB" in capsys.readouterr().err
    assert run("--verify", given, given, "--memory", "105MiB") == 0
