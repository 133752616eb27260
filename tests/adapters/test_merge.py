"""Merging into a base: against float64 in NumPy, the same bits in whatever layouts, and what it refuses."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from layouts.tables.targets import TARGETS
from tests.adapters import tiny
from tests.adapters.tiny import APART, BF16, CONFIG, E, K, L, N, R, adapter, logical, others, store, whole
from tests.tiny import tree

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


@pytest.mark.parametrize("layout", sorted(TARGETS.keys() - {"glu32", "lane"}))
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


@pytest.mark.parametrize(("layout", "more"), [("glu32", []), ("lane", ["--shards", "2"])])
def test_chunks_of_columns(layout, more, tmp_path):
    """Wide enough for chunks of 128 columns in two shards, and cut into many strips."""
    n, k = 256, 3
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
    with pytest.raises(convert.UsageError, match="--layout is not for --merge"):
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
        (["--merge", given, tmp_path / "out", "--base", given], 4, "this is an adapter"),
        (["--merge", given, tmp_path / "out", "--base", onto, "--layout", "vllm"], 2, "--layout is for"),
        (["--merge", given, "--base", onto, onto, "--overwrite"], 5, "must not contain one another"),
        (["--merge", given, "--base", onto, given, "--overwrite"], 5, "must not contain one another"),
        (["--merge", given, tmp_path / "out", "--base", onto, "--memory", "64MiB"], 2, "too little"),
    ):
        assert run(*words) == code, words
        assert told in capsys.readouterr().err
