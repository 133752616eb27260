"""What a file cannot say is taken from markers, versions, the base or the user, and printed; else it is refused."""

import numpy as np
import pytest

from convert.cli import main
from tests.adapters.test_forms import run, same, tensors
from tests.adapters.tiny import CONFIG, E, K, L, N, R, adapter, fused, logical, store, whole
from tests.tiny import checkpoint

BARE = {key: value for key, value in CONFIG.items() if key != "peft_version"}
UNSLOTH = {**CONFIG, "auto_mapping": {"base_model_class": "X", "parent_library": None, "unsloth_fixed": True}}
QWEN = {**CONFIG, "auto_mapping": {"parent_library": "transformers.models.qwen3_moe.modeling_qwen3_moe"}}
BRIDGE_KEYS = [
    *("peft_type", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
    *("lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern", "alpha_pattern", "target_modules", "task_type"),
    *("use_dora", "use_rslora", "target_parameters"),
]
BRIDGE = {**dict.fromkeys(BRIDGE_KEYS), **{key: BARE[key] for key in BRIDGE_KEYS if key in BARE}, "lora_dropout": 0.0}


@pytest.mark.parametrize(
    ("form", "config", "more", "why"),
    [
        ("packed", CONFIG, [], "packing of B by peft_version 0.21.2"),
        ("packed-reversed", {**CONFIG, "peft_version": "0.18.1"}, [], "packing of B by peft_version 0.18.1"),
        ("packed-reversed", CONFIG, [], "roles by shapes"),  # saved again by a later version
        ("packed", BARE, ["--from-writer", "peft"], "packing of B by --from-writer=peft"),
        ("packed", BARE, ["--from-writer", "automodel-0.7"], "by --from-writer=automodel-0.7"),
        ("packed-grouped", UNSLOTH, [], "auto_mapping.unsloth_fixed without lora_B_layout"),
        ("packed", {**UNSLOTH, "lora_B_layout": "rank_major"}, [], "lora_B_layout in adapter_config.json"),
        ("packed-grouped", {**CONFIG, "lora_B_layout": "grouped_by_expert"}, [], "lora_B_layout in adapter_config.json"),
        ("packed-grouped", BARE, ["--from-writer", "unsloth-2026.9.5"], "--from-writer=unsloth-2026.9.5"),
        ("packed", BARE, ["--from-writer", "unsloth-2026.10.1"], "--from-writer=unsloth-2026.10.1"),
        ("packed-reversed-grouped", BRIDGE, [], "the keys of adapter_config.json"),
        ("packed-reversed-grouped", BARE, ["--from-writer", "megatron-bridge"], "--from-writer=megatron-bridge"),
        ("packed", UNSLOTH, ["--from-writer", "peft-0.21"], "--from-writer=peft-0.21"),  # UNSLOTH_MOE_LORA_MERGED=1
    ],
)
def test_what_is_told_is_taken_and_said(form, config, more, why, tmp_path, capsys):
    given = adapter(tmp_path / "in", fused(form), config)
    assert run("--prefuse", given, tmp_path / "out", "--layout", "fused", *more, "--dry-run") == 0
    assert f"form {form}: " in (told := capsys.readouterr().out)
    assert why in told
    assert run("--prefuse", given, tmp_path / "out", "--layout", "fused", *more) == 0
    wanted = {name: array for layer in range(L) for name, array in _stored("fused", layer).items()}
    same({name: array for name, array in tensors(tmp_path / "out").items() if name in wanted}, wanted)


def _stored(form, layer):
    return store(form, layer, logical(seed=layer, units=("gate_up", "down")))


SQUARE = {"gate_up": (np.ones((E, R, 8), "f4"), np.ones((E, 8, R), "f4"))}
"""K = 2N: shapes cannot tell A from B."""


def _lone(**more):
    return {"tensors": store("packed", 0, SQUARE), "target_parameters": ["mlp.experts.gate_up_proj"], **more}


@pytest.mark.parametrize(
    ("made", "more", "words"),
    [
        ({"tensors": fused("packed"), "config": BARE}, [], "--from-writer=peft-0.18, unsloth-2026.9.5"),
        ({"tensors": fused("packed"), "config": BARE}, ["--from-writer", "unsloth"], "its versions pack B in two ways"),
        (
            {"tensors": fused("packed"), "config": BARE},
            ["--from-writer", "nobody-1"],
            "no writer is called 'nobody-1'; known: peft",
        ),
        ({"tensors": fused("packed")}, ["--from-writer", "megatron-bridge"], "A and B have changed places, and the shapes say"),
        ({"tensors": fused("packed")}, ["--from-writer", "peft-0.18", "--family", "qwen3_moe"], "the shapes say the contrary"),
        ({"tensors": fused("packed"), "lora_B_layout": "mixed"}, [], "lora_B_layout is mixed"),
        ({"tensors": fused("packed"), "lora_B_layout": "rank_major"}, ["--from-writer", "unsloth-2026.9.5"], "contradicts"),
        (_lone(), [], "lora_A from lora_B; say which program wrote it"),
        (_lone(), ["--from-writer", "peft-0.18"], "lora_A from lora_B"),
        (_lone(target_parameters=None), ["--from-writer", "automodel-0.7"], "whether this is gate_up_proj or down_proj"),
        ({"tensors": fused("packed")}, ["--split"], "name the model: --family, or --base"),
        ({"tensors": fused("packed")}, ["--family", "inkling", "--layout", "per-expert"], "for inkling sources disagree"),
        (
            {"tensors": fused("packed"), "config": QWEN},
            ["--family", "mixtral"],
            "--family says mixtral, auto_mapping says qwen3_moe",
        ),
        ({"tensors": fused("packed")}, ["--family", "qwen_moe"], "no family is called 'qwen_moe'; nearest: "),
    ],
)
def test_what_nothing_tells_is_refused(made, more, words, tmp_path, capsys):
    given = adapter(tmp_path / "in", **made)
    action = [] if "--split" in more else ["--prefuse"]
    layout = [] if "--split" in more or "--layout" in more else ["--layout", "fused"]
    assert run(*action, *more, *layout, given, tmp_path / "out") == 4
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("version", "family", "form"),
    [
        ("0.17.1", "qwen3_moe", "packed-reversed"),
        ("0.18.1", "gpt_oss", "packed"),
        ("0.18.1", "llama4", "packed"),
        ("0.19.0", "qwen3_moe", "packed-reversed"),
        ("0.19.0", "gpt_oss", "packed-reversed"),
        ("0.19.0", "llama4", "packed"),
        ("0.19.1", "qwen3_moe", "packed"),
        ("0.21.2", "gpt_oss", "packed"),
        ("0.21.2", "llama4", "packed-reversed"),
    ],
)
def test_square_ones_are_read_by_version_and_class(version, family, form, tmp_path, capsys):
    given = adapter(tmp_path / "in", **_lone(), peft_version=version)
    assert run("--prefuse", given, tmp_path / "out", "--layout", "fused", "--family", family, "--dry-run") == 0
    assert f"form {form}: roles by peft_version {version}" in capsys.readouterr().out


