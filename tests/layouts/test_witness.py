"""Nothing is left behind in silence: leaves of projections, experts of other names, routers and layers."""

from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError, PlanError
from convert.options import Choices
from convert.planning.planner import make_plan
from layouts.matching.describe import describe
from layouts.tables.families import FAMILIES
from layouts.tables.natives import SOURCES
from tests.tiny import HF, E, K, MemoryReader, config, run, same, tensors

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")
MAXTEXT = next(family for family in FAMILIES if family.name == "maxtext")
BLOCK = "params.params.decoder.layers_1.moe_block"
ROUTER = "model.layers.1.mlp.gate.weight"


def plan(family, arrays, silent=False, **said):
    stated = config(family) | said
    if silent:
        stated.pop("num_experts", None)
    reader = MemoryReader(arrays, config=stated, format=family.format)
    return make_plan(reader, Path("out"), "prefuse", Choices())


@pytest.mark.parametrize("leaf", ["wi_0_lora_c", "wi_0_lora_b_scale", "wi_0_scale_inv", "wi_1_zero", "wo_x", "wo.kernel"])
def test_what_begins_as_a_projection_belongs_to_it(leaf):
    with pytest.raises(PlanError, match="no table says how it is fused"):
        plan(MAXTEXT, tensors(MAXTEXT) | {f"{BLOCK}.{leaf}": np.zeros((3, 2), "u4")})


def test_half_of_lora_is_an_error():
    with pytest.raises(PlanError, match="wi_0_lora_b has no partner"):
        plan(MAXTEXT, tensors(MAXTEXT) | {f"{BLOCK}.wi_0_lora_b": np.zeros((3, 2), "u4")})


@pytest.mark.parametrize("box", ["array.qvalue", "qvalue", "qrhs.frozen"])
def test_a_module_of_experts_whose_arrays_are_all_boxed_is_no_other_tensor(box):
    found = tensors(MAXTEXT)
    for leaf in ("wi_0", "wi_1", "wo"):
        found[f"{BLOCK}.{leaf}.{box}"] = found.pop(f"{BLOCK}.{leaf}")
    with pytest.raises(PlanError, match=f"{BLOCK}.*{box} is of weights of experts that qwix or AQT has quantised"):
        plan(MAXTEXT, found)


@pytest.mark.parametrize(
    "place", [BLOCK, "params.aqt.decoder.layers.MoeBlock_0", "params.aqt.decoder.layers.mlp.routed_experts"]
)
@pytest.mark.parametrize("apart", [True, False])
def test_what_aqt_keeps_of_experts_elsewhere_is_seen(place, apart):
    """Its frozen weights are numbered, and those beside them may be there or not; of attention they are some other tensor."""
    leaf = "AqtDotGeneral_0.qrhs.frozen.qvalue"
    found = {n: a for n, a in tensors(MAXTEXT).items() if apart or not (".wi_" in n or ".wo" in n)}
    beside = {f"params.aqt.decoder.layers_1.attention.query.{leaf}": np.zeros((3, 2), "u4")}
    if apart:
        plan(MAXTEXT, found | beside)
    with pytest.raises(PlanError, match="that qwix or AQT has quantised"):
        plan(MAXTEXT, found | {f"{place}.AqtEinsum_0.{leaf}": np.zeros((3, 2), "u4")})


@pytest.mark.parametrize(
    "name",
    [
        "mlp.chunk_experts.0.gate_proj.weight",
        "mlp.experts_2.0.w1.weight",
        "moe_expert.up_proj.weight",
        "Expert0.fc1.weight",
        "local_experts.0.up.weight",
        "mlp.my_experts.ffn_down.weight",
        "mlp.expert_stack.wi_0",
    ],
)
def test_matrices_below_any_word_for_experts_are_an_error(name):
    with pytest.raises(PlanError, match=r"is an expert tensor that family (?!.*--source-layout)"):
        plan(QWEN, tensors(QWEN) | {f"model.layers.1.{name}": np.zeros((3, 2), "u4")})


@pytest.mark.parametrize("name", ["mlp.\u0435xperts.0.gate_proj.weight", "mlp.exp\u00e9rts.up", "mlp.\uff45xperts.0.w1"])
def test_names_that_only_look_like_experts_are_said(name):
    whole = f"model.layers.1.{name}"
    assert plan(QWEN, tensors(QWEN) | {whole: np.zeros((3, 2), "u4")}).remarks[-1].endswith(f"first {whole!a}")


@pytest.mark.parametrize("rows", [E - 1, E + 1, 2 * E])
def test_routers_have_a_row_for_each_expert(rows):
    """Where config.json does not say how many there are; where it does, the experts were counted by it."""
    plan(QWEN, tensors(QWEN) | {ROUTER: np.zeros((E, K), "u4")}, silent=True)
    with pytest.raises(InputError, match=f"is one of {E} experts, but the router {ROUTER} .* is for {rows}"):
        plan(QWEN, tensors(QWEN) | {ROUTER: np.zeros((rows, K), "u4")}, silent=True)


