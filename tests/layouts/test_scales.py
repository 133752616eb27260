"""Scales of gate and up that differ are told, from the numbers alone, and nothing is changed."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from layouts.matching import scales
from tests.layouts.by_hand import weights
from tests.layouts.by_hand.styles import projections

E, LAYERS = 12, (2, 11)


def checkpoint(path, numbers, word="weight_scale_2", shape=(), code="f4"):
    """FP4-like experts; `numbers` gives the scale of a projection: layer, expert, word -> number."""
    path.mkdir()
    tensors = {}
    for layer in LAYERS:
        at = f"model.layers.{layer}.mlp"
        tensors |= {name: a.astype("u1") for name, a in projections(at, *weights(layer, E, 6, 4)).items()}
        for e in range(E):
            for kind in ("gate", "up", "down"):
                value = np.array(numbers(layer, e, kind), code).reshape(shape)
                tensors[f"{at}.experts.{e}.{kind}_proj.{word}"] = value
    save_file({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_experts": E}))
    return path


def one_apart(layer, e, kind):
    """One pair of 24 differs, by 5 to 4; down is something else altogether."""
    return 100.0 if kind == "down" else 2.5 if (layer, e, kind) == (11, 7, "up") else 2.0


TABLE = [
    (one_apart, "weight_scale_2 of gate and up: 1 of 24 pairs differ, by a factor of up to 1.25; kernels"),
    (lambda layer, e, kind: e + layer, "weight_scale_2 of gate and up: none of 24 pairs differs"),
    (lambda layer, e, kind: {"gate": 4.0, "up": 1.0, "down": 0}[kind], "24 of 24 pairs differ, by a factor of up to 4;"),
    (lambda layer, e, kind: float(kind == "up" and e == 3), "2 of 24 pairs differ, 2 of them zero, negative, infinite or no"),
    (lambda layer, e, kind: np.nan, "none of 24 pairs differs"),
    (lambda layer, e, kind: np.inf, "none of 24 pairs differs"),
    (lambda layer, e, kind: -0.0 if kind == "up" else 0.0, "none of 24 pairs differs"),
    (lambda layer, e, kind: -1.0 if kind == "up" else 1.0, "24 of 24 pairs differ, 24 of them zero, negative, infinite or no"),
    (lambda layer, e, kind: [np.nan, np.inf, 0, -2, 8, 2][e % 6] if kind == "up" else 2.0,
     "20 of 24 pairs differ, by a factor of up to 4, 16 of them zero, negative, infinite or no number on one side; kernels"),
]  # fmt: skip


@pytest.mark.parametrize(("numbers", "said"), TABLE)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["[]", "[1]"])
def test_pairs_that_differ_are_counted(tmp_path, numbers, said, shape):
    source = checkpoint(tmp_path / "in", numbers, shape=shape)
    (line,) = [text for text in convert.plan(source, tmp_path / "out", prefuse=True).remarks if "gate and up" in text]
    assert said in line
    assert line in convert.inspect(source).remarks


@pytest.mark.parametrize("word", ["weight_scale", "input_scale", "weight_global_scale", "qscale_weight", "weight_amax"])
@pytest.mark.parametrize("code", ["f4", "f2"])
def test_every_kind_of_number_is_told_by_its_name(tmp_path, word, code):
    source = checkpoint(tmp_path / "in", one_apart, word, code=code)
    assert f"{word} of gate and up: 1 of 24 pairs" in "\n".join(convert.plan(source, tmp_path / "out", prefuse=True).remarks)


@pytest.mark.parametrize(("code", "four", "one"), [("F8_E8M0", 129, 127), ("F8_E4M3", 0x48, 0x38)])
def test_scales_of_eight_bits_are_numbers_too(tmp_path, code, four, one):
    source = checkpoint(tmp_path / "in", lambda layer, e, kind: four if kind == "gate" else one, "weight_scale", code="u1")
    data = (source / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].replace(b'"dtype":"U8","shape":[],', b'"dtype":"%s","shape":[],' % code.encode())
    (source / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    said = str(convert.plan(source, tmp_path / "out", prefuse=True).remarks)
    assert "weight_scale of gate and up: 24 of 24 pairs differ, by a factor of up to 4;" in said


def test_scales_of_rows_are_no_pairs(tmp_path):
    source = checkpoint(tmp_path / "in", lambda layer, e, kind: [e] * (6 if kind == "down" else 4), "weight_scale", -1)
    assert not [text for text in convert.plan(source, tmp_path / "out", prefuse=True).remarks if "gate and up" in text]


def test_what_is_told_is_never_changed_and_is_told_of_the_output_too(tmp_path):
    source = checkpoint(tmp_path / "in", one_apart)
    convert.prefuse(source, tmp_path / "fused")
    convert.split(tmp_path / "fused", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert "1 of 24 pairs differ, by a factor of up to 1.25" in str(convert.inspect(tmp_path / "fused").remarks)
    assert not convert.plan(tmp_path / "fused", tmp_path / "out", split=True).remarks[1:]


def test_of_many_pairs_some_are_looked_at_and_the_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(scales, "_MOST", 10)
    source = checkpoint(tmp_path / "in", lambda layer, e, kind: {"gate": 4.0, "up": 1.0, "down": 0}[kind])
    (line,) = [text for text in convert.plan(source, tmp_path / "out", prefuse=True).remarks if "gate and up" in text]
    assert "8 of 8 pairs (one in 3 was looked at) differ" in line
