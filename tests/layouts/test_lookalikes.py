"""Neighbours of the rows of the tables: names that look the same and are something else, and layouts that must be named."""

from pathlib import Path

import numpy as np
import pytest

from convert.errors import ConvertError, InputError, PlanError
from convert.options import Choices
from convert.planning.planner import make_plan
from layouts.matching.refusal import Refusal
from layouts.tables.families import FAMILIES
from tests.layouts.by_hand import weights
from tests.layouts.by_hand.styles import (
    automodel,
    fc1,
    fc_proj,
    gate_up,
    mlx,
    paddle,
    projections,
    spelt,
    switch,
    weight_first,
    yuan,
)
from tests.tiny import MemoryReader, run, same

OUT, AT = Path("out"), "model.layers.2.mlp"
W = weights(2, 12, 6, 4)


def plain(found):
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def refused(arrays, config, words, **choices):
    with pytest.raises((PlanError, InputError), match=words) as error:
        make_plan(MemoryReader(plain(arrays), config=config), OUT, "prefuse", Choices(**choices))
    assert error.value.exit_code in (3, 4)


@pytest.mark.parametrize(
    "style",
    [yuan, paddle, automodel, spelt("gate", "up", "down"), spelt("linear", "linear_v", "linear_1"), fc1, weight_first, fc_proj],
)
@pytest.mark.parametrize("config", [{}, {"model_type": "somebodys_moe"}], ids=["no config", "unknown"])
def test_words_of_one_family_tell_nothing_of_an_unknown_model(style, config):
    """One tensor of both, or words that others use otherwise: the family must be named."""
    with pytest.raises(ConvertError) as error:
        make_plan(MemoryReader(plain(style(AT, *W)), config=config), OUT, "prefuse")
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    ("style", "config", "rows"),
    [
        (switch("ffn.switch_mlp"), {"model_type": "dbrx"}, None),
        (switch("experts.switch_glu"), {"model_type": "qwen3_moe"}, "mlx-glu"),
        (switch("experts"), {"model_type": "deepseek_v3"}, "stacked, mlx-experts"),
        (spelt("w1", "v1", "w2"), {"model_type": "qwen3_moe"}, "per-expert-w1v1, per-expert-w1"),
        (spelt("w1", "v1", "w2", below="experts.held"), {"model_type": "dbrx"}, None),
        (spelt("w1", "v1", "w3"), {"model_type": "dbrx"}, None),
        (gate_up, {"model_type": "gpt_oss"}, "per-expert-gate-up"),
    ],
)
def test_names_of_one_producer_are_not_taken_for_another_and_the_error_says_how_they_are_called(style, config, rows):
    """What MLX does for gpt-oss it does not for DeepSeek: there the user has to say it, and is told how."""
    refused(style(AT, *W), config, f"say it with --source-layout: {rows}$" if rows else "does not know|no expert weights")


def test_yuan_without_a_gate_is_refused():
    arrays = {name: array[:4] if ".w1." in name else array for name, array in yuan(AT, *W).items()}
    refused(arrays, {"model_type": "yuan2"}, "do not fit together")


def test_one_name_of_down_with_two_meanings_is_one_of_them():
    """ERNIE: Paddle's down_proj is [N, K] under the name of transformers' [K, N]; which it is, the names beside it say."""
    both = paddle(AT, *W) | projections("model.layers.3.mlp", *W)
    refused(both, {"model_type": "ernie4_5_moe"}, "does not know|missing|beside it|do not fit")
    lonely = {name: array for name, array in paddle(AT, *W).items() if "up_gate" not in name}
    refused(lonely, {"model_type": "ernie4_5_moe"}, "has no wi beside it")


def test_what_paddle_saves_unfused_is_read_only_as_the_user_says():
    """ERNIE: separate projections of Paddle's linear layers are [in, out] under transformers' names for [out, in]."""
    stated = {"model_type": "ernie4_5_moe", "hidden_size": W[0].shape[1]}
    usual, turned = projections(AT, *W), {name: array.T for name, array in projections(AT, *W).items()}
    refused(turned, stated, "stored the other way round. .*--source-layout")
    wanted = run(MemoryReader(plain(usual), config=stated), "prefuse").arrays
    said = {"source_layout": "per-expert-in-out"}
    assert same(run(MemoryReader(plain(turned), config=stated), "prefuse", **said).arrays, wanted)
    refused(usual, stated, "stored the other way round", **said)


@pytest.mark.parametrize(
    ("beside", "words"), [("scales", "is missing"), ("biases", "is missing"), ("qscales", "does not know")]
)
def test_what_mlx_quantised_is_whole(beside, words):
    arrays = mlx(AT, *W) | {f"{AT}.switch_mlp.gate_proj.{beside}": np.zeros((12, 4, 1), "u4")}
    refused(arrays, {"model_type": "qwen3_moe"}, rf"switch_mlp\.\w+\.{beside} .*{words}")


