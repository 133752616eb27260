"""DeepSeek-V4 against MaxText's own rule for each tensor (`DEEPSEEK_V4_MAXTEXT_TO_HF_PARAM_HOOK_FN`), and what is refused."""

import re

import numpy as np
import pytest

from convert.errors import InputError, PlanError
from convert.options import Choices
from convert.planning.across.plan import make_cross_plan
from layouts.computing import Values, computing
from tests.planning.deepseek4 import GROUPS, OUT, D, E, H, K, Q, W, by_transformers, published
from tests.planning.test_cross import P, across
from tests.tiny import MemoryReader, same

CSA, HCA = ((4, 6), "scanned_blocks.layers_1"), ((3, 5), "scanned_blocks.layers_0")


def sections(matrix: np.ndarray) -> list[np.ndarray]:
    """`mhc_slice_hook`."""
    return [matrix[..., :W], matrix[..., W : 2 * W], matrix[..., 2 * W :]]


def of_layer(hf: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    """What MaxText has of one layer, but for its experts; `hf` are the tensors of the layer."""
    found = {
        "pre_self_attention_layer_norm.scale": hf["attn_norm.weight"],
        "post_self_attention_layer_norm.scale": hf["ffn_norm.weight"],
        "self_attention.wq_a.kernel": hf["attn.wq_a.weight"].T,
        "self_attention.q_norm.scale": hf["attn.q_norm.weight"],
        "self_attention.wq_b.kernel": hf["attn.wq_b.weight"].T.reshape(Q, H, D),
        "self_attention.wkv.kernel": hf["attn.wkv.weight"].T.reshape(K, 1, D),
        "self_attention.kv_norm.scale": hf["attn.kv_norm.weight"],
        "self_attention.sinks": hf["attn.attn_sink"],
        "self_attention.o_a_proj.kernel": hf["attn.wo_a.weight"].reshape(GROUPS, OUT, -1).transpose(0, 2, 1),
        "self_attention.o_b_proj.kernel": hf["attn.wo_b.weight"].T,
        "mlp.MoeBlock_0.gate.kernel": hf["ffn.gate.weight"].T,
        "mlp.shared_experts.wi_0.kernel": hf["ffn.shared_experts.w1.weight"].T,
        "mlp.shared_experts.wi_1.kernel": hf["ffn.shared_experts.w3.weight"].T,
        "mlp.shared_experts.wo.kernel": hf["ffn.shared_experts.w2.weight"].T,
    }
    for name, at in (("hc_attn", "mhc_attention"), ("hc_ffn", "mhc_mlp")):
        for t, part in enumerate(("pre", "post", "res")):
            found[f"{at}.{part}_alpha"] = sections(hf[f"{name}_fn"].T)[t]
            found[f"{at}.{part}_alpha_scale"] = hf[f"{name}_scale"][t : t + 1]
            beta = sections(hf[f"{name}_base"])[t]
            found[f"{at}.{part}_beta"] = beta.reshape(W, W) if part == "res" else beta
        found[f"{at}.mhc_norm.scale"] = np.ones(W * K, "f4").view("u4")
    kind = {0: "", 4: "csa_compressor", 128: "hca_compressor"}[(0, 0, 4, 128, 4, 128, 4)[i]]
    places = [("attn.compressor", kind)] if kind else []
    places += [("attn.indexer.compressor", f"{kind}.indexer")] if kind.startswith("csa") else []
    for theirs, ours in places:
        found[f"self_attention.{ours}.position_bias"] = hf[f"{theirs}.ape"]
        found[f"self_attention.{ours}.kv_norm.scale"] = hf[f"{theirs}.norm.weight"]
        found[f"self_attention.{ours}.gate_proj.kernel"] = hf[f"{theirs}.wgate.weight"].T
        found[f"self_attention.{ours}.kv_proj.kernel"] = hf[f"{theirs}.wkv.weight"].T
    if kind.startswith("csa"):
        indexer = f"self_attention.{kind}.indexer"
        found[f"{indexer}.weights_proj.kernel"] = hf["attn.indexer.weights_proj.weight"].T
        found[f"{indexer}.q_proj.kernel"] = hf["attn.indexer.wq_b.weight"].T
    own = "gate.bias" if i > 2 else "tid2eid"
    tensor = hf[f"ffn.{own if i > 2 else 'gate.tid2eid'}"]
    return found | {f"mlp.MoeBlock_0.{own}": tensor if i > 2 else tensor.astype("f4").view("u4")}


def test_it_is_what_maxtext_makes_of_it():
    source = published()
    hf, wanted = source.arrays, dict[str, np.ndarray]()
    each = [of_layer({n.split(".", 2)[2]: a for n, a in hf.items() if n.startswith(f"layers.{i}.")}, i) for i in range(7)]
    for i in range(3):
        wanted |= {f"{P}decoder.layers_{i}.{name}": array for name, array in each[i].items()}
    for layers, place in (HCA, CSA):
        for name in each[layers[0]]:
            axis = 0 if name == "mlp.MoeBlock_0.gate.bias" else 1  # it is not trained
            wanted[f"{P}decoder.{place}.{name}"] = np.stack([each[i][name] for i in layers], axis)
    wanted |= {
        P + "token_embedder.embedding": hf["embed.weight"],
        P + "decoder.decoder_norm.scale": hf["norm.weight"],
        P + "decoder.logits_dense.kernel": hf["head.weight"].T,
        P + "decoder.hc_head.hc_fn": hf["hc_head_fn"].T,
        P + "decoder.hc_head.hc_base": hf["hc_head_base"],
        P + "decoder.hc_head.hc_scale": hf["hc_head_scale"],
    }
    tree = across(source, to_maxtext=True).arrays
    experts = {name: tree.pop(name) for name in list(tree) if name.endswith((".wi_0", ".wi_1", ".wo"))}
    assert same(tree, wanted)
    for word, leaf in (("w1", "wi_0"), ("w3", "wi_1"), ("w2", "wo")):
        rows = [np.stack([hf[f"layers.{i}.ffn.experts.{e}.{word}.weight"].T for i in (4, 6)]) for e in range(E)]
        assert np.array_equal(experts[f"{P}decoder.scanned_blocks.layers_1.mlp.MoeBlock_0.{leaf}"], np.stack(rows))
        assert f"{P}decoder.layers_2.mlp.MoeBlock_0.{leaf}" in experts


@pytest.mark.parametrize("scan", [True, False])
def test_by_the_names_of_transformers_it_is_the_same_tree(scan):
    trees = [across(source, to_maxtext=True, scan=scan) for source in (published(), by_transformers())]
    assert same(*(tree.arrays for tree in trees))
    assert same(across(trees[1], to_maxtext=False).arrays, by_transformers().arrays)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("scan", [True, False])
def test_what_maxtext_does_not_train_is_read_wherever_it_has_it(version, scan):
    """By its converter, each kind in a place of its own, and in what it trained."""
    source = published()
    tree = across(source, to_maxtext=True, version=version, scan=scan)
    table, bias = (("params.Tid2EidVar.", "params.MoEBiasVar."), ("nnx_aux.model.", "nnx_aux.model."))[version - 1]
    found = tree.arrays[f"{bias}decoder.{'scanned_blocks.layers_1' if scan else 'layers_4'}.mlp.MoeBlock_0.gate.bias"]
    assert np.array_equal(found[0] if scan else found, source.arrays["layers.4.ffn.gate.bias"])
    assert f"{table}decoder.layers_2.mlp.MoeBlock_0.tid2eid" in tree.arrays
    assert same(across(tree, to_maxtext=False).arrays, source.arrays)


def plan(source: MemoryReader, **changed: object) -> None:
    config = {key: value for key, value in {**source.config, **changed}.items() if value is not None}
    reader = MemoryReader(source.arrays, config=config)
    make_cross_plan(reader, reader.path, "prefuse", Choices(to="orbax", compute="exact-values"))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"compress_ratios": [0, 0, 4, 4, 128, 4, 128]}, "of layer 3 is 4 in config.json, and MaxText stacks 128 there"),
        ({"compress_ratios": [0, 0, 4]}, "does not say compress_ratios"),
        ({"compress_ratios": None}, "does not say compress_ratios"),
        ({"num_hash_layers": -1}, "does not say num_hash_layers in numbers"),
        ({"num_hash_layers": 65, "compress_ratios": [0] * 99}, "num_hash_layers 65; it should be a number up to 64"),
        ({"num_hash_layers": 2}, "of layer 2 is 4 in config.json, and MaxText stacks 128 there"),
        ({"num_hidden_layers": 6}, r"3 layers .*do not make whole cycles of 2"),
        ({"hc_mult": None}, "does not say hc_mult"),
    ],
)
def test_what_config_says_otherwise_is_refused(said, why):
    with pytest.raises(PlanError, match=why):
        plan(published(), **said)


