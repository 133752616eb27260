"""Which family it is: `config.json` at any depth, then names that have one meaning, and never a shape."""

from pathlib import Path

import numpy as np
import pytest

from convert.errors import ConvertError, PlanError
from convert.options import Choices
from convert.planning.planner import make_plan
from layouts.language.template import Template
from tests.layouts.by_hand import weights
from tests.layouts.by_hand.styles import in_out, linear, mlx, out_in, projections, w123
from tests.tiny import MemoryReader, run, same

OUT = Path("out")


def arrays_of(style, at="model.layers.{}.mlp", layers=(2, 11), n=4):
    found = {"lm_head.weight": np.arange(5, dtype="u4")}
    for layer in layers:
        found |= style(at.format(layer), *weights(layer, 12, 6, n))
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def plan(arrays, config, **choices):
    return make_plan(MemoryReader(arrays, config=config), OUT, "prefuse", Choices(**choices))


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen3_moe"}}, "qwen3_moe"),
        ({"model_type": "interns1", "text_config": {"model_type": "qwen3_moe"}, "v": {"model_type": "x"}}, "qwen3_moe"),
        ({"model_type": "kimi_vl", "text_config": {"model_type": "deepseek_v3"}}, "deepseek_v3"),
        ({"model_type": "deepseek_vl_v2", "language_config": {"model_type": "deepseek_v2"}}, "deepseek_v2"),
        ({"model_type": "omni", "thinker_config": {"text_config": {"model_type": "glm4_moe"}}}, "glm4_moe"),
        ({"model_type": "y", "vision_config": {"model_type": "vitpose_backbone"}, "llm": {"model_type": "olmoe"}}, "olmoe"),
        ({"a": {"model_type": "olmoe"}, "b": {"model_type": "dots1"}, "c": {"model_type": "jamba"}}, None),
        ({"a": {"model_type": "jamba"}, "b": {"model_type": "dots1"}}, "dots1"),
        ({"model_type": "qwen3_moe", "draft": {"model_type": "mixtral"}}, "qwen3_moe"),
        ({"model_type": "z", "text_config": {"model_type": {"model_type": 5}}, "list": [{"model_type": "olmoe"}]}, None),
    ],
)  # fmt: skip
def test_config_names_the_family_at_any_depth(config, family):
    """Parts without experts may be of any kind; of several that are known the names must choose one, else they tell alone."""
    made = plan(arrays_of(projections, "language_model.model.layers.{}.mlp"), config)
    assert made.family == (family or "per-expert")
    assert [text for text in made.remarks if "family" in text] == ([] if family else ["family told by names: per-expert"])


@pytest.mark.parametrize("config", [{}, {"model_type": "somebodys_moe"}, {"text_config": {"model_type": "qwen3"}}], ids=str)
@pytest.mark.parametrize("n", [4, 6], ids=["", "square"])
@pytest.mark.parametrize(
    ("style", "at", "family"),
    [
        (projections, "model.layers.{}.mlp", "per-expert"),
        (projections, "decoder.h.{}.block.moe", "per-expert"),
        (w123, "layers.{}", "per-expert-w123"),
        (w123, "a.very.deep.model.layers.{}.ffn", "per-expert-w123"),
        (mlx, "model.layers.{}.mlp", "mlx"),
        (mlx, "language_model.model.layers.{}.block_sparse_moe", "mlx"),
        (mlx, "layers.{}", "mlx"),
    ],
)
def test_names_with_one_meaning_tell_the_family(config, style, at, family, n):
    source = MemoryReader(arrays_of(style, at, n=n), config=config)
    assert plan(source.arrays, config).remarks[0] == f"family told by names: {family}"
    fused = run(source, "prefuse")
    gate, up, down = weights(11, 12, 6, n)
    assert np.array_equal(fused.arrays[f"{at.format(11)}.experts.wi"], np.concatenate((gate, up), -1))
    assert np.array_equal(fused.arrays[f"{at.format(11)}.experts.wo"], down)
    assert same(run(fused, "split").arrays, source.arrays)
    assert same(run(fused, "split", family="qwen3_moe").arrays, source.arrays), "what the user says later changes nothing"
    assert fused.record["family"] == family


def renamed(arrays, *pairs):
    found = {}
    for name, array in arrays.items():
        for old, new in pairs:
            name = name.replace(old, new)
        found[name] = array
    return found


TWO = arrays_of(projections, layers=(2,)) | arrays_of(w123, layers=(11,))
NO_GATE = {name: array for name, array in arrays_of(projections).items() if "gate_proj" not in name}
NO_DOWN = {name: array for name, array in arrays_of(w123).items() if ".w2." not in name}
HALF_FUSED = arrays_of(projections, layers=(2,)) | arrays_of(out_in, layers=(11,))


@pytest.mark.parametrize(
    "arrays",
    [
        arrays_of(out_in),
        arrays_of(in_out),
        arrays_of(linear),
        TWO,
        NO_GATE,
        NO_DOWN,
        HALF_FUSED,
        renamed(arrays_of(projections), (".experts.", ".shared_experts.")),
        renamed(arrays_of(projections), (".mlp.experts.", ".mlps.")),
        renamed(arrays_of(w123), (".w3.", ".v1.")),
        renamed(arrays_of(projections), ("gate_proj", "gate_up_proj")),
        renamed(arrays_of(projections), ("gate_proj", "linear_fc0")),
    ],
    ids=["out_in", "in_out", "linear", "two", "no gate", "no down", "half", "shared", "mlps", "v1", "gate_up", "no word"],
)
@pytest.mark.parametrize("config", [{}, {"model_type": "somebodys_moe"}])
def test_names_with_several_meanings_or_none_do_not(arrays, config):
    with pytest.raises(ConvertError) as error:
        plan(arrays, config)
    assert error.value.exit_code == 4


def test_an_error_names_only_layouts_that_know_the_tensor_it_is_about():
    with pytest.raises(PlanError, match=r"looks like layout 'transformers' or 'fused-out-in' or (?!.*per-expert)"):
        plan(HALF_FUSED, {"model_type": "somebodys_moe"}, family="per-expert")


@pytest.mark.parametrize("part", ["text_config", "llm_config"])
def test_a_part_without_a_gate_is_refused_only_where_there_is_none(part):
    config = {"model_type": "nemo", part: {"model_type": "nemotron_h"}}
    with pytest.raises(PlanError, match="no gate, so there is nothing to fuse"):
        plan(NO_GATE, config)
    assert plan(arrays_of(projections), config).family == "per-expert"


def test_a_part_that_the_names_contradict_is_refused_with_the_way_out():
    arrays, config = arrays_of(w123), {"model_type": "x", "text_config": {"model_type": "jamba"}}
    with pytest.raises(PlanError, match=r"names as in mixtral.*, per-expert-w123: if it is one of these, say so with --family"):
        plan(arrays, config)
    assert plan(arrays, config, family="per-expert-w123").family == "per-expert-w123"


@pytest.mark.parametrize("name", ["layers.3.experts.w1", "layers.3.ffn.experts.w1", "a.b.9.c.d.e.experts.w1"])
def test_modules_that_may_be_there_are_told_and_written_again(name):
    key = Template("{path}.{l}.{within:?}experts.w1")
    assert key.render(key.parse(name)) == name


@pytest.mark.parametrize(
    "name", ["layers.3.xexperts.w1", "layers.3..experts.w1", "layers.3.a.b.c.d.experts.w1", "3.experts.w1"]
)
def test_modules_end_with_a_dot_and_are_few(name):
    assert Template("{path}.{l}.{within:?}experts.w1").parse(name) is None