def test_a_router_that_an_expert_has_the_word_of_is_still_looked_at():
    style = spelt("gate", "up", "down")
    at, config = "model.layers.2.block_sparse_moe", {"model_type": "smallthinker"}
    router = {f"{at}.primary_router.weight": np.zeros((13, 6), "u4")}
    refused(style(at, *W) | router, config, "is for 13: experts are missing")


@pytest.mark.parametrize("width", ["moe_intermediate_size", "intermediate_size"])
def test_both_sizes_of_config_json_speak_louder_than_a_table(width):
    """Paddle exports any model as [in, out]; one size alone may be that of another part."""
    turned = {name: array.T for name, array in projections(AT, *W).items()}
    stated = {"model_type": "qwen3_moe", "hidden_size": 6, width: 4}
    refused(turned, stated, "takes 4 inputs and gives 6, .* hidden size is 6: it is stored the other way round")
    make_plan(MemoryReader(plain(turned), config=stated), OUT, "prefuse", Choices(source_layout="per-expert-in-out"))
    for said in (
        {"hidden_size": 6},
        {width: 4},
        {"hidden_size": 4, width: 6},
        {"hidden_size": 4, "vision": {"hidden_size": 6}},
    ):
        make_plan(MemoryReader(plain(turned), config={"model_type": "qwen3_moe", **said}), OUT, "prefuse", Choices())


@pytest.mark.parametrize("more", [{}, {"source_layout": "per-expert"}])
def test_sizes_of_a_part_without_experts_say_nothing_of_experts(more):
    """A text model may leave out its usual width; that of CLIP is 1024, with mlps of 4096."""
    tower = {"vision_config": {"hidden_size": 4, "intermediate_size": 6}}
    for stated in ({"num_experts": 12, **tower}, {"text_config": {"model_type": "qwen3_moe", "num_experts": 12}, **tower}):
        found = MemoryReader(plain(projections(AT, *W)), config={"model_type": "qwen3_moe", **stated})
        make_plan(found, OUT, "prefuse", Choices(**more))


def test_names_alone_are_checked_against_the_sizes_of_the_model():
    """Single matrices that are [in, out]: no table has them, and names do not say it."""
    turned = {name: array.T for name, array in projections(AT, *W).items()}
    refused(turned, {"hidden_size": 6}, "stored the other way round")
    make_plan(MemoryReader(plain(projections(AT, *W)), config={"hidden_size": 6}), OUT, "prefuse", Choices())
    narrower = {"hidden_size": 9, "routed_expert_hidden_size": 6, "vision_config": {"hidden_size": 4}}
    make_plan(MemoryReader(plain(projections(AT, *W)), config=narrower), OUT, "prefuse", Choices())


TREES = {
    "tunix": ("layers.{}.mlp.{}", ("gate_proj", "up_proj", "down_proj"), False),
    "torchtitan": ("layers.{}.moe.experts.{}", ("w1", "w3", "w2"), True),
    "stacked-bare": ("layers.{}.mlp.experts.{}", ("gate_proj", "up_proj", "down_proj"), True),
    "mlx": ("layers.{}.mlp.switch_mlp.{}.weight", ("gate_proj", "up_proj", "down_proj"), True),
}
QWEN = {"model_type": "qwen3_moe", "hidden_size": 6, "moe_intermediate_size": 4}
WHERE = [(QWEN, "hf"), ({"model_type": "new"}, "hf"), ({}, "hf"), (QWEN, "orbax"), ({}, "orbax")]
EACH_TREE = pytest.mark.parametrize("name", TREES)


def tree(name, turned=None, gates=W):
    key, words, rows = TREES[name]
    rows = rows if turned is None else turned
    found = [(layer, word, w) for layer in (2, 3) for word, w in zip(words, gates, strict=True)]
    return plain({key.format(layer, word): w.swapaxes(1, 2) if rows else w for layer, word, w in found})


@EACH_TREE
@pytest.mark.parametrize(("config", "format"), WHERE)
def test_trees_of_trainers_are_named_by_the_user(name, config, format):  # noqa: A002
    """As files and as Orbax trees, where each layer keeps its own; the error names the row, and `config.json` need not help."""
    source = MemoryReader(tree(name), config=config, format=format)
    if name != "mlx" or format == "orbax":
        with pytest.raises(PlanError, match=rf"source-layout.*\b{name}\b|looks like layout .*'{name}'"):
            make_plan(source, OUT, "prefuse")
    fused = run(source, "prefuse", source_layout=name)
    for layer in (2, 3):
        wi = next(array for key, array in fused.arrays.items() if key.startswith(f"layers.{layer}.") and key.endswith(".wi"))
        assert np.array_equal(wi, np.concatenate(W[:2], -1))
        assert np.array_equal(next(a for n, a in fused.arrays.items() if f".{layer}." in n and n.endswith(".wo")), W[2])
    assert same(run(fused, "split").arrays, source.arrays)


