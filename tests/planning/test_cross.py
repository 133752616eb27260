"""Hugging Face to MaxText and back, against MaxText's own rule for each tensor: transpose, then reshape; layers on axis 1."""

import json
import re
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from convert.errors import InputError, PlanError
from convert.options import Choices
from convert.planning.across.computed import computed_in
from convert.planning.across.pairs import Sides, trees_of
from convert.planning.across.plan import make_cross_plan
from convert.planning.across.tensors import cross_targets
from convert.planning.across.which import named_in, tree_in, written_as
from layouts.computing import computing
from layouts.tables.families import FAMILIES, maxtext
from layouts.tables.targets import IN_MAXTEXT, target
from tests.planning.models import MODELS, TWINS, D, E, F, H, J, K, N, X, gated, llama4, random, reader
from tests.tiny import MemoryReader, fill, run, same

P = "params.params."
BIAS = P + "decoder.moe_layers.DeepSeekMoeBlock_0.MoeBlock_0.gate.bias"
"""MaxText does not train it, and what it does not train is stacked along the first axis."""


def across(
    source: MemoryReader,
    *,
    to_maxtext: bool,
    fused=None,
    scan: bool = True,
    is_fused: bool = False,
    version: int = 0,
    axis: int = 1,
    real=MappingProxyType({}),
) -> MemoryReader:
    family = next(f for f in FAMILIES if source.config["model_type"] in f.model_types)
    trees = trees_of(family, "memory")
    tree, scan = (written_as(source, trees)[version], scan) if to_maxtext else tree_in(source, named_in(source, trees))
    where = maxtext(axis)
    align = None if fused == "lane" else 64
    stored = target(fused or "concat", where, shards=2, align=align) if fused or is_fused else where.native[0]
    sides = Sides(family=family, tree=where, hf=family.native[0], maxtext=stored, scan=scan, to_maxtext=to_maxtext, real=real)
    if family.name == "deepseek_v4":
        source = computing(source, computed_in(source, tree, sides, source.config, "exact-values").values)
    targets = cross_targets(source, tree, sides, source.config)
    arrays = {target.spec.name: fill(target, source) for target in targets}
    return MemoryReader(arrays, config=source.config, format="orbax" if to_maxtext else "hf")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("scan", "axis"), [(True, 1), (True, 0), (False, 1)], ids=["scanned", "scanned-0", "unscanned"])
@pytest.mark.parametrize("fused", [None, "concat"])
def test_there_and_back(name, scan, axis, fused):
    original = reader(name)
    tree = across(original, to_maxtext=True, fused=fused, scan=scan, axis=axis)
    twins = sum(array.size for key, array in original.arrays.items() if key.endswith(TWINS))
    made = sum(array.size for key, array in tree.arrays.items() if ".mhc_norm." in key)
    assert sum(a.size for a in tree.arrays.values()) == sum(a.size for a in original.arrays.values()) - twins + made
    assert any(key.endswith(".wi") for key in tree.arrays) == bool(fused)
    again = across(tree, to_maxtext=False, is_fused=bool(fused), axis=axis)
    assert same(again.arrays, original.arrays)