def test_the_router_of_a_tree_is_a_witness_too():
    gate = f"{BLOCK}.gate.kernel"
    with pytest.raises(InputError, match="is for 7"):
        plan(MAXTEXT, tensors(MAXTEXT) | {gate: np.zeros((K, 7), "u4")})
    plan(MAXTEXT, tensors(MAXTEXT) | {gate: np.zeros((K, E), "u4")})


def described(arrays, **said):
    return describe(MemoryReader(arrays, config=config(QWEN) | said))


def test_layers_that_should_have_experts_have_some():
    said = {"num_hidden_layers": 4, "mlp_only_layers": [0], "decoder_sparse_step": 1}
    dense = {"model.layers.0.mlp.gate_proj.weight": np.zeros((3, 2), "u4")}
    with pytest.raises(InputError, match="4 layers, 3 of them with experts, but layer 3 has none"):
        described(tensors(QWEN) | dense, **said)
    assert described(tensors(QWEN, layers=(1, 2, 3)) | dense, **said).remarks == ()
    assert described(tensors(QWEN, layers=(1, 2, 3, 4)) | dense, **said).remarks == ()  # MTP


@pytest.mark.parametrize(
    ("step", "layers", "said"),
    [(3, (1, 4), ""), (3, (1,), "7 layers, 2 of them with experts, but layer 4 has none"), (2, (1, 4), "layer 3 has none"),
     (0, (1, 4), "which of 7 layers"), ("3", (1, 4), "which of 7 layers")],
)  # fmt: skip
def test_layers_may_share_the_experts_of_the_first_of_them(step, layers, said):
    """Megrez 2: of each three layers the first holds them, and all have a router."""
    stated = {"num_hidden_layers": 7, "first_k_dense_replace": 1, "moe_layer_freq": 1, "experts_shared_frequency": step}
    routers = {f"model.layers.{layer}.mlp.gate.weight": np.zeros((E, K), "u4") for layer in range(7)}
    try:
        told = described(tensors(QWEN, layers=layers) | routers, **stated).remarks
    except InputError as error:
        told = (str(error),)
    assert said in "".join(told)
    assert bool(said) == bool(told)


@pytest.mark.parametrize(
    ("count", "said"), [(3, ()), (4, "bank 3 has none"), (0, "does not say how many banks"), (None, "does not")]
)
def test_layers_may_share_banks_of_experts(count, said):
    family = next(family for family in FAMILIES if family.banks)
    stated = config(family) | {"num_hidden_layers": 9, "num_blocks": count}
    try:
        told = describe(MemoryReader(tensors(family, layers=(0, 1, 2)), config=stated)).remarks
    except InputError as error:
        told = (str(error),)
    assert told == said if not said else said in told[0]


def test_a_block_beside_the_layers_is_none_of_them():
    """Qwen3-Next has its MTP block below `mtp.layers.0`."""
    said = {"num_hidden_layers": 3, "mlp_only_layers": [], "decoder_sparse_step": 1}
    beside = {n.replace("model.layers.1", "mtp.layers.0"): a for n, a in tensors(QWEN, layers=(1,)).items()}
    with pytest.raises(InputError, match="layer 0 has none"):
        described(tensors(QWEN) | beside, **said)
    assert described(tensors(QWEN, layers=(0, 1, 2)) | beside, **said).remarks == ()


def test_where_config_json_is_silent_a_layer_may_be_dense_but_not_absent():
    dense = {f"model.layers.{layer}.mlp.up_proj.weight": np.zeros((3, 2), "u4") for layer in (0, 3)}
    (remark,) = described(tensors(QWEN) | dense, num_hidden_layers=4).remarks
    assert remark == "config.json does not say which of 4 layers have experts; 2 have them"
    with pytest.raises(InputError, match="layer 4 has none"):
        described(tensors(QWEN) | dense, num_hidden_layers=5)


@pytest.mark.parametrize("word", ["num_experts", "num_hidden_layers"])
@pytest.mark.parametrize(
    "value", ["4", True, 4.0, -1, float("nan"), 10**400, {"a": 4}, [4, "4"]], ids=lambda value: str(value)[:9]
)
def test_what_config_json_says_of_experts_and_layers_are_numbers(word, value):
    """To take what is none for silence would leave the last expert, or layer, to whoever writes `"4"`."""
    with pytest.raises(InputError, match=f"config.json: {word} is .* no number of (experts|layers)"):
        described(tensors(QWEN), **{word: value})


