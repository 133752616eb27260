"""Tiny adapters, built from logical A and B by einops and plain string work: no code of the tool is in them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from einops import rearrange
from safetensors.numpy import save_file

E, K, N, R, L = 3, 6, 4, 2, 2
SHAPES = {"gate": (K, N), "up": (K, N), "gate_up": (K, 2 * N), "down": (N, K)}
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "some/model",
    "task_type": "CAUSAL_LM",
    "r": R,
    "lora_alpha": 4,
    "use_rslora": False,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "peft_version": "0.21.2",
}
PREFIX = "base_model.model.model.layers"
WORDS = {"words": ("gate_proj", "up_proj", "down_proj"), "w123": ("w1", "w3", "w2"), "fused": ("gate_up_proj", "down_proj")}
STORED = {  # what is called lora_A and lora_B: from A as `e r i`, or from B as `e o r`
    "packed": ("e r i -> (e r) i", "e o r -> o (r e)"),
    "packed-grouped": ("e r i -> (e r) i", "e o r -> o (e r)"),
    "packed-reversed": ("e o r -> (e r) o", "e r i -> i (r e)"),
    "packed-reversed-grouped": ("e o r -> (e r) o", "e r i -> i (e r)"),
    "packed-3d": ("e r i -> e r i", "e o r -> o r e"),
    "fused": ("e r i -> e r i", "e o r -> e o r"),
    "stacked": ("e r i -> e r i", "e o r -> e o r"),
    "stacked-w123": ("e r i -> e r i", "e o r -> e o r"),
    "automodel": ("e r i -> e i r", "e o r -> e r o"),
}
APART = ("per-expert", "per-expert-w123", "stacked", "stacked-w123")
FUSED = (*(form for form in STORED if form not in APART), "per-expert-fused")
FORMS = (*APART, *FUSED)


def logical(seed=0, units=("gate", "up", "down"), rank=R, dtype=np.float32, shared=False, e=E):
    """Projection -> A (e, r, i) and B (e, o, r), all elements different."""
    rng, found = np.random.default_rng(seed), {}
    for unit in units:
        i, o = SHAPES[unit]
        found[unit] = [rng.standard_normal(shape).astype(dtype) for shape in ((e, rank, i), (e, o, rank))]
    if shared:
        found["up"][0] = found["gate"][0]
    return found


def store(form, layer, pairs, moe="mlp"):
    """The tensors of one layer in a form: name -> array."""
    found, place = {}, f"{PREFIX}.{layer}.{moe}.experts"
    words = WORDS["w123" if form.endswith("w123") else "words" if form in APART else "fused"]
    order = ("gate", "up", "down") if form in APART else ("gate_up", "down")
    for unit, (a, b) in pairs.items():
        word = words[order.index(unit)]
        if form.startswith("per-expert"):
            for e in range(len(a)):
                found[f"{place}.{e}.{word}.lora_A.weight"], found[f"{place}.{e}.{word}.lora_B.weight"] = a[e], b[e]
            continue
        if form.startswith("packed"):
            word = "base_layer" if unit == "gate_up" and "down" in pairs else None
        for side, rule in zip("AB", STORED[form], strict=True):
            array = a if rule.startswith("e r i") else b
            name = f"{place}.{word}.lora_{side}.weight" if word else f"{place}.lora_{side}.weight"
            if form == "automodel":
                name = f"{place}.lora_{'down' if unit == 'down' else 'gate_and_up'}_{side}"
            found[name] = rearrange(array, rule)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def others(dtype=np.float32):
    rng = np.random.default_rng(9)
    return {
        f"{PREFIX}.0.self_attn.q_proj.lora_A.weight": rng.standard_normal((R, K)).astype(dtype),
        f"{PREFIX}.0.self_attn.q_proj.lora_B.weight": rng.standard_normal((K, R)).astype(dtype),
        f"{PREFIX}.0.mlp.shared_expert.up_proj.lora_A.weight": rng.standard_normal((R, K)).astype(dtype),
        f"{PREFIX}.0.mlp.shared_expert.up_proj.lora_B.weight": rng.standard_normal((N, R)).astype(dtype),
    }


def adapter(path: Path, tensors, config=None, **more) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    given = {**(CONFIG if config is None else config), **more}
    (path / "adapter_config.json").write_text(json.dumps(given, indent=2))
    (path / "README.md").write_text("about")
    return path


def whole(form, *, layers=L, beside=True, **made):
    """All tensors of an adapter in a form that keeps gate and up apart."""
    found = {}
    for layer in range(layers):
        found |= store(form, layer, logical(seed=layer, **made))
    return found | (others() if beside else {})


def fused(form, *, layers=L, beside=True, **made):
    """The same for the fused ones: of rank R, not block diagonal."""
    return whole(form, layers=layers, beside=beside, units=("gate_up", "down"), **made)


BF16 = ml_dtypes.bfloat16
