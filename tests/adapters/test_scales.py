"""Scales: what stays the same float, what becomes one by a power of two, what is refused, and what settings say of it."""

import json

import numpy as np
import pytest

from layouts.adapters.settings import Scale
from tests.adapters.test_forms import in_peft, run, tensors
from tests.adapters.tiny import PREFIX, E, R, adapter, fused, logical, store, whole
from tests.tiny import tree

FIRST = f"{PREFIX}.0.mlp.experts"


def deltas(path, expert):
    """Gate, up and down of an expert of layer 0 in a packed file, in float64, by what PEFT computes."""
    found = tensors(path)
    out = []
    for unit, place in (("gate_up", f"{FIRST}.base_layer"), ("down", FIRST)):
        rank, scale = in_peft(path, f"model.layers.0.mlp.experts.{unit}_proj")
        a = found[f"{place}.lora_A.weight"].astype("f8").reshape(E, rank, -1)[expert]
        b = found[f"{place}.lora_B.weight"].astype("f8").reshape(-1, rank, E)[:, :, expert]
        out.append(scale * (b @ a))
    return *np.split(out[0], 2), out[1]


@pytest.mark.parametrize(
    ("settings", "ranks", "wanted"),
    [
        ({}, (R, R), (2, 2, 2)),
        ({"use_rslora": True, "lora_alpha": 5}, (R, R), (5 / 2**0.5,) * 3),
        ({"alpha_pattern": {"up_proj": 8}}, (R, R), (2, 4, 2)),
        ({"alpha_pattern": {r".*\.experts\.1\.down_proj": 1}}, (R, R), (2, 2, 0.5)),
        ({"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 8}}, (R, 4), (2, 2, 2)),
        ({"rank_pattern": {"gate_proj": 3}, "alpha_pattern": {"gate_proj": 6}}, (3, R), (2, 2, 2)),
        ({"alpha_pattern": {"experts.1.gate_proj": 2.5, "experts.1.up_proj": 5, "gate_proj": 2.5, "up_proj": 5}}, (R, R), None),
    ],
)
def test_scales_are_kept(settings, ranks, wanted, tmp_path):
    pairs = logical(rank=ranks[0]) | {"up": logical(rank=ranks[1])["up"], "down": logical()["down"]}
    given = adapter(tmp_path / "in", store("per-expert", 0, pairs), **settings)
    assert run("--prefuse", given, tmp_path / "out") == 0
    wanted = wanted or (1.25, 2.5, 2)
    for found, (a, b), scale in zip(deltas(tmp_path / "out", 1), pairs.values(), wanted, strict=True):
        np.testing.assert_allclose(found, scale * (b[1].astype("f8") @ a[1].astype("f8")), rtol=1e-12)
    assert run("--verify", given, tmp_path / "out") == 0
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    assert run("--verify", given, tmp_path / "back") == 0


def test_rslora_comes_back_to_the_byte(tmp_path):
    given = adapter(tmp_path / "in", whole("per-expert"), use_rslora=True)
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert in_peft(tmp_path / "out", "model.layers.0.mlp.experts.gate_up_proj") == (4 * R, 4 / R**0.5)
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    assert tree(tmp_path / "back")["adapter_model.safetensors"] == tree(given)["adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("settings", "dtype", "words"),
    [
        ({"alpha_pattern": {"up_proj": 6}}, "f4", "their ratio is no power of two"),
        ({"alpha_pattern": {"experts.2.down_proj": 5}}, "f4", "down of expert 2 has scale 2.5"),
        ({"alpha_pattern": {"up_proj": 2**-20}}, "f2", "makes two scales one, would round"),
        (
            {"use_rslora": True, "lora_alpha": 4, "rank_pattern": {"up_proj": 8}, "alpha_pattern": {"up_proj": 8}},
            "f4",
            "no alpha",
        ),
    ],
)
def test_what_would_round_is_refused(settings, dtype, words, tmp_path, capsys):
    pairs = logical(dtype=dtype)
    if "rank_pattern" in settings:
        pairs["up"] = logical(rank=8)["up"]
    given = adapter(tmp_path / "in", store("per-expert", 0, pairs), **settings)
    assert run("--prefuse", given, tmp_path / "out") == 4
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("rslora", [False, True])
def test_a_scale_at_another_rank_is_the_same_float_or_none(rslora):
    for alpha in range(1, 257, 5):
        for rank in range(1, 65):
            for other in (2 * rank, 4 * rank):
                one = Scale(alpha=alpha, rank=rank, rslora=rslora)
                there = one.at(other)
                assert there is None or there.factor == one.factor
                assert there is not None or (rslora and other == 2 * rank)


def test_settings_say_what_the_file_has(tmp_path):
    more = {"rank_pattern": {"q_proj": R, "gate_proj": R}, "alpha_pattern": {r".*\.q_proj": 8}}
    given = adapter(tmp_path / "in", whole("per-expert"), **more, target_modules="all-linear")
    assert run("--prefuse", given, tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.mlp.shared_expert.up_proj", "model.layers.0.self_attn.q_proj"]
    assert config["rank_pattern"] == {r".*\.gate_up_proj": 2 * R, "q_proj": R}
    assert config["lora_dropout"] == 0.0
    assert in_peft(tmp_path / "out", "model.layers.0.self_attn.q_proj") == (R, 4)
    assert run("--verify", given, tmp_path / "out") == 0


def test_patterns_leave_a_module_of_the_same_name_alone(tmp_path):
    found = fused("packed", beside=False)
    dense = f"{PREFIX}.0.mlp.gate_up_proj"
    found |= {f"{dense}.lora_A.weight": np.ones((R, 6), "f4"), f"{dense}.lora_B.weight": np.ones((16, R), "f4")}
    found |= {name.replace(".gate_up_proj.", ".down_proj."): array for name, array in found.items() if dense in name}
    given = adapter(tmp_path / "in", found, r=R, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    out = tmp_path / "out"
    assert run("--prefuse", given, out, "--layout", "per-expert", "--family", "qwen3_moe") == 0
    assert run("--prefuse", out, tmp_path / "again", "--layout", "packed-grouped") == 0
    assert in_peft(tmp_path / "again", "model.layers.0.mlp.gate_up_proj") == (R, 2)
    assert run("--verify", given, tmp_path / "again") == 0
