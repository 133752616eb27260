"""Merging into a base: against float64 in NumPy, and the same bits in whatever layouts."""

import json

import numpy as np
import pytest

from layouts.tables.targets import TARGETS
from tests.adapters import tiny
from tests.adapters.bases import SCALE, base, delta, expected, load, merged, pairs, run, same, stored, weights
from tests.adapters.tiny import APART, BF16, E, K, L, N, R, adapter, others, whole
from tests.tiny import tree


@pytest.mark.parametrize("form", tiny.FORMS)
def test_every_form_to_the_last_bit_where_nothing_has_to_be_rounded(form, tmp_path):
    tensors = weights(BF16, whole_numbers=True)
    ab = pairs(("gate", "up", "down") if form in APART else ("gate_up", "down"), whole_numbers=True)
    more = others()
    given = adapter(tmp_path / "in", stored(form, ab) | {name: np.rint(each) for name, each in more.items()})
    writer = ["--from-writer", {True: "megatron-bridge", False: "unsloth-2026.9.5"}["reversed" in form]]
    onto = base(tmp_path / "base", tensors)
    found = merged(given, onto, tmp_path / "out", *(writer if form.endswith("grouped") else []))
    wanted = expected(tensors, ab, {name: np.rint(each) for name, each in more.items()})
    same(found, {name: array.astype(BF16) for name, array in wanted.items()})
    assert all(np.array_equal(array, array.astype(BF16).astype(float)) for array in wanted.values())
    untouched = "model.layers.1.self_attn.q_proj.weight"
    assert found[untouched].tobytes() == tensors[untouched].tobytes()


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_random_numbers_are_rounded_once(dtype, tmp_path):
    tensors, ab = weights(dtype), pairs()
    found = merged(
        adapter(tmp_path / "in", stored("per-expert", ab) | others()), base(tmp_path / "base", tensors), tmp_path / "out"
    )
    wanted = expected(tensors, ab, others())
    for name, exact in wanted.items():
        size = np.abs(exact) + 64  # no term of the sums is above it
        slack = size * (R + 3) * 2.0**-24
        ulp = np.abs(np.spacing(exact.astype(dtype)).astype(float)) / 2 if dtype != np.float32 else 0
        assert (np.abs(found[name].astype(float) - exact) <= slack + ulp).all(), name
        assert found[name].dtype == dtype


def test_the_rule_is_that_of_the_manifest(tmp_path):
    """Products of float32, each rounded, added in the order of the ranks: as written down, one element at a time."""
    tensors, ab = weights(BF16), pairs()
    found = merged(adapter(tmp_path / "in", stored("packed", _one(ab))), base(tmp_path / "base", tensors), tmp_path / "out")
    name, (a, b) = "model.layers.1.mlp.experts.2.down_proj.weight", ab[1]["down"]
    for o in range(K):
        for i in range(N):
            update = np.float32(0)
            for j in range(R):
                update = np.float32(update + np.float32(b[2, o, j] * a[2, j, i]))
            total = np.float32(tensors[name][o, i]) + np.float32(SCALE) * update
            assert found[name][o, i].tobytes() == total.astype(BF16).tobytes()
    record = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
    assert record["action"] == "merge"
    assert record["computed"].endswith("packing of B by peft_version 0.21.2 in adapter_config.json")
    assert record["computed"].startswith("W + scale * (B @ A) in float32, ranks added in their order, rounded once")


def _one(per_layer):
    """Gate and up as one, block diagonal."""
    found = []
    for one in per_layer:
        (a0, b0), (a1, b1) = one["gate"], one["up"]
        none = np.zeros_like(b0)
        b = np.concatenate((np.concatenate((b0, none), 2), np.concatenate((none, b1), 2)), 1)
        found.append({"gate_up": (np.concatenate((a0, a1), 1)[:, :R], b[..., :R]), "down": one["down"]})
    return found


