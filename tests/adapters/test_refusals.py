"""Bad input is one clear error with its exit code, and no output; names and settings are anybody's."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.cli import main
from tests.adapters.test_forms import run, same, tensors
from tests.adapters.tiny import CONFIG, PREFIX, E, K, N, R, adapter, fused, others, whole
from tests.tiny import tree

ONE = f"{PREFIX}.1.mlp.experts.2.up_proj.lora_B.weight"
PACKED = f"{PREFIX}.1.mlp.experts.lora_B.weight"


def _without(name):
    return {key: array for key, array in whole("per-expert").items() if name not in key}


def named(infix):
    return {name.replace(".weight", f".{infix}.weight"): array for name, array in whole("per-expert").items()}


@pytest.mark.parametrize(
    ("found", "config", "code", "words"),
    [
        (_without(ONE), {}, 3, "has no whole up adapter for expert 2 of 0..2"),
        ({n: a for n, a in _without(ONE).items() if ".up_proj.lora_B" not in n}, {}, 3, "has no partner lora_B"),
        (whole("per-expert") | {ONE: np.zeros((N, 3), "f4")}, {}, 3, "does not fit rank 2"),
        (whole("per-expert") | {ONE: np.zeros((N + 1, R), "f4")}, {}, 3, "has o = 5, others have 4"),
        (whole("per-expert") | {ONE: np.zeros((N, R), "f2")}, {}, 3, "different element types"),
        (_without(".1.mlp.experts.2."), {}, 3, "2 in base_model.model.model.layers.1.mlp.experts, 3 in base_model.model"),
        (whole("per-expert") | {ONE.replace("lora_B.weight", "bias"): np.zeros(N, "f4")}, {}, 4, "no place for it; merge"),
        (whole("per-expert") | {ONE.replace("lora_B", "base_layer"): np.zeros((N, K), "f4")}, {}, 4, "no place for it; merge"),
        (whole("per-expert") | {ONE.replace("weight", "bias"): np.zeros(N, "f4")}, {}, 4, "lora_B.bias, a bias of B, which no"),
        (named("default") | named("other"), {}, 3, "it holds several adapters: default, other; save each by itself"),
        (
            whole("per-expert") | {f"{PREFIX}.1.mlp.experts.lora_down_A": np.zeros((E, N, R), "f4")},
            {},
            4,
            "several forms (per-expert, automodel)",
        ),
        (whole("per-expert") | {ONE: np.zeros(0, "f4")}, {}, 4, "empty or flat as ZeRO-3 leaves it"),
        (whole("per-expert") | {ONE.replace("up_proj", "zip_proj"): np.zeros((N, R), "f4")}, {}, 4, "in no form that is known"),
        (
            whole("per-expert") | {ONE.replace("lora_B.weight", "lora_magnitude_vector"): np.zeros(N, "f4")},
            {},
            4,
            "the norms of DoRA",
        ),
        (whole("per-expert") | fused("packed", beside=False), {}, 4, "in several forms (per-expert, packed)"),
        (others(), {}, 4, "no LoRA on experts found here"),
        (fused("packed") | {PACKED: np.zeros((K + 1, R * E), "f4")}, {}, 3, "those of no gate, up and down projection"),
        ({n: a for n, a in fused("packed").items() if ".1.mlp.experts.lora" not in n}, {}, 3, "others one of them alone"),
        (whole("per-expert"), {"r": None}, 3, "the rank r is None"),
        (whole("per-expert"), {"r": 10**9}, 3, "the rank r is"),
        (whole("per-expert"), {"lora_alpha": None}, 3, "the alpha lora_alpha is None"),
        (whole("per-expert"), {"lora_alpha": True}, 3, "the alpha lora_alpha is True"),
        (whole("per-expert"), {"rank_pattern": []}, 0, ""),
        (whole("per-expert"), {"rank_pattern": [1]}, 3, "rank_pattern should be an object"),
        (whole("per-expert"), {"rank_pattern": {"up_proj": 4}}, 3, "does not fit rank 4"),
        (whole("per-expert"), {"alpha_pattern": {"(a+)+$": 4}}, 4, "holds more than words, dots"),
        (whole("per-expert"), {"alpha_pattern": {".*.*.*.*x": 4}}, 4, "holds more than words, dots"),
        (whole("per-expert"), {"alpha_pattern": {"(up": 4}}, 4, "cannot be read"),
        (whole("per-expert"), {"use_dora": True}, 4, "DoRA"),
        (whole("per-expert"), {"init_lora_weights": "pissa"}, 4, "alters the base when it is loaded"),
        (whole("per-expert"), {"init_lora_weights": ["x"]}, 4, "alters the base when it is loaded"),
        (whole("per-expert"), {"peft_type": "IA3"}, 4, "only LORA adapters have A and B"),
        (whole("per-expert"), {"use_rslora": 1}, 3, "use_rslora should be true or false"),
    ],
)
def test_one_error_with_its_code(found, config, code, words, tmp_path, capsys):
    given = adapter(tmp_path / "in", found, **config)
    before = tree(given)
    assert run("--prefuse", given, tmp_path / "out", "--layout", "fused") == code
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == (1 if code else 0)
    assert tree(given) == before
    assert (tmp_path / "out").exists() is (code == 0)


@pytest.mark.parametrize(
    "record",
    [
        "no json",
        "[]",
        '{"layout": ["packed"], "from": {}, "family": 3}',
        '{"layout": "packed", "from": "../x", "gate_up": [1]}',
        '{"layout": "packed-reversed", "from": "per-expert"}',
        '{"gate_up": {"base_model.model.model.layers.0.mlp": {"how": "block diagonal", "rank": -3}}, "turns": "x"}',
    ],
)
def test_a_record_is_anybodys(record, tmp_path, capsys):
    """It is refused or refuted, or the bits decide."""
    given = adapter(tmp_path / "in", fused("packed"))
    save_file(fused("packed"), given / "adapter_model.safetensors", {"moe_layout": record})
    status = run("--prefuse", given, tmp_path / "out", "--layout", "stacked", "--family", "qwen3_moe")
    assert status in (0, 3, 4)
    if status == 0:
        assert tensors(tmp_path / "out")[f"{PREFIX}.0.mlp.experts.gate_proj.lora_A.weight"].shape == (E, R, K)


def test_settings_that_a_manifest_remembers_are_only_taken_if_they_say_the_same(tmp_path):
    given = adapter(tmp_path / "in", whole("per-expert"))
    assert run("--prefuse", given, tmp_path / "out") == 0
    path = tmp_path / "out" / "convert_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["original"]["texts"]["adapter_config.json"] = json.dumps({**CONFIG, "lora_alpha": 64})
    path.write_text(json.dumps(manifest))
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert run("--verify", given, tmp_path / "back") == 0


def test_files_of_a_pickle_without_settings_and_of_a_model_beside_it(tmp_path, capsys):
    given = adapter(tmp_path / "in", whole("per-expert"))
    (given / "adapter_model.safetensors").rename(given / "adapter_model.bin")
    assert run("--prefuse", given, tmp_path / "out") == 3
    assert "a pickle, which is not opened" in capsys.readouterr().err
    bare = adapter(tmp_path / "bare", whole("per-expert"))
    (bare / "adapter_config.json").unlink()
    assert run("--prefuse", bare, tmp_path / "out") == 3
    assert "nothing tells the scale" in capsys.readouterr().err
    assert run("--prefuse", bare, bare / "out") == 5
    model = adapter(tmp_path / "model", whole("per-expert"))
    save_file({"lm_head.weight": np.ones((2, 2), "f4")}, model / "model.safetensors")
    assert run("--prefuse", model, tmp_path / "out") == 4
    assert "adapter" not in capsys.readouterr().err.replace(str(model), "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapters.safetensors", "an adapter of mlx-lm"),
        ("0000100_adapters.safetensors", "an adapter of mlx-lm"),
        ("adapter_model-00001-of-00002.safetensors", "a part of an adapter"),
        ("__0_0.distcp", "a torch.distributed.checkpoint"),
    ],
)
def test_files_of_other_adapters_are_called_what_they_are(name, words, tmp_path, capsys):
    given = adapter(tmp_path / "in", whole("per-expert"))
    (given / "adapter_model.safetensors").rename(given / name)
    for action in ("--prefuse", "--split"):
        assert run(action, given, tmp_path / "out") == 3
        assert words in capsys.readouterr().err


def test_a_bias_of_lora_b_beside_experts_keeps_its_name(tmp_path):
    """It is no adapter called bias."""
    bias = {f"{PREFIX}.0.self_attn.q_proj.lora_B.bias": np.arange(K, dtype="f4")}
    given = adapter(tmp_path / "in", whole("per-expert") | bias)
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert bias.keys() <= tensors(tmp_path / "out").keys()


@pytest.mark.parametrize("infix", [".default", ".my-adapter"])
def test_names_of_dumps_are_those_of_peft(infix, tmp_path):
    found = {n.replace(".weight", f"{infix}.weight").replace("model.layers", "_orig_mod.model.layers"): a
             for n, a in whole("per-expert").items()}  # fmt: skip
    given = adapter(tmp_path / "in", found)
    assert run("--prefuse", given, tmp_path / "out") == 0
    plain = adapter(tmp_path / "plain", whole("per-expert"))
    assert run("--prefuse", plain, tmp_path / "other") == 0
    same(tensors(tmp_path / "out"), tensors(tmp_path / "other"))
    assert run("--split", tmp_path / "out", tmp_path / "back") == 0
    same(tensors(tmp_path / "back"), whole("per-expert"))


@pytest.mark.parametrize("left", ["all", "no file"])
def test_a_full_memory_is_said_and_an_interrupted_run_goes_on(tmp_path, capsys, monkeypatch, left):
    given = adapter(tmp_path / "in", whole("per-expert"))
    for words in ((), ("--dry-run",)):
        assert run("--prefuse", given, tmp_path / "out", "--memory", "1k", *words) == 2
    assert "a block of experts takes" in capsys.readouterr().err
    real, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    assert run("--prefuse", given, tmp_path / "out") == 6
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    (journal,) = tmp_path.glob("out.partial-*/.convert_journal")
    names = {name for line in journal.read_text().splitlines()[1:] for name in json.loads(line)}
    journal.write_text(journal.read_text() + '{"source:x": "0"}\n')  # no tensor of the output
    if left == "no file":
        (journal.parent / "new" / "adapter_model.safetensors").unlink()
    assert run("--prefuse", given, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert (f"resumed: {len(names)} tensors" in out) if left == "all" else ("resumed" not in out)
    assert run("--verify", tmp_path / "out") == 0
    assert run("--verify", given, tmp_path / "out") == 0
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_pattern_for_each_module_is_found_at_once(tmp_path):
    """18,000 names are looked up by their ends; by regular expressions it would be 300 million matches."""
    from layouts.adapters.patterns import Patterns

    names = [f"model.layers.{layer}.mlp.experts.{e}.{word}_proj" for layer in range(48) for e in range(128) for word in "gud"]
    found = Patterns.of({**dict.fromkeys(names, 2), r".*\.gate": 3}, "here")
    assert len(found.others) == 1
    assert all(found.get(f"base.{name}", 1) == 2 and found.get(f"{name}.more", 1) == 1 for name in names)
    assert found.get("model.layers.0.mlp.gate", 1) == 3


def test_sides_shared_by_all_experts_are_read(tmp_path):
    found = whole("stacked", beside=False)
    shared = {name: array[:1] if ("down" in name) == name.endswith("B.weight") else array for name, array in found.items()}
    given = adapter(tmp_path / "in", shared)
    assert run("--prefuse", given, tmp_path / "out", "--layout", "per-expert") == 0
    wanted = tensors(tmp_path / "out")
    for e in range(E):
        name = f"{PREFIX}.0.mlp.experts.{e}.gate_proj.lora_A.weight"
        assert np.array_equal(wanted[name], found[f"{PREFIX}.0.mlp.experts.gate_proj.lora_A.weight"][0])
    assert run("--verify", given, tmp_path / "out") == 0
    assert main(["--prefuse", str(given), str(tmp_path / "dry"), "--dry-run"]) == 0


def test_experts_of_two_kinds_are_not_packed_as_one(tmp_path, capsys):
    """ERNIE 4.5 VL numbers those for text and those for images through, and an adapter does not say where the second begins."""
    given = adapter(tmp_path / "in", whole("per-expert"))
    assert run("--prefuse", given, tmp_path / "out", "--family", "ernie4_5_vl_moe") == 4
    assert "experts of two kinds, numbered through; adapters on them are not converted" in capsys.readouterr().err