@pytest.mark.parametrize("layout", sorted(IN_MAXTEXT))
def test_every_layout_that_maxtext_has_a_place_for(layout, monkeypatch):
    """Two shards of 256 columns are two chunks of 128 each for `lane`; for `per-shard` and `gmm-ep` nothing is padded."""
    monkeypatch.setattr("tests.planning.models.N", 512)
    original = reader("qwen3_moe")
    tree = across(original, to_maxtext=True, fused=layout)
    wi = tree.arrays[P + "decoder.layers.moe_block.wi"]
    one, two = (original.arrays[f"model.layers.2.mlp.experts.11.{word}_proj.weight"].T for word in ("gate", "up"))
    of = {"glu32": 32, "glu64": 64, "glu": 64, "lane": 128, "per-shard": 256}.get(layout, 512)
    axes = (0, 1, 3, 2) if layout == "interleaved" else (0, 1, 2, 3)
    wanted = np.stack([half.reshape(K, 512 // of, of) for half in (one, two)], axis=2).transpose(axes)
    assert np.array_equal(wi[11, 2], wanted.reshape(K, -1))
    real = {"wi": {"n": {"per-shard": 256, "gmm-ep": 512}[layout]}} if layout in ("per-shard", "gmm-ep") else {}
    assert same(across(tree, to_maxtext=False, fused=layout, real=real).arrays, original.arrays)


def stacked(arrays, names, rule) -> np.ndarray:
    """Each tensor by MaxText's rule, then stacked on axis 1, as its `_build_single_axis_stacked_tensor` does it."""
    return np.stack([rule(arrays[name]) for name in names], axis=1)


def by_heads(heads: int):
    return lambda array: array.T.reshape(array.shape[1], heads, -1)


def test_a_scanned_qwen_is_what_maxtext_makes_of_it():
    source = reader("qwen3_moe")
    tree, hf = across(source, to_maxtext=True).arrays, source.arrays
    each = [f"model.layers.{i}." for i in range(3)]
    at = P + "decoder.layers."
    wanted = {
        P + "token_embedder.embedding": hf["model.embed_tokens.weight"],
        P + "decoder.decoder_norm.scale": hf["model.norm.weight"],
        P + "decoder.logits_dense.kernel": hf["lm_head.weight"].T,
        at + "self_attention.query.kernel": stacked(hf, [f"{p}self_attn.q_proj.weight" for p in each], by_heads(H)),
        at + "self_attention.key.kernel": stacked(hf, [f"{p}self_attn.k_proj.weight" for p in each], by_heads(J)),
        at + "self_attention.value.kernel": stacked(hf, [f"{p}self_attn.v_proj.weight" for p in each], by_heads(J)),
        at + "self_attention.out.kernel": stacked(
            hf, [f"{p}self_attn.o_proj.weight" for p in each], lambda array: array.T.reshape(H, D, K)
        ),
        at + "self_attention.query_norm.scale": stacked(hf, [f"{p}self_attn.q_norm.weight" for p in each], np.array),
        at + "self_attention.key_norm.scale": stacked(hf, [f"{p}self_attn.k_norm.weight" for p in each], np.array),
        at + "pre_self_attention_layer_norm.scale": stacked(hf, [f"{p}input_layernorm.weight" for p in each], np.array),
        at + "post_self_attention_layer_norm.scale": stacked(
            hf, [f"{p}post_attention_layernorm.weight" for p in each], np.array
        ),
        at + "moe_block.gate.kernel": stacked(hf, [f"{p}mlp.gate.weight" for p in each], np.transpose),
    }
    for leaf, word in (("wi_0", "gate_proj"), ("wi_1", "up_proj"), ("wo", "down_proj")):
        wanted[at + f"moe_block.{leaf}"] = np.stack(
            [np.stack([hf[f"{p}mlp.experts.{e}.{word}.weight"].T for p in each]) for e in range(E)]
        )
    assert same(tree, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_stacked_along_the_axis_that_maxtext_is_given(name):
    """`param_scan_axis` 0: the axes of the layers before the first one instead of behind it."""
    source = reader(name)
    one, other = (across(source, to_maxtext=True, fused="concat", axis=axis).arrays for axis in (1, 0))
    assert one.keys() == other.keys()
    for key, array in one.items():
        stacked = key.startswith(P + "decoder.") and ("layers" in key or "scanned_blocks" in key)
        stacked = stacked and not re.search(r"decoder\.layers_\d", key)
        layers = 0 if not stacked or key.endswith("MoeBlock_0.gate.bias") else 2 if "local_layers" in key else 1
        assert np.array_equal(np.moveaxis(array, 0, layers), other[key]), key


def test_layers_in_turn_go_to_the_slots_of_their_cycle():
    source = reader("gpt_oss")
    tree, hf = across(source, to_maxtext=True, fused="concat").arrays, source.arrays
    for slot in range(2):
        at, each = f"{P}decoder.layers.layers_{slot}.GptOssMlp.", (slot, slot + 2)
        gate_up = [hf[f"model.layers.{i}.mlp.experts.gate_up_proj"] for i in each]
        halves = np.concatenate((np.stack([w[..., ::2] for w in gate_up], 1), np.stack([w[..., 1::2] for w in gate_up], 1)), -1)
        assert np.array_equal(tree[at + "wi"], halves)
        bias = [hf[f"model.layers.{i}.mlp.experts.gate_up_proj_bias"] for i in each]
        assert np.array_equal(tree[at + "wi_1_bias"], np.stack([b[:, 1::2] for b in bias], 1))
        assert np.array_equal(
            tree[at + "wo_bias"], np.stack([hf[f"model.layers.{i}.mlp.experts.down_proj_bias"] for i in each], 1)
        )
    unscanned = across(source, to_maxtext=True, scan=False).arrays
    assert np.array_equal(
        unscanned[P + "decoder.layers_3.GptOssMlp.wi_0"], hf["model.layers.3.mlp.experts.gate_up_proj"][..., ::2]
    )


def test_runs_of_layers_are_stacked_twice():
    """Three layers of each cycle of Qwen3-Next lie behind one another in each of its blocks: (E, blocks, 3, K, N)."""
    source = reader("qwen3_next")
    tree, hf = across(source, to_maxtext=True, fused="concat").arrays, source.arrays
    local, whole = P + "decoder.layers.local_layers.", P + "decoder.layers.global_layer."
    layer = "model.layers.{}."

    def twice(name: str, rule) -> np.ndarray:
        rows = [np.stack([rule(hf[f"model.layers.{4 * b + p}.{name}"]) for p in range(3)], axis=1) for b in range(2)]
        return np.stack(rows, axis=1)

    wanted = {
        local + "input_layernorm.scale": twice("input_layernorm.weight", np.array),
        local + "attention.A_log": twice("linear_attn.A_log", np.array),
        local + "attention.conv1d.kernel": twice("linear_attn.conv1d.weight", lambda array: array.transpose(2, 1, 0)),
        local + "attention.in_proj_qkvz.kernel": twice("linear_attn.in_proj_qkvz.weight", np.transpose),
        local + "mlp.routed_experts.gate.kernel": twice("mlp.gate.weight", np.transpose),
        whole + "attention.attention.out.kernel": stacked(
            hf, [layer.format(i) + "self_attn.o_proj.weight" for i in (3, 7)], np.transpose
        ),
        whole + "attention.attention.query.kernel": stacked(
            hf, [layer.format(i) + "self_attn.q_proj.weight" for i in (3, 7)], by_heads(H)
        ),
    }
    assert same({name: tree.get(name) for name in wanted}, wanted)
    wi = tree[local + "mlp.routed_experts.wi"]
    assert wi.shape == (E, 2, 3, K, 2 * N)
    for expert, block, position in ((0, 0, 0), (7, 1, 2), (11, 0, 1)):
        at = f"model.layers.{4 * block + position}.mlp.experts.{expert}."
        halves = (hf[at + "gate_proj.weight"].T, hf[at + "up_proj.weight"].T)
        assert np.array_equal(wi[expert, block, position], np.concatenate(halves, axis=-1))


def test_what_is_apart_in_qwen_3_5_takes_turns_in_maxtext():
    """By `concat_qkvz_and_transpose` and `concat_ba_and_transpose` of `param_mapping.py`: of each key head all that it has."""
    source = reader("qwen3_5_moe")
    tree, hf = across(source, to_maxtext=True, fused="concat").arrays, source.arrays
    at, layers = P + "decoder.layers.layer_2.", (2, 6)
    qkvz, ba = [], []
    for layer in (f"model.language_model.layers.{i}.linear_attn.in_proj_" for i in layers):
        q, k, v = np.split(hf[layer + "qkv.weight"], (6, 12))
        heads = [part.reshape(2, -1, K) for part in (q, k, v, hf[layer + "z.weight"])]
        qkvz.append(np.concatenate(heads, axis=1).reshape(-1, K).T)
        ba.append(np.concatenate([hf[f"{layer}{word}.weight"].reshape(2, 2, K) for word in "ba"], axis=1).reshape(-1, K).T)
    whole = P + "decoder.layers.layer_3.attention.attention."
    each = [f"model.language_model.layers.{i}." for i in (3, 7)]
    wanted = {
        at + "attention.in_proj_qkvz.kernel": np.stack(qkvz, 1),
        at + "attention.in_proj_ba.kernel": np.stack(ba, 1),
        at + "attention.A_log": stacked(hf, [f"model.language_model.layers.{i}.linear_attn.A_log" for i in layers], np.array),
        whole + "query.kernel": stacked(hf, [p + "self_attn.q_proj.weight" for p in each], by_heads(H)),
        whole + "out.kernel": stacked(hf, [p + "self_attn.o_proj.weight" for p in each], np.transpose),
        P + "vision_encoder.Qwen3_5MoeVisionEncoder_0.blocks_1.attn.attn.key.bias": hf["model.visual.blocks.1.attn.qkv.bias"][
            6:12
        ].reshape(2, 3),
        P + "vision_encoder.Qwen3_5MoeVisionProjector_0.merger.ln_q.scale": hf["model.visual.merger.norm.weight"],
    }
    assert same({name: tree.get(name) for name in wanted}, wanted)
    halves = [hf[f"model.language_model.layers.{i}.mlp.experts.gate_up_proj"].transpose(0, 2, 1) for i in layers]
    assert np.array_equal(tree[at + "mlp.routed_experts.wi"], np.stack(halves, 1))


TEXT = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3, "linear_value_head_dim": 2}
WRONG = [
    ({"linear_num_key_heads": None}, "does not say linear_num_key_heads"),
    ({"linear_num_key_heads": 3}, "do not divide into groups.*linear_num_key_heads"),
    ({"linear_num_value_heads": 0}, "do not divide into groups"),
    ({"linear_key_head_dim": 6, "linear_value_head_dim": 1}, r"20 rows \(u\), and 28 by config.json"),
    ({"linear_num_key_heads": 1}, r"20 rows \(u\), and 14 by config.json"),
]


@pytest.mark.parametrize(("words", "why"), WRONG)
def test_sections_that_do_not_fit_are_refused(words, why):
    source = reader("qwen3_5_moe")
    text = {key: value for key, value in {**source.config["text_config"], **TEXT, **words}.items() if value is not None}
    with pytest.raises(PlanError, match=why):
        across(MemoryReader(source.arrays, config={**source.config, "text_config": text}), to_maxtext=True)


@pytest.mark.parametrize(("word", "value"), [("full_attention_interval", 2), ("model_type", "qwen4_exp_text")])
def test_other_layers_are_another_kind_of_model(word, value):
    source = reader("qwen3_5_moe")
    arrays = {key: array for key, array in source.arrays.items() if ".layers.1.linear_attn." not in key}
    config = {**source.config, "text_config": {**source.config["text_config"], word: value}}
    with pytest.raises(PlanError, match=rf"{word} is {value} in config.json, and MaxText has no such model"):
        across(MemoryReader(arrays, config=config), to_maxtext=True)


@pytest.mark.parametrize("shape", [(7, K), (8, K + 1)])
def test_a_section_of_another_size_is_named(shape):
    source = reader("qwen3_5_moe")
    name = "model.language_model.layers.5.linear_attn.in_proj_z.weight"
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        across(MemoryReader(source.arrays | {name: random(*shape)}, config=source.config), to_maxtext=True)


@pytest.mark.parametrize("fused", [None, "concat"])
def test_the_tree_of_an_older_maxtext_is_read_as_well(fused):
    source = reader("qwen3_next")
    tree = across(source, to_maxtext=True, fused=fused, version=1)
    assert np.array_equal(
        tree.arrays[P + "decoder.layers.layer_2.attention.dt_bias"],
        stacked(source.arrays, [f"model.layers.{i}.linear_attn.dt_bias" for i in (2, 6)], np.array),
    )
    assert same(across(tree, to_maxtext=False, is_fused=bool(fused)).arrays, source.arrays)


def test_a_cycle_that_is_not_whole_is_refused():
    source = reader("qwen3_next")
    config = source.config | {"num_hidden_layers": 7}
    with pytest.raises(PlanError, match=r"7 layers .*do not make whole cycles of 4"):
        across(MemoryReader(source.arrays, config=config), to_maxtext=True)


@pytest.mark.parametrize(("name", "layers"), [("qwen3_5_moe", 6), ("gpt_oss", 3), ("llama4", 6)])
def test_a_cycle_that_is_not_whole_is_not_stacked(name, layers):
    """MaxText has as many steps as there are whole cycles, and says nothing of the layers behind them."""
    source = reader(name)
    arrays = {key: a for key, a in source.arrays.items() if not any(f"l.layers.{i}." in key for i in range(layers, 8))}
    config = json.loads(
        json.dumps(source.config).replace(f'"num_hidden_layers": {MODELS[name][1]}', f'"num_hidden_layers": {layers}')
    )
    cut = MemoryReader(arrays, config=config)
    with pytest.raises(PlanError, match=rf"{layers} layers .*do not make whole cycles of .*--no-scan"):
        across(cut, to_maxtext=True)
    assert same(across(across(cut, to_maxtext=True, scan=False), to_maxtext=False).arrays, arrays)


def test_dense_layers_and_experts_are_two_stacks():
    source = reader("deepseek_v3")
    tree, hf = across(source, to_maxtext=True).arrays, source.arrays
    assert tree[P + "decoder.dense_layers.mlp.wi_0.kernel"].shape == (K, 2, F)
    wo = tree[P + "decoder.moe_layers.DeepSeekMoeBlock_0.MoeBlock_0.wo"]
    assert wo.shape == (E, 3, N, K)
    assert np.array_equal(wo[11, 0], hf["model.layers.2.mlp.experts.11.down_proj.weight"].T)
    unscanned = across(source, to_maxtext=True, scan=False).arrays
    assert np.array_equal(unscanned[P + "decoder.moe_layers_0.DeepSeekMoeBlock_0.MoeBlock_0.wo"], wo[:, 0])


@pytest.mark.parametrize("version", range(4))
@pytest.mark.parametrize("scan", [True, False])
def test_biases_of_routers_are_read_wherever_maxtext_has_them(version, scan):
    """By this tool, by MaxText's converter, in what it trained, and before 0.2.5: (L, E), and (E, L) then."""
    source = reader("deepseek_v3")
    tree = across(source, to_maxtext=True, version=version, scan=scan)
    place = BIAS.replace(P, (P, "params.MoEBiasVar.", "nnx_aux.model.", P)[version])
    wanted = np.stack([source.arrays[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] for i in (2, 3, 4)])
    found = tree.arrays[place] if scan else np.stack([tree.arrays[place.replace("layers", f"layers_{i}")] for i in range(3)])
    assert np.array_equal(found, wanted.T if scan and version == 3 else wanted)
    assert same(across(tree, to_maxtext=False).arrays, source.arrays)


def test_biases_that_maxtext_trained_are_no_state():
    """`--params-only` leaves moments and seeds out; `nnx_aux` has both seeds and biases."""
    source = reader("deepseek_v3")
    tree = across(source, to_maxtext=True, version=2)
    state = {"nnx_aux.model.decoder.dropout.rngs.params.key": random(2), "step": random(1), "nnx_aux.gate.bias": random(3)}
    saved = MemoryReader(tree.arrays | state, config=source.config, format="orbax")
    plan = make_cross_plan(saved, Path("out"), "convert", Choices(to="hf", params_only=True))
    assert plan.left_out.keys() == state.keys()
    assert {target.spec.name for target in plan.targets} == source.arrays.keys()


def test_as_many_layers_as_experts_need_the_record(monkeypatch):
    monkeypatch.setattr("tests.planning.models.E", 3)
    source = reader("deepseek_v3")
    tree = across(source, to_maxtext=True)
    with pytest.raises(PlanError, match=r"gate\.bias .* has as many layers as experts, and nothing says which axis is which"):
        across(tree, to_maxtext=False)
    tree.record = {"version": 1, "family": "maxtext", "hf": {"aside": "first"}}
    assert same(across(tree, to_maxtext=False).arrays, source.arrays)


def test_llama_4_is_what_maxtext_makes_of_it():
    """By its `llama4_ckpt_unscanned.py`; scanned, cycles of four layers are stacked as `Llama4ScannableBlock` has them."""
    source = reader("llama4")
    tree, hf = across(source, to_maxtext=True, scan=False).arrays, source.arrays
    at, layer = P + "decoder.layers_5.", "language_model.model.layers.5."
    gate, up = np.split(hf[layer + "feed_forward.experts.gate_up_proj"], 2, axis=-1)
    wanted = {
        P + "token_embedder.embedding": hf["language_model.model.embed_tokens.weight"],
        P + "decoder.logits_dense.kernel": hf["language_model.lm_head.weight"].T,
        at + "Llama4MoEBlock_0.MoeBlock_0.wi_0": gate,
        at + "Llama4MoEBlock_0.MoeBlock_0.wi_1": up,
        at + "Llama4MoEBlock_0.MoeBlock_0.wo": hf[layer + "feed_forward.experts.down_proj"],
        at + "Llama4MoEBlock_0.MoeBlock_0.gate.kernel": hf[layer + "feed_forward.router.weight"].T,
        at + "Llama4MoEBlock_0.shared_experts.wi_1.kernel": hf[layer + "feed_forward.shared_expert.up_proj.weight"].T,
        at + "self_attention.query.kernel": hf[layer + "self_attn.q_proj.weight"].T.reshape(K, H, D),
        P + "decoder.layers_4.mlp.wi_0.kernel": hf["language_model.model.layers.4.feed_forward.gate_proj.weight"].T,
    }
    seen, layer = P + "vision_encoder.Llama4VisionModel_0.", "vision_model.model.layers.1."
    attention_at = seen + "Llama4VisionEncoder_0.layers_1.self_attention_vision."
    mlp_at = seen + "Llama4VisionEncoder_0.layers_1.Llama4VisionMLP_0."
    adapter = seen + "Llama4VisionPixelShuffleMLP_0.pixel_shuffle_mlp.vit_pixel_shuffle_mlp_"
    wanted_vision = {
        seen + "class_embedding": hf["vision_model.class_embedding"],
        seen + "positional_embedding_vlm": hf["vision_model.positional_embedding_vlm"],
        seen + "Llama4UnfoldConvolution_0.vit_unfold_linear.kernel": hf["vision_model.patch_embedding.linear.weight"].T,
        seen + "layernorm_post.bias": hf["vision_model.layernorm_post.bias"],
        attention_at + "key.kernel": hf[layer + "self_attn.k_proj.weight"].T.reshape(6, 3, 2),
        attention_at + "key.bias": hf[layer + "self_attn.k_proj.bias"].reshape(3, 2),
        attention_at + "out.kernel": hf[layer + "self_attn.o_proj.weight"].T.reshape(3, 2, 6),
        attention_at + "out.bias": hf[layer + "self_attn.o_proj.bias"],
        mlp_at + "vit_encoder_layer_mlp_fc1.kernel": hf[layer + "mlp.fc1.weight"].T,
        adapter + "fc2.kernel": hf["vision_model.vision_adapter.mlp.fc2.weight"].T,
        P + "vision_encoder.Llama4MultiModalProjector_0.vit_multi_modal_projector.kernel": hf[
            "multi_modal_projector.linear_1.weight"
        ].T,
    }
    assert same({name: tree.get(name) for name in wanted | wanted_vision}, wanted | wanted_vision)
    scanned = across(source, to_maxtext=True, fused="concat").arrays
    wi = [hf[f"language_model.model.layers.{i}.feed_forward.experts.gate_up_proj"] for i in (3, 7)]
    assert np.array_equal(scanned[P + "decoder.layers.layers_3.Llama4MoEBlock_0.MoeBlock_0.wi"], np.stack(wi, 1))
    assert scanned[P + "decoder.layers.layers_2.mlp.wo.kernel"].shape == (F, 2, K)
    assert {name for name in scanned if "vision" in name} == {name for name in tree if "vision" in name}


@pytest.mark.parametrize("step", [1, 2, 4])
def test_llama_4_without_vision_and_with_experts_in_every_nth_layer(step):
    source = reader("llama4")
    config = source.config["text_config"] | {"interleave_moe_layer_step": step}
    arrays = {name.removeprefix("language_model."): array for name, array in llama4(8, step).items() if "vis" not in name}
    arrays.pop("multi_modal_projector.linear_1.weight")
    text = MemoryReader(arrays, config=config | {"model_type": "llama4_text"})
    again = across(across(text, to_maxtext=True), to_maxtext=False)
    assert same(again.arrays, text.arrays)
    wrapped = MemoryReader(
        {f"language_model.{n}": a for n, a in arrays.items()}, config=source.config | {"text_config": config}
    )
    assert same(across(across(wrapped, to_maxtext=True), to_maxtext=False).arrays, wrapped.arrays)


def test_a_tensor_without_a_place_is_an_error():
    source = reader("deepseek_v3")
    arrays = source.arrays | {"model.layers.5.eh_proj.weight": random(2, 2)}
    with pytest.raises(PlanError, match=r"1 tensors have no place.*model\.layers\.5\.eh_proj\.weight"):
        across(MemoryReader(arrays, config=source.config), to_maxtext=True)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_tensor_is_named(name):
    source = reader("deepseek_v3")
    arrays = {key: array for key, array in source.arrays.items() if key != name}
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        across(MemoryReader(arrays, config=source.config), to_maxtext=True)


@pytest.mark.parametrize("name", ["qwen3_5_moe", "deepseek_v3"])
def test_scales_of_quantised_weights_have_no_place_and_a_way_out(name):
    source = reader(name)
    weight = next(key for key in source.arrays if key.endswith("o_proj.weight"))
    arrays = source.arrays | {f"{weight}_scale_inv": random(1, 1)}
    with pytest.raises(PlanError, match=r"1 tensors have no place .*o_proj\.weight_scale_inv .*--dequantize=bf16"):
        across(MemoryReader(arrays, config=source.config), to_maxtext=True)


def test_what_is_unknown_is_refused():
    with pytest.raises(PlanError, match="no MaxText tree is known"):
        trees_of(next(f for f in FAMILIES if f.name == "olmoe"), "memory")


@pytest.mark.parametrize("layout", ["concat", "per-shard"])
@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss"])
def test_what_was_fused_on_the_way_is_split_within_its_format(name, layout):
    """Axes of layers are called `l` and `p` on the way, `l0` and `l1` in the record, as all that read it call them."""
    plan = make_cross_plan(reader(name), Path("out"), "prefuse", Choices(to="orbax", layout=layout, shards=5, align=2))
    arrays = {target.spec.name: fill(target, reader(name)) for target in plan.targets}
    tree = MemoryReader(arrays, config={}, record=plan.record, format="orbax")
    again = run(tree, "split").arrays
    wanted = across(reader(name), to_maxtext=True).arrays
    assert again.keys() == wanted.keys()
    assert {key: array.shape for key, array in again.items()} == {key: array.shape for key, array in wanted.items()}


KINDS = [
    ("qwen3_moe", {"mlp_only_layers": [1]}, "model.layers.1", "mlp_only_layers is \\[1\\]"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "model.layers.0", "decoder_sparse_step is 2"),
    ("qwen3_next", {"mlp_only_layers": [6]}, "model.layers.6", "mlp_only_layers is \\[6\\]"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "model.layers.3", "moe_layer_freq is 2"),
    ("qwen3_moe", {}, "model.layers.2", "tensors have no place"),
    ("deepseek_v3", {}, "model.layers.4", "tensors have no place"),
]


@pytest.mark.parametrize(("name", "words", "layer", "why"), KINDS)
def test_a_model_that_maxtext_does_not_have_is_not_incomplete(name, words, layer, why):
    """A dense layer where the tree has experts: those are not missing. Without the words of its config, what is there tells."""
    source = reader(name)
    arrays = {key: array for key, array in source.arrays.items() if not key.startswith(f"{layer}.mlp.")}
    dense = MemoryReader(arrays | gated(f"{layer}.mlp", F), config={**source.config, **words})
    with pytest.raises(PlanError, match=why):
        across(dense, to_maxtext=True)


@pytest.mark.parametrize("words", [{"mlp_only_layers": [], "decoder_sparse_step": 1}, {"mlp_only_layers": None}])
def test_words_of_a_model_that_maxtext_has_are_no_reason(words):
    source = reader("qwen3_moe")
    whole = MemoryReader(source.arrays, config={**source.config, **words})
    assert across(whole, to_maxtext=True).arrays.keys() == across(source, to_maxtext=True).arrays.keys()
    arrays = {key: array for key, array in source.arrays.items() if key != "model.layers.1.mlp.gate.weight"}
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate\.weight is missing"):
        across(MemoryReader(arrays, config={**source.config, **words}), to_maxtext=True)


def rule(array: np.ndarray, *shape: int) -> np.ndarray:
    """MaxText's `reshape_kernel`."""
    return array.T.reshape(shape)


def test_an_indexer_and_a_block_that_predicts_further_tokens():
    """DeepSeek-V3.2 by `param_mapping.py`, its MTP block by `multi_token_prediction.py`, which never stacks it."""
    source = reader("deepseek_v32")
    tree, hf = across(source, to_maxtext=True, fused="concat").arrays, source.arrays
    index, last = "model.layers.2.self_attn.indexer.", "model.layers.3."
    block = P + "mtp_block.mtp_layer_1.mtp_1_"
    moe = block + "transformer_layer.DeepSeekMoeBlock_0.MoeBlock_0."
    stack = P + "decoder.moe_layers.self_attention.indexer."
    gate, up = (hf[f"{last}mlp.experts.11.{word}_proj.weight"].T for word in ("gate", "up"))
    wanted = {
        stack + "wq_b.kernel": rule(hf[index + "wq_b.weight"], 6, X, 3)[:, None],
        stack + "weights_proj.kernel": hf[index + "weights_proj.weight"].T[:, None],
        block + "embedding_norm.scale": hf[last + "enorm.weight"],
        block + "hidden_state_norm.scale": hf[last + "hnorm.weight"],
        block + "projection.kernel": hf[last + "eh_proj.weight"].T,
        block + "final_norm.scale": hf[last + "shared_head.norm.weight"],
        block + "transformer_layer.self_attention.wq_b.kernel": rule(hf[last + "self_attn.q_b_proj.weight"], 6, H, 5),
        moe + "gate.kernel": hf[last + "mlp.gate.weight"].T,
    }
    assert same({name: tree.get(name) for name in wanted}, wanted)
    assert np.array_equal(tree[moe + "wi"][11], np.concatenate((gate, up), -1))
    assert not any("embed_tokens" in name or "shared_head" in name for name in tree)


def test_two_blocks_that_predict_further_tokens_have_a_subtree_each():
    source = reader("deepseek_v32")
    second = {n.replace("layers.3.", "layers.4."): random(*a.shape) for n, a in source.arrays.items() if "layers.3." in n}
    second |= {n.replace("3", "4", 1): source.arrays[n] for n in source.arrays if n.endswith(TWINS)}
    two = MemoryReader(source.arrays | second, config=source.config | {"num_nextn_predict_layers": 2})
    tree = across(two, to_maxtext=True)
    assert P + "mtp_block.mtp_layer_2.mtp_2_projection.kernel" in tree.arrays
    assert same(across(tree, to_maxtext=False).arrays, two.arrays)


@pytest.mark.parametrize("gone", ["eh_proj.weight", "embed_tokens.weight", "mlp.experts.3.up_proj.weight"])
def test_a_block_that_predicts_further_tokens_is_there_as_a_whole_or_not_at_all(gone):
    source = reader("deepseek_v32")
    without = {name: array for name, array in source.arrays.items() if not name.startswith("model.layers.3.")}
    bare = MemoryReader(without, config=source.config)  # as transformers saves it
    assert same(across(across(bare, to_maxtext=True), to_maxtext=False).arrays, without)
    arrays = {name: array for name, array in source.arrays.items() if name != f"model.layers.3.{gone}"}
    with pytest.raises(InputError, match=rf"model\.layers\.3\.{gone} is missing".replace(".", r"\.").replace(r"\\.", r"\.")):
        across(MemoryReader(arrays, config=source.config), to_maxtext=True)


ENCODERS = [
    ("qwen3_vl_moe", "model.visual.pos_embed.weight"),
    ("qwen3_omni_moe", "thinker.audio_tower.conv_out.weight"),
    ("qwen3_5_moe", "model.visual.patch_embed.proj.bias"),
    ("llama4", "vision_model.class_embedding"),
    ("gemma4", "model.vision_tower.std_scale"),
]


@pytest.mark.parametrize(("name", "gone"), ENCODERS)
def test_an_encoder_is_there_as_a_whole_or_not_at_all(name, gone):
    """MaxText's model of what sees and hears has all of it; that of text alone has none."""
    source = reader(name)
    arrays = {key: array for key, array in source.arrays.items() if key != gone}
    with pytest.raises(InputError, match=gone.replace(".", r"\.") + " is missing"):
        across(MemoryReader(arrays, config=source.config), to_maxtext=True)
    whole = across(source, to_maxtext=True).arrays
    text = {key: array for key, array in whole.items() if "_encoder." not in key}
    bare = MemoryReader(text, config=source.config, format="orbax")
    assert same(across(across(bare, to_maxtext=False), to_maxtext=True).arrays, text)
    lost = next(key for key in whole if "_encoder." in key)
    tree = {key: array for key, array in whole.items() if key != lost}
    with pytest.raises(InputError, match="is missing"):
        across(MemoryReader(tree, config=source.config, format="orbax"), to_maxtext=False)


def test_an_encoder_of_another_kind_is_no_broken_one():
    source = reader("gemma4")
    config = {**source.config, "vision_config": {**source.config["vision_config"], "standardize": False}}
    arrays = {key: array for key, array in source.arrays.items() if ".std_" not in key}
    with pytest.raises(PlanError, match=r"standardize is False .* its own has scales"):
        across(MemoryReader(arrays, config=config), to_maxtext=True)


@pytest.mark.parametrize("count", [-1, 65, "1", [1]])
def test_a_number_of_blocks_that_is_none_is_refused(count):
    source = reader("deepseek_v32")
    with pytest.raises(PlanError, match="num_nextn_predict_layers"):
        across(MemoryReader(source.arrays, config=source.config | {"num_nextn_predict_layers": count}), to_maxtext=True)


def test_what_is_seen_and_heard_goes_where_maxtext_has_it():
    """By the hooks of `param_mapping.py`: `split_qkv_*`, `reshape_conv3d_patch_embed`, `reshape_conv2d_audio`, ..."""
    source = reader("qwen3_omni_moe")
    tree, hf = across(source, to_maxtext=True).arrays, source.arrays
    seen, heard = P + "vision_encoder.Qwen3OmniMoeVisionEncoder_0.", P + "audio_encoder.Qwen3OmniAudioEncoder_0."
    block, layer = "thinker.visual.blocks.1.", "thinker.audio_tower.layers.1."
    routers = [f"thinker.model.layers.{i}.mlp.gate.weight" for i in range(2)]
    wanted = {
        seen + "patch_embed.proj.kernel": hf["thinker.visual.patch_embed.proj.weight"].transpose(2, 3, 4, 1, 0),
        seen + "pos_embed_interpolate.pos_embed": hf["thinker.visual.pos_embed.weight"],
        seen + "blocks_1.attn.attn.out.kernel": rule(hf[block + "attn.proj.weight"], 2, 3, 6),
        seen + "blocks_1.mlp_out.kernel": hf[block + "mlp.linear_fc2.weight"].T,
        seen + "merger_2.mlp_2.kernel": hf["thinker.visual.merger_list.2.mlp.2.weight"].T,
        P + "vision_encoder.Qwen3OmniMoeVisionProjector_0.merger.mlp_0.bias": hf["thinker.visual.merger.mlp.0.bias"],
        heard + "conv2d2.kernel": hf["thinker.audio_tower.conv2d2.weight"].transpose(2, 3, 1, 0),
        heard + "conv_out.kernel": hf["thinker.audio_tower.conv_out.weight"].T,
        heard + "layers_1.self_attention_audio.query.kernel": rule(hf[layer + "self_attn.q_proj.weight"], 8, 4, 2),
        heard + "layers_1.self_attention_audio.key.bias": hf[layer + "self_attn.k_proj.bias"].reshape(4, 2),
        heard + "layers_1.self_attention_audio.out.kernel": rule(hf[layer + "self_attn.out_proj.weight"], 4, 2, 8),
        heard + "layers_1.AudioMLP.wo.kernel": hf[layer + "fc2.weight"].T,
        P + "audio_encoder.Qwen3OmniAudioProjector_0.proj2.kernel": hf["thinker.audio_tower.proj2.weight"].T,
        P + "decoder.layers.moe_block.gate.kernel": stacked(hf, routers, np.transpose),
    }
    for at, word in enumerate(("query", "key", "value")):
        part = slice(6 * at, 6 * at + 6)
        wanted[f"{seen}blocks_1.attn.attn.{word}.kernel"] = rule(hf[block + "attn.qkv.weight"][part], 6, 2, 3)
        wanted[f"{seen}blocks_1.attn.attn.{word}.bias"] = hf[block + "attn.qkv.bias"][part].reshape(2, 3)
    assert same({name: tree.get(name) for name in wanted}, wanted)