@EACH_TREE
def test_what_was_named_may_be_named_again_and_is_how_the_model_is_published(name):
    source = MemoryReader(tree(name), config={"model_type": "new"})
    fused = run(source, "prefuse", source_layout=name)
    assert same(run(fused, "split", source_layout=name).arrays, source.arrays)
    with pytest.raises(PlanError, match="nothing to split"):
        make_plan(source, OUT, "split", Choices(source_layout=name))


def test_the_place_of_single_experts_is_that_of_all():
    source = MemoryReader(plain(projections(AT, *W)), config={"model_type": "new"}, format="orbax")
    fused = run(source, "prefuse", source_layout="per-expert-in-mlp")
    assert np.array_equal(fused.arrays[f"{AT}.experts.wi"], np.concatenate(W[:2], -1))
    assert same(run(fused, "split").arrays, source.arrays)


@EACH_TREE
@pytest.mark.parametrize("format", ["hf", "orbax"])
@pytest.mark.parametrize("sizes", [{"text_config": {"hidden_size": 6}}, {"moe_intermediate_size": 4}], ids=str)
def test_a_named_layout_is_checked_against_the_sizes_of_the_model(name, format, sizes):  # noqa: A002
    """The same names stored the other way round: `config.json` tells."""
    other = MemoryReader(tree(name, turned=not TREES[name][2]), config={"model_type": "qwen3_moe", **sizes}, format=format)
    with pytest.raises(PlanError, match="stored the other way round"):
        make_plan(other, OUT, "prefuse", Choices(source_layout=name))


@EACH_TREE
@pytest.mark.parametrize(
    ("n", "sizes", "told"),
    [(4, {"hidden_size": 6}, True), (4, {}, False), (6, {"hidden_size": 6}, False), (4, {"d": 6}, False)],
)
def test_what_nothing_can_tell_is_said_to_be_the_word_of_the_user(name, n, sizes, told):
    reader = MemoryReader(tree(name, gates=weights(2, 12, 6, n)), config={"model_type": "qwen3_moe", **sizes})
    made = make_plan(reader, OUT, "prefuse", Choices(source_layout=name))
    assert any(f"takes 6 inputs and gives {n} is what you say" in remark for remark in made.remarks) != told


@pytest.mark.parametrize(("said", "rows"), [("per-expert-lists", True), ("per-expert-lists-in-out", False)])
def test_what_modelopt_makes_of_dbrx_is_read_as_the_user_says(said, rows):
    """w1_linear, v1_linear and w2_linear are [out, in] or [in, out], by the version of transformers that ModelOpt ran with."""
    at, config = "transformer.blocks.2.ffn.experts", {"model_type": "dbrx", "d_model": 6}
    words = zip(("w1_linear", "v1_linear", "w2_linear"), W, strict=True)
    arrays = {f"{at}.mlp.{word}.{e}.weight": w[e].T if rows else w[e] for word, w in words for e in range(12)}
    arrays |= {name.replace("weight", "weight_scale_2"): np.full((), e, "u4") for e, name in enumerate(arrays)}
    refused(arrays, config, "does not know.*--source-layout: per-expert-lists, per-expert-lists-in-out")
    other = {"per-expert-lists": "per-expert-lists-in-out", "per-expert-lists-in-out": "per-expert-lists"}[said]
    refused(arrays, config, "stored the other way round", source_layout=other)
    source = MemoryReader(plain(arrays), config=config)
    fused = run(source, "prefuse", source_layout=said)
    assert np.array_equal(fused.arrays[f"{at}.wi"], np.concatenate(W[:2], -1))
    assert np.array_equal(fused.arrays[f"{at}.wi_scale_2"], np.arange(24).reshape(2, 12).T)
    assert same(run(fused, "split").arrays, source.arrays)


def test_odd_names_are_not_looked_through_for_each_other():
    """4,000 names that end as GGUF's do took half a minute."""

    class Unread(dict):
        def __iter__(self):
            raise AssertionError

    reader, family = MemoryReader({}), next(family for family in FAMILIES if family.name == "qwen3_moe")
    reader.tensors = Unread()
    Refusal(reader, family).unknown_expert("model.b7_exps")
