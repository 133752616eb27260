"""Every form to every other: the tensors that einops makes, the scales that PEFT reads, and the way back to the byte."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.cli import main
from layouts.adapters.forms import FORMS
from tests.adapters import tiny
from tests.adapters.tiny import APART, FUSED, L, R, adapter, fused, logical, others, store, whole
from tests.tiny import tree


def run(*arguments):
    return main([*map(str, arguments), "--quiet"])


def tensors(path):
    return load_file(path / "adapter_model.safetensors")


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name].dtype, found[name].shape) == (wanted[name].dtype, wanted[name].shape), name
        assert found[name].tobytes() == wanted[name].tobytes(), name


def in_peft(path, module):
    """Rank and scale of a module, as PEFT 0.21 finds them."""
    config = json.loads((path / "adapter_config.json").read_text())

    def of(patterns, default):
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = of(config["rank_pattern"], config["r"])
    return rank, of(config["alpha_pattern"], config["lora_alpha"]) / (rank**0.5 if config["use_rslora"] else rank)


def as_one(pairs, *, shared):
    """Gate and up as one projection, by hand."""
    (a0, b0), (a1, b1) = pairs["gate"], pairs["up"]
    if shared:
        return {"gate_up": (a0, np.concatenate((b0, b1), 1)), "down": pairs["down"]}
    none = np.zeros_like(b0)
    b = np.concatenate((np.concatenate((b0, none), 2), np.concatenate((none, b1), 2)), 1)
    return {"gate_up": (np.concatenate((a0, a1), 1), b), "down": pairs["down"]}


def test_the_table_of_the_tests_is_that_of_the_tool():
    assert set(tiny.FORMS) == set(FORMS)


@pytest.mark.parametrize(
    ("source", "target"), [*(("per-expert", target) for target in FUSED), *((source, "packed") for source in APART[1:])]
)
def test_apart_to_fused_and_back(source, target, tmp_path):
    shared = target in ("packed", "fused")
    given = adapter(tmp_path / "in", whole(source, shared=shared))
    before = tree(given)
    assert run("--prefuse", given, tmp_path / "out", "--layout", target) == 0
    wanted = others()
    for layer in range(L):
        wanted |= store(target, layer, as_one(logical(seed=layer, shared=shared), shared=shared))
    same(tensors(tmp_path / "out"), wanted)
    place = "model.layers.1.mlp.experts." + ("2." if "per-expert" in target else "")
    assert in_peft(tmp_path / "out", f"{place}gate_up_proj") == (R if shared else 2 * R, 2)
    assert in_peft(tmp_path / "out", f"{place}down_proj") == (R, 2)
    assert run("--verify", given, tmp_path / "out") == 0
    assert run("--verify", tmp_path / "out") == 0
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    back = tree(tmp_path / "back")
    assert back.pop("convert_manifest.json")
    assert back == before
    assert tree(given) == before


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *(("packed", target) for target in (*APART, *FUSED)),
        *((source, target) for source in ("packed-reversed-grouped", "packed-3d") for target in ("per-expert", "packed")),
        ("per-expert-fused", "stacked"),
    ],
)
def test_fused_to_any_other(source, target, tmp_path, capsys):
    """Of a trained fused adapter both halves keep the whole A, and joined again it is the same."""
    given = adapter(tmp_path / "in", fused(source))
    more = ["--family", "qwen3_moe", *(["--from-writer", "megatron-bridge"] if source.endswith("grouped") else [])]
    if target == source:
        assert run("--prefuse", given, tmp_path / "out", "--layout", target, *more) == 4
        return
    assert run("--prefuse", given, tmp_path / "out", "--layout", target, *more) == 0
    wanted = others()
    for layer in range(L):
        pairs = logical(seed=layer, units=("gate_up", "down"))
        a, b = pairs["gate_up"]
        half = {"gate": (a, b[:, : tiny.N]), "up": (a, b[:, tiny.N :]), "down": pairs["down"]}
        wanted |= store(target, layer, half if target in APART else pairs)
    same(tensors(tmp_path / "out"), wanted)
    if target not in APART:
        assert run("--verify", given, tmp_path / "out", *more) == (0 if len(more) == 2 else 4)
    assert run("--prefuse", tmp_path / "out", tmp_path / "again", "--layout", source) == 0
    same(tensors(tmp_path / "again"), tensors(given))
    assert in_peft(tmp_path / "again", "model.layers.0.mlp.experts.0.gate_up_proj") == (R, 2)


def test_gate_and_up_take_turns_in_gpt_oss(tmp_path):
    given = adapter(tmp_path / "in", whole("per-expert"))
    assert run("--prefuse", given, tmp_path / "out", "--family", "gpt_oss") == 0
    wanted = others()
    for layer in range(L):
        pairs = as_one(logical(seed=layer), shared=False)
        a, b = pairs["gate_up"]
        turns = np.stack((b[:, : tiny.N], b[:, tiny.N :]), 2).reshape(b.shape)
        wanted |= store("packed", layer, {**pairs, "gate_up": (a, turns)})
    same(tensors(tmp_path / "out"), wanted)
    assert run("--verify", given, tmp_path / "out") == 0
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    same(tensors(tmp_path / "back"), tensors(given))


@pytest.mark.parametrize("unit", ["gate", "up"])
def test_one_of_gate_and_up_alone_gets_rows_of_zeros(unit, tmp_path):
    given = adapter(tmp_path / "in", whole("per-expert", units=(unit, "down")))
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert run("--verify", given, tmp_path / "out") == 0
    found = tensors(tmp_path / "out")[f"{tiny.PREFIX}.0.mlp.experts.base_layer.lora_B.weight"]
    assert not found[tiny.N :].any() if unit == "gate" else not found[: tiny.N].any()
    assert in_peft(tmp_path / "out", "model.layers.0.mlp.experts.gate_up_proj") == (R, 2)


def test_bfloat16_keeps_every_bit_and_a_file_that_was_there_is_looked_at(tmp_path, capsys):
    given = adapter(tmp_path / "in", whole("per-expert", dtype=tiny.BF16))
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert "nothing to do" in capsys.readouterr().out
    file = tmp_path / "out" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run("--prefuse", given, tmp_path / "out") == 5
    assert run("--verify", tmp_path / "out") == 1
    assert run("--prefuse", given, tmp_path / "out", "--overwrite") == 0
    assert run("--verify", tmp_path / "out") == 0


@pytest.mark.parametrize("moved", [False, True])
def test_mixtral_has_its_own_words_and_transformers_5_others(moved, tmp_path):
    found = {}
    for layer in range(L):
        found |= store("per-expert-w123", layer, logical(seed=layer), moe="block_sparse_moe")
        gate = f"{tiny.PREFIX}.{layer}.block_sparse_moe.gate"
        found |= {f"{gate}.lora_A.weight": np.ones((R, tiny.K), "f4"), f"{gate}.lora_B.weight": np.ones((tiny.E, R), "f4")}
    given = adapter(tmp_path / "in", found, target_modules=["w1", "w2", "w3", "gate"])
    assert run("--prefuse", given, tmp_path / "out", *(["--family", "mixtral"] if moved else [])) == 0
    assert all(".mlp." in name for name in tensors(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    assert run("--verify", given, tmp_path / "out") == 0
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    assert tree(tmp_path / "back")["adapter_model.safetensors"] == tree(given)["adapter_model.safetensors"]


def test_what_this_tool_split_is_an_original_as_well(tmp_path):
    given = adapter(tmp_path / "in", fused("packed"))
    assert run("--split", given, tmp_path / "split", "--family", "qwen3_moe") == 0
    assert run("--prefuse", tmp_path / "split", tmp_path / "out") == 0
    same(tensors(tmp_path / "out"), tensors(given))
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "split" / name).read_bytes()
    assert all(run("--verify", tmp_path / name) == 0 for name in ("split", "out", "back"))
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