@pytest.mark.parametrize("layout", sorted(TARGETS.keys() - {"glu32", "glu64", "glu", "cutedsl", "lane"}))
def test_merging_commutes_with_fusing_and_splitting(layout, tmp_path):
    given = adapter(tmp_path / "in", whole("per-expert"))
    onto = base(tmp_path / "base", weights(BF16))
    merged(given, onto, tmp_path / "merged")
    more = ["--shards", "2", "--align", "8"] if layout == "per-shard" else []
    assert run("--prefuse", onto, tmp_path / "fused", "--layout", layout, *more) == 0
    assert run("--prefuse", tmp_path / "merged", tmp_path / "one", "--layout", layout, *more) == 0
    merged(given, tmp_path / "fused", tmp_path / "other")
    for name in ("one", "other"):
        assert run("--verify", tmp_path / name) == 0
    same(load(tmp_path / "other"), load(tmp_path / "one"))
    assert (tmp_path / "other" / "config.json").read_bytes() == (tmp_path / "one" / "config.json").read_bytes()
    assert run("--split", tmp_path / "other", tmp_path / "back") == 0
    back, wanted = tree(tmp_path / "back"), tree(tmp_path / "merged")
    assert back.pop("convert_manifest.json") != wanted.pop("convert_manifest.json")
    assert back == wanted


