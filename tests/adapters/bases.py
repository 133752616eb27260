"""Tiny bases for adapters to be merged into, and what float64 makes of them; `run` and `merged` alone call the tool."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from convert.cli import main
from tests.adapters.tiny import CONFIG, E, K, L, N, R, logical, store

SCALE = CONFIG["lora_alpha"] / R
BESIDE = {
    "lm_head.weight": (8, K),
    "model.embed_tokens.weight": (8, K),
    **{f"model.layers.{layer}.self_attn.q_proj.weight": (K, K) for layer in range(L)},
    **{f"model.layers.{layer}.self_attn.q_proj.bias": (K,) for layer in range(L)},
    **{f"model.layers.{layer}.mlp.gate.weight": (E, K) for layer in range(L)},
    **{f"model.layers.{layer}.mlp.shared_expert.up_proj.weight": (N, K) for layer in range(L)},
}
WORDS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def weights(dtype, *, whole_numbers=False):
    """Every tensor of a base, experts apart."""
    rng, shapes = np.random.default_rng(5), dict(BESIDE)
    for layer in range(L):
        for e in range(E):
            for word, shape in {"gate_proj": (N, K), "up_proj": (N, K), "down_proj": (K, N)}.items():
                shapes[f"model.layers.{layer}.mlp.experts.{e}.{word}.weight"] = shape
    draw = (lambda shape: rng.integers(-16, 17, shape)) if whole_numbers else rng.standard_normal
    return {name: draw(shape).astype(dtype) for name, shape in shapes.items()}


def base(path, tensors, **config):
    """In two files, so that gate and up lie apart."""
    path.mkdir(parents=True)
    names = [f"model-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    homes = {name: names[at % 2] for at, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: array for name, array in tensors.items() if homes[name] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    config = {"model_type": "qwen3_moe", "num_experts": E, **config}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    (path / "tokenizer.json").write_text("{}")
    return path


def load(path):
    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def run(*arguments):
    return main([*map(str, arguments), "--quiet"])


def merged(given, onto, out, *more):
    code = run("--merge", given, "--base", onto, out, *more)
    return load(out) if code == 0 else code


def pairs(units=("gate", "up", "down"), *, whole_numbers=False):
    """Each layer's A and B; whole numbers have sums without rounding in any type."""
    found = [logical(seed=layer, units=units) for layer in range(L)]
    if whole_numbers:
        found = [{unit: [np.rint(each).clip(-2, 2) for each in ab] for unit, ab in one.items()} for one in found]
    return found


def stored(form, per_layer):
    return {name: array for layer, one in enumerate(per_layer) for name, array in store(form, layer, one).items()}


def delta(ab, scale=SCALE):
    """Scale * B A of all experts in float64: (e, o, i)."""
    a, b = (np.asarray(each, np.float64) for each in ab)
    return scale * np.einsum("eor,eri->eoi", b, a)


def expected(tensors, per_layer, added=None):
    """W + scale * B A in float64, for every tensor; `added` has the factors of the others."""
    found = {name: np.asarray(array, np.float64) for name, array in tensors.items()}
    for layer, one in enumerate(per_layer):
        full = {unit: delta(ab) for unit, ab in one.items()}
        if "gate_up" in full:
            both = full.pop("gate_up")
            full |= {"gate": both[:, :N], "up": both[:, N:]}
        for e in range(E):
            for word, unit in WORDS.items():
                if unit in full:
                    found[f"model.layers.{layer}.mlp.experts.{e}.{word}.weight"] += full[unit][e]
    for name, array in (added or {}).items():
        if ".lora_A." in name:
            b = added[name.replace("lora_A", "lora_B")].astype(np.float64)
            found[name.removeprefix("base_model.model.").replace(".lora_A", "")] += SCALE * b @ array.astype(np.float64)
    return found


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].tobytes() == wanted[name].tobytes(), name