def test_with_one_expert_or_rank_1_there_is_one_packing(tmp_path, capsys):
    for name, made in {"one": {"e": 1}, "rank": {"rank": 1}}.items():
        given = adapter(tmp_path / name, fused("packed", beside=False, **made), BARE, r=made.get("rank", R))
        assert run("--prefuse", given, tmp_path / f"{name}-out", "--layout", "fused") == 0
        assert "packing of B by nothing" in capsys.readouterr().out


def _base(path, e=E, k=K, n=N):
    names = {"gate_proj": (n, k), "up_proj": (n, k), "down_proj": (k, n)}
    found = {
        f"model.layers.{layer}.mlp.experts.{expert}.{word}.weight": np.zeros(shape, "u4")
        for layer in range(L)
        for expert in range(e)
        for word, shape in names.items()
    }
    return checkpoint(path, found, {"model_type": "qwen3_moe", "num_experts": e}, extra=False)


def test_the_base_tells_family_and_shapes(tmp_path, capsys):
    lone = {"down": logical(units=("down",))["down"]}
    given = adapter(tmp_path / "in", store("packed-reversed", 0, lone), target_parameters=["mlp.experts.down_proj"])
    more = ["--base", _base(tmp_path / "base")]
    assert run("--prefuse", given, tmp_path / "out", "--layout", "per-expert", *more) == 0
    assert "form packed-reversed: roles by shapes" in capsys.readouterr().out
    same(tensors(tmp_path / "out"), store("per-expert", 0, lone))
    assert run("--verify", given, tmp_path / "out", *more) == 0
    whole_one = adapter(tmp_path / "whole", whole("per-expert"))
    for wrong in ({"e": 4}, {"k": 8}, {"n": 6}):
        [(axis, size)] = wrong.items()
        have = {"e": E, "k": K, "n": N}[axis]
        other = _base(tmp_path / f"base-{axis}", **wrong)
        assert run("--prefuse", whole_one, tmp_path / "no", "--base", other) == 3
        assert f"has {axis} = {have}, and the base {size}" in capsys.readouterr().err


def test_what_is_for_adapters_alone_is_refused_elsewhere(tmp_path, capsys):
    base, given = _base(tmp_path / "base"), adapter(tmp_path / "in", whole("per-expert"))
    assert run("--prefuse", base, tmp_path / "out", "--from-writer", "peft-0.18") == 2
    assert run("--prefuse", given, tmp_path / "out", "--shards", "2") == 2
    assert run("--prefuse", given, tmp_path / "out", "--layout", "per-shard") == 2
    assert "no form of adapters is called 'per-shard'; known: per-expert" in capsys.readouterr().err
    assert run("--verify", given, base) == 2
    assert main(["--to", "orbax", str(given), str(tmp_path / "out")]) == 2
    assert run("--split", given, tmp_path / "out") == 4