@pytest.mark.parametrize(
    ("n", "layout", "more"),
    [(256, "glu32", []), (256, "lane", ["--shards", "2"]), (300, "lane", ["--shards", "2", "--align", "256"])],
)
def test_chunks_of_columns(n, layout, more, tmp_path):
    """Wide enough for chunks of 128 columns in two shards, and cut into many strips."""
    k = 3
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (n, k), "up_proj": (n, k), "down_proj": (k, n)}
    tensors, update = {}, {}
    for e in range(2):
        for word, (o, i) in shapes.items():
            name = f"model.layers.0.mlp.experts.{e}.{word}"
            tensors[f"{name}.weight"] = rng.standard_normal((o, i)).astype("f4")
            update[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((R, i)).astype("f4")
            update[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((o, R)).astype("f4")
    onto, given = base(tmp_path / "base", tensors, num_experts=2), adapter(tmp_path / "in", update)
    found = merged(given, onto, tmp_path / "merged")
    assert all((found[name] != tensors[name]).all() for name in tensors)
    assert run("--prefuse", onto, tmp_path / "fused", "--layout", layout, *more) == 0
    merged(given, tmp_path / "fused", tmp_path / "other")
    assert run("--split", tmp_path / "other", tmp_path / "back") == 0
    same(load(tmp_path / "back"), found)


def test_gate_and_up_take_turns_in_gpt_oss(tmp_path):
    """The base and packed adapters of gpt-oss interleave the two; separate adapters do not."""
    ab, rng = pairs(whole_numbers=True), np.random.default_rng(0)
    tensors, wanted = {}, {}
    for layer in range(L):
        place = f"model.layers.{layer}.mlp.experts"
        w = rng.integers(-9, 9, (E, K, 2 * N)).astype(BF16)
        down = rng.integers(-9, 9, (E, N, K)).astype(BF16)
        tensors |= {f"{place}.gate_up_proj": w, f"{place}.down_proj": down}
        exact = w.astype(float)
        for at, unit in enumerate(("gate", "up")):
            exact[:, :, at::2] += delta(ab[layer][unit]).transpose(0, 2, 1)
        wanted[f"{place}.gate_up_proj"] = exact.astype(BF16)
        wanted[f"{place}.down_proj"] = (down.astype(float) + delta(ab[layer]["down"]).transpose(0, 2, 1)).astype(BF16)
    onto = base(tmp_path / "base", tensors, model_type="gpt_oss", num_local_experts=E, num_experts=None)
    given = adapter(tmp_path / "in", stored("per-expert", ab))
    same(merged(given, onto, tmp_path / "out"), wanted)
    assert run("--prefuse", given, tmp_path / "packed", "--family", "gpt_oss") == 0
    same(merged(tmp_path / "packed", onto, tmp_path / "again"), wanted)


def test_what_stands_beside_experts(tmp_path):
    """Attention, embeddings, whole tensors and biases; prefixes of a model without its head."""
    tensors, rng = weights(BF16, whole_numbers=True), np.random.default_rng(1)
    a, b = (rng.integers(-2, 3, shape).astype("f4") for shape in ((R, 8), (K, R)))
    head = rng.standard_normal((8, K)).astype("f4")
    bias = rng.standard_normal(K).astype("f4")
    prefix = "base_model.model.model"
    found = {
        f"{prefix}.embed_tokens.lora_embedding_A": a,
        f"{prefix}.embed_tokens.lora_embedding_B": b,
        "base_model.model.lm_head.weight": head,
        f"{prefix}.layers.0.self_attn.q_proj.bias": bias,
    }
    onto = base(tmp_path / "base", tensors)
    got = merged(adapter(tmp_path / "in", found), onto, tmp_path / "out")
    wanted = dict(tensors)
    wanted["model.embed_tokens.weight"] = (tensors["model.embed_tokens.weight"] + SCALE * (b @ a).T).astype(BF16)
    wanted["lm_head.weight"] = head.astype(BF16)
    wanted["model.layers.0.self_attn.q_proj.bias"] = bias.astype(BF16)
    same(got, wanted)
    both = others() | {f"{prefix}.layers.0.self_attn.q_proj.base_layer.weight": np.ones((K, K), "f4")}
    got = merged(adapter(tmp_path / "both", both), onto, tmp_path / "of-both")
    a, b = (each for name, each in others().items() if "q_proj" in name)
    assert np.allclose(got["model.layers.0.self_attn.q_proj.weight"].astype(float), 1 + SCALE * b @ a, rtol=2**-8)
    headless = {name.replace("model.model.model.", "model.model."): each for name, each in others().items()}
    assert any(".layers.0." in name and "model.model.model" not in name for name in headless)
    got = merged(adapter(tmp_path / "headless", headless), onto, tmp_path / "of-headless")
    same(got, merged(adapter(tmp_path / "plain", others()), onto, tmp_path / "of-plain"))


@pytest.mark.parametrize(
    ("published", "loaded"),
    [
        ("language_model.model.", "model.language_model."),
        ("model.", "model.language_model."),
        ("model.language_model.", "language_model.model."),
    ],
)
def test_models_that_see_have_other_names_in_the_library(published, loaded, tmp_path):
    tensors, prefix = weights(BF16), "base_model.model."
    update = whole("per-expert")
    wanted = merged(adapter(tmp_path / "in", update), base(tmp_path / "base", tensors), tmp_path / "out")

    def renamed(arrays):
        return {
            name.replace("model.", published, 1) if name.startswith("model.") else name: each for name, each in arrays.items()
        }

    onto = base(tmp_path / "other", renamed(tensors))
    given = {prefix + loaded + name.removeprefix(f"{prefix}model."): each for name, each in update.items()}
    same(merged(adapter(tmp_path / "given", given), onto, tmp_path / "found"), renamed(wanted))


def test_scales_of_modules_and_experts(tmp_path):
    tensors, ab = weights(np.float32, whole_numbers=True), pairs(whole_numbers=True)
    patterns = {r".*\.experts\.1\.up_proj": 8, "q_proj": 1}
    given = adapter(tmp_path / "in", stored("per-expert", ab) | others(), alpha_pattern=patterns, use_rslora=True)
    found = merged(given, base(tmp_path / "base", tensors), tmp_path / "out")
    for name, alpha in (("experts.1.up_proj", 8), ("experts.0.up_proj", 4)):
        e, full = int(name.split(".")[1]), f"model.layers.0.mlp.{name}.weight"
        exact = tensors[full] + delta(ab[0]["up"], alpha / np.sqrt(R))[e]
        assert np.abs(found[full] - exact).max() < 1e-5