def test_what_only_maxtext_has_or_has_otherwise_is_not_taken_from_a_checkpoint():
    source, table = published(), "layers.2.ffn.gate.tid2eid"
    arrays = source.arrays | {"layers.3.hc_attn_fn.ones": np.ones(W * K, "u4")}
    with pytest.raises(PlanError, match=r"layers\.3\.hc_attn_fn\.ones .*has no place on the other side"):
        plan(MemoryReader(arrays, config=source.config))
    arrays = source.arrays | {table: source.arrays[table].astype("u4")}
    with pytest.raises(PlanError, match=r"tid2eid .*is F32; float-table is computed of I64"):
        plan(MemoryReader(arrays, config=source.config))


MISSHAPEN = [("layers_0", (9,)), ("layers_0", (W * K, 1)), ("scanned_blocks.layers_1", (W * K, 3))]


@pytest.mark.parametrize(("place", "shape"), MISSHAPEN)
def test_ones_of_another_shape_are_not_passed_over(place, shape):
    tree, name = across(published(), to_maxtext=True), f"{P}decoder.{place}.mhc_mlp.mhc_norm.scale"
    arrays = tree.arrays | {name: np.full(shape, np.float32(1).view("u4"))}
    with pytest.raises((InputError, PlanError), match=rf"{re.escape(name)} .*(and \({W * K},\) fits|is not of the form)"):
        across(MemoryReader(arrays, config=tree.config, format="orbax"), to_maxtext=False)


LACKED = [(np.float32(each), "I64") for each in (0.5, -0.0, np.nan, np.inf, 2.0**63, -(2.0**64))]
LACKED += [(np.int64(each), "F32") for each in (2**24 + 1, 2**63 - 1)]


@pytest.mark.parametrize(("value", "code"), LACKED)
def test_a_value_that_the_other_type_lacks_is_refused(value, code):
    array = np.array([1, value], value.dtype)
    source = MemoryReader({"x": array.view("u4") if array.dtype == "f4" else array})
    with pytest.raises(InputError, match=r"x \(in home of x\) holds .*, and no (int64|float32) is the same"):
        computing(source, Values(types={"x": code})).read("x", (slice(0, 2),))


def test_values_of_both_types_come_back():
    array = np.array([0, 1, -1, 2**24, -(2**62)])
    there = computing(MemoryReader({"x": array}), Values(types={"x": "F32"})).read("x", (slice(None),))
    assert np.array_equal(there.view("f4"), array.astype("f4"))
    again = computing(MemoryReader({"x": there}), Values(types={"x": "I64"})).read("x", (slice(None),))
    assert np.array_equal(again.view("i8"), array)
