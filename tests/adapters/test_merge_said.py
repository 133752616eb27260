"""Merging: what stays as it is, what is recorded, and what is refused."""

import ml_dtypes
import numpy as np
import pytest

import convert
from tests.adapters import tiny
from tests.adapters.bases import base, merged, pairs, run, stored, weights
from tests.adapters.tiny import BF16, E, K, L, R, adapter, logical, others, store, whole
from tests.tiny import tree


def test_zero_updates_keep_the_bits(tmp_path):
    tensors, ab = weights(np.float32), pairs()
    name = "model.layers.0.mlp.experts.0.gate_proj.weight"
    tensors[name].view("u4")[0, :2] = [0x80000000, 0x7FA12345]  # -0.0, a signalling NaN
    for one in ab:
        one["gate"][1][:] = 0
    found = merged(adapter(tmp_path / "in", stored("per-expert", ab)), base(tmp_path / "base", tensors), tmp_path / "out")
    assert found[name].tobytes() == tensors[name].tobytes()
    assert found[name.replace("gate", "up")].tobytes() != tensors[name.replace("gate", "up")].tobytes()


def test_workers_and_strips_change_no_byte_and_all_is_recorded(tmp_path, capsys, monkeypatch):
    onto, given = base(tmp_path / "base", weights(BF16)), adapter(tmp_path / "in", whole("packed", units=("gate_up", "down")))
    before = tree(onto), tree(given)
    assert run("--merge", given, tmp_path / "out", "--base", onto, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "computed, not only moved: W + scale * (B @ A) in float32" in told
    assert "model.layers.*.mlp.experts.*.gate_proj.weight  BF16 (4, 6)  x6  + 2 * B A of rank 2" in told
    assert not (tmp_path / "out").exists()
    merged(given, onto, tmp_path / "out", "--jobs", "1")
    assert "note: form packed: roles by shapes; packing of B by peft_version 0.21.2" in capsys.readouterr().out
    monkeypatch.setattr("convert.engine.budget.STRIP", 8)
    monkeypatch.setattr("layouts.adapters.merging.product._PART", 3)
    with pytest.raises(convert.UsageError, match=r"layout= is not for convert\.merge"):
        convert.plan(given, tmp_path / "no", merge=True, base=str(onto), layout="vllm")
    convert.merge(given, tmp_path / "again", base=str(onto), jobs=3)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {*before[0], "convert_manifest.json"}
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (onto / name).read_bytes()
    assert run("--verify", tmp_path / "out") == 0
    assert run("--merge", given, tmp_path / "out", "--base", onto) == 0
    assert "nothing to do" in capsys.readouterr().out
    other = adapter(tmp_path / "other", whole("packed", units=("gate_up", "down"), layers=1))
    assert run("--merge", other, tmp_path / "out", "--base", onto) == 5
    assert (tree(onto), tree(given)) == before


DORA = {f"{tiny.PREFIX}.0.self_attn.q_proj.lora_magnitude_vector": np.ones(K, "f4")}
LONE = {f"{tiny.PREFIX}.0.self_attn.q_proj.lora_A.weight": np.ones((R, K), "f4")}
NOBODY = {name.replace("q_proj", "z_proj"): each for name, each in others().items()}
WIDE = {name: np.ones((R, K + 2) if "lora_A" in name else (K, R), "f4") for name in others() if "q_proj" in name}
MORE_RANK = {name: np.ones((R + 1, K) if "lora_A" in name else (K, R + 1), "f4") for name in others() if "q_proj" in name}
HUGE = {name: np.full(each.shape, 300, "f4") for name, each in whole("per-expert").items() if "experts." in name}
TIED = {f"{tiny.PREFIX[:-7]}.embed_tokens.weight": np.ones((8, K), "f4")}
RESIZED = {"base_model.model.lm_head.weight": np.ones((9, K), "f4")}
DOUBLE = {name: each.astype("f8") for name, each in others().items()}


@pytest.mark.parametrize(
    ("tensors", "settings", "code", "words"),
    [
        (whole("per-expert"), {"use_dora": True}, 4, "use_dora is set"),
        (others() | DORA, {}, 4, "lora_magnitude_vector is no A and no B"),
        (LONE, {}, 3, "has no partner lora_B.weight"),
        (NOBODY, {}, 4, "has no model.layers.0.self_attn.z_proj.weight"),
        (WIDE, {}, 3, "is for model.layers.0.self_attn.q_proj.weight of shape (6, 8), which in"),
        (MORE_RANK, {}, 3, "is no matrix of rank 2, which adapter_config.json says of it"),
        (whole("per-expert", layers=L + 1), {}, 4, f"has no model.layers.{L}.mlp.experts, for which the adapter has weights"),
        (whole("per-expert", e=E + 1), {}, 3, "e = 4, and the base 3"),
        (HUGE, {"lora_alpha": 64}, 4, "some weights are beyond what F16 holds"),
        (RESIZED, {}, 3, "is for lm_head.weight of shape (9, 6)"),
        (DOUBLE, {}, 4, "shared_expert.up_proj.weight is F64; F32, BF16, F16 are merged, no others"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, settings, code, words, tmp_path, capsys):
    onto, given = base(tmp_path / "base", weights(np.float16)), adapter(tmp_path / "in", tensors, **settings)
    assert merged(given, onto, tmp_path / "out") == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "config", "code", "words"),
    [
        ({"model.layers.0.self_attn.q_proj.weight": "f8"}, {}, 4, "is F64, and weights are merged in F32, BF16, F16 only"),
        ({"model.layers.1.mlp.experts.1.up_proj.weight": "i1"}, {}, 4, "experts of one layer must be alike"),
        ({}, {"tie_word_embeddings": True}, 0, ""),
    ],
)
def test_bases_that_cannot_be_merged_into(changed, config, code, words, tmp_path, capsys):
    tensors = weights(np.float32)
    tensors |= {name: tensors[name].astype(dtype) for name, dtype in changed.items()}
    onto = base(tmp_path / "base", tensors, **config)
    found = merged(adapter(tmp_path / "in", whole("per-expert")), onto, tmp_path / "out")
    assert (found if code else 0) == code
    assert words in capsys.readouterr().err


def test_each_layer_has_its_own_sizes(tmp_path, capsys):
    """Layer 1 has half the columns; an adapter of the size of layer 0 is not taken for gate and up of it."""
    tensors = {
        name: array[:2] if "down" not in name and ".1.mlp.experts" in name else array for name, array in weights(BF16).items()
    }
    tensors |= {name: array[:, :2] for name, array in tensors.items() if "down" in name and ".1.mlp.experts" in name}
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    onto = base(tmp_path / "base", tensors)
    for name, units in (("gate", ("gate",)), ("fused", ("gate_up", "down"))):
        form = "per-expert" if name == "gate" else "packed"
        given = adapter(tmp_path / name, store(form, 1, logical(units=units)))
        assert merged(given, onto, tmp_path / "out") == 3
        assert "6 in and 2 out; is it an adapter of another model?" in capsys.readouterr().err


def test_quantised_and_tied_bases_and_the_wrong_words(tmp_path, capsys):
    tensors = weights(np.float32)
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = np.ones((1, 1), "f4")
    quantised = base(tmp_path / "fp8", tensors, quantization_config={"weight_block_size": [128, 128]})
    assert merged(adapter(tmp_path / "fp8-in", whole("per-expert")), quantised, tmp_path / "out") == 4
    assert "is F8_E4M3, and weights are merged in F32, BF16, F16 only; dequantise the base first" in capsys.readouterr().err
    assert run("--merge", adapter(tmp_path / "beside", others()), tmp_path / "beside-out", "--base", quantised) == 0
    tensors = {name: each for name, each in weights(np.float32).items() if name != "lm_head.weight"}
    onto, given = base(tmp_path / "base", tensors), adapter(tmp_path / "in", whole("per-expert"))
    assert merged(adapter(tmp_path / "tied", TIED), onto, tmp_path / "out") == 4
    assert "its embeddings are its head as well" in capsys.readouterr().err
    for words, code, told in (
        (["--merge", given, tmp_path / "out"], 2, "the adapter is for: --base CKPT"),
        (["--merge", onto, tmp_path / "out", "--base", onto], 2, "is no LoRA adapter"),
        (["--merge", tmp_path / "none", tmp_path / "out", "--base", onto], 3, "no such directory"),
        (["--merge", given, tmp_path / "out", "--base", given], 4, "is the base, in the format LoRA adapter"),
        (["--merge", given, tmp_path / "out", "--base", onto, "--layout", "vllm"], 2, "--layout is for"),
        (["--merge", given, "--base", onto, onto, "--overwrite"], 5, "must not contain one another"),
        (["--merge", given, "--base", onto, given, "--overwrite"], 5, "must not contain one another"),
        (["--merge", given, tmp_path / "out", "--base", onto, "--memory", "64MiB"], 2, "too little"),
    ):
        assert run(*words) == code, words
        assert told in capsys.readouterr().err