@pytest.mark.parametrize("said", [{"more": {"num_experts": E - 1}}, {"num_local_experts": E + 1}])
def test_where_config_json_says_several_numbers_routers_are_counted(said):
    with pytest.raises(InputError, match=f"but the router {ROUTER} .* is for {E + 1}"):
        described(tensors(QWEN) | {ROUTER: np.zeros((E + 1, K), "u4")}, **said)


@pytest.mark.parametrize(
    ("said", "remark"),
    [
        ({"num_experts": None}, f"neither config.json nor a router says how many experts there are; by their names {E}"),
        ({}, "config.json does not say how many layers and experts there are, so that nobody has looked whether"),
        (
            {"a": {"num_hidden_layers": 1, "num_experts": E}, "num_hidden_layers": 1},
            "config.json speaks of 2 models with experts",
        ),
    ],
)
def test_what_nobody_has_counted_is_said(said, remark):
    assert any(text.startswith(remark) for text in described(tensors(QWEN), **said).remarks)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, {1, 2, 3}),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, {2}),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 1}, {0, 2, 3}),
        ({"decoder_sparse_step": 2}, {1, 3}),
        ({"interleave_moe_layer_step": 2}, {1, 3}),
        ({"moe_layers": [0, 3]}, {0, 3}),
        ({"num_dense_layers": 2}, {2, 3}),
        ({"moe_layer_freq": [0, 1, 1, 0]}, {1, 2}),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}, {1, 2}),
        ({"mlp_layer_types": ["dense", "moe", "hash_moe", "sparse"]}, {1, 2, 3}),
    ],
)
def test_words_for_layers(said, wanted):
    """Exactly these layers have to have experts."""
    every = {f"model.layers.{layer}.input_layernorm.weight": np.zeros(3, "u4") for layer in range(4)}
    assert described(tensors(QWEN, layers=sorted(wanted)) | every, num_hidden_layers=4, **said).remarks == ()
    with pytest.raises(InputError, match="has none"):
        described(tensors(QWEN, layers=sorted(wanted)[1:] or [9]) | every, num_hidden_layers=4, **said)


@pytest.mark.parametrize(
    "said",
    [
        *({"first_k_dense_replace": value} for value in ("1", True, 0.5)),
        *({"decoder_sparse_step": value} for value in (True, 0.5, 0)),
        *({"mlp_only_layers": value} for value in ("012", {"0": 1})),
        {"first_k_dense_replace": 1, "moe_layer_start_index": 2},
    ],
)
def test_words_that_nobody_knows_say_nothing(said):
    every = {f"model.layers.{layer}.input_layernorm.weight": np.zeros(3, "u4") for layer in range(4)}
    assert "does not say which" in described(tensors(QWEN) | every, num_hidden_layers=4, **said).remarks[0]


def test_no_axis_but_g_is_reversed_by_a_record():
    fused = run(MemoryReader(tensors(HF[0]), config=config(HF[0])), "prefuse")
    for pattern in ("-e k (g n)", "e -k (g n)"):
        fused.record = {**fused.record, "wi": {**fused.record["wi"], "pattern": pattern}}
        with pytest.raises(InputError, match="only gate and up may be stored in reverse"):
            run(fused, "split")


@pytest.mark.parametrize("named", ["fused-out-in", "fused-in-out"])
def test_the_way_back_leads_to_the_layout_that_the_user_named(named):
    """And not to the family's first, which stands under the same names."""
    family = next(family for family in HF if family.changed_in)
    original = MemoryReader(tensors(family, SOURCES[named]), config=config(family))
    fused = run(original, "prefuse", source_layout=named)
    assert same(run(fused, "split").arrays, original.arrays)


def test_single_experts_come_back_as_single_experts_where_the_user_named_them():
    family = next(family for family in HF if family.name == "qwen3_5_moe")
    original = MemoryReader(tensors(family, SOURCES["per-expert"]), config=config(family))
    assert same(run(run(original, "prefuse", source_layout="per-expert"), "split").arrays, original.arrays)


def test_records_have_to_agree():
    fused = run(MemoryReader(tensors(QWEN), config=config(QWEN)), "prefuse")
    fused.records = {"convert_manifest.json": dict(fused.record)}
    run(fused, "split")
    fused.records = {"convert_manifest.json": {**fused.record, "layout": "interleaved"}}
    with pytest.raises(InputError, match="and the checkpoint say different things"):
        run(fused, "split")


def test_a_checkpoint_is_described_by_the_record_of_what_was_made_from_it():
    family = next(family for family in HF if family.changed_in)
    original = MemoryReader(tensors(family, SOURCES["fused-out-in"]), config=config(family))
    fused = run(original, "prefuse", source_layout="fused-out-in")
    with pytest.raises(PlanError):
        describe(original)
    found = describe(original, like=fused.record)
    assert {group.placed.pattern.text for group in found.groups} == {"e (g n) k", "e k n"}
