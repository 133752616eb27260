"""What quantisers save whatever the family publishes, three projections of each expert; numbers for gate and up together."""

from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError, PlanError
from convert.options import Choices
from convert.planning.planner import make_plan
from tests.layouts.by_hand import MODELS, config, weights
from tests.layouts.by_hand.styles import projections, up_first, w13_interleaved, w123
from tests.tiny import MemoryReader, run, same

OUT = Path("out")
OTHERS = (
    "mixtral", "deepseek_v4", "lfm2_moe", "mistral_large4", "gpt_oss", "llama4", "aria", "qwen3_vl_moe", "gemma4", "hy_v4",
    "inkling", "openai_privacy_filter", "qwen3_5_moe", "hunyuan", "granitemoe_swa", "granitemoe", "jetmoe", "step3p5",
    "step of transformers", "dbrx", "smallthinker", "grok-1", "yuan2", "lara_mini", "zaya", "mistral4", "muse_spark",
    "hy_v4_vl", "llama_moe", "zaya as published", "interns2_mobius", "iquest_q1",
)  # fmt: skip
WORDS = {"granitemoe": "input_linear.weight", "aria": "experts.fc1.weight"}


def unfused(name, kind="", **stated):
    """Each projection with its scale, as compressed-tensors and ModelOpt have them below the module that held the experts."""
    model = MODELS[name]
    arrays = {"lm_head.weight": np.arange(5, dtype="u4")}
    for layer in (2, 11):
        found = projections(model.at.format(layer), *weights(layer, 12, 6, 4))
        arrays |= found | {n.replace(".weight", ".weight_scale"): a[:, :1] + 1 for n, a in found.items()}
    arrays = {n: np.ascontiguousarray(a) for n, a in arrays.items()}
    return MemoryReader(arrays, config=config(model, kind or model.types[0], 12) | stated)


@pytest.mark.parametrize("name", OTHERS)
def test_the_row_is_tried_for_every_family(name):
    source, model = unfused(name), MODELS[name]
    planned = make_plan(source, OUT, "prefuse")
    assert not any("family" in text for text in planned.remarks)
    assert source.config["model_type"] in model.types
    fused, place = run(source, "prefuse"), (model.fused or f"{model.at}.experts").format(11)
    gate, up, down = weights(11, 12, 6, 4)
    assert np.array_equal(fused.arrays[f"{place}.wi"], np.concatenate((gate, up), -1))
    assert np.array_equal(fused.arrays[f"{place}.wo"], down)
    assert np.array_equal(fused.arrays[f"{place}.wi_scale"], np.concatenate((gate, up), -1)[:, :1] + 1)
    assert same(run(fused, "split").arrays, source.arrays)


@pytest.mark.parametrize("name", WORDS)
def test_what_transformers_loads_has_the_names_of_the_family(name):
    fused = run(unfused(name), "prefuse", layout="transformers").arrays
    gate, up, _ = weights(11, 12, 6, 4)
    wi = next(array for name_, array in fused.items() if ".11." in name_ and name_.endswith(WORDS[name]))
    both = np.concatenate((gate, up), -1)
    assert np.array_equal(wi, both if name == "aria" else both.swapaxes(1, 2))


@pytest.mark.parametrize("name", OTHERS)
def test_a_projection_that_is_missing_is_named(name):
    source = unfused(name)
    for word in ("gate_proj", "down_proj"):
        lost = next(n for n in source.arrays if f".7.{word}.weight" in n)
        arrays = {n: a for n, a in source.arrays.items() if n != lost}
        with pytest.raises(InputError, match=f"{lost} is missing"):
            make_plan(MemoryReader(arrays, config=source.config), OUT, "prefuse")


def test_both_at_once_are_refused():
    """Up first in one tensor, and apart: the same weights twice."""
    both = up_first("model.layers.2.mlp", *weights(2, 12, 6, 4)) | projections("model.layers.2.mlp", *weights(2, 12, 6, 4))
    arrays = {n: np.ascontiguousarray(a) for n, a in both.items()}
    with pytest.raises(PlanError, match="hold the same weights in two layouts"):
        make_plan(MemoryReader(arrays, config={"model_type": "hunyuan"}), OUT, "prefuse")


def test_other_words_are_no_row_of_every_family():
    """w1 and w3 where the family has no such words are refused: only the quantisers' words are the same for all."""
    arrays = {n: np.ascontiguousarray(a) for n, a in w123("model.layers.2.mlp", *weights(2, 12, 6, 4)).items()}
    with pytest.raises(PlanError, match="an expert tensor that family qwen3_5_moe does not know"):
        make_plan(MemoryReader(arrays, config={"model_type": "qwen3_5_moe"}), OUT, "prefuse")


def test_single_experts_need_no_version_of_transformers():
    source = unfused("qwen3_vl_moe")
    del source.config["transformers_version"]
    assert same(run(run(source, "prefuse"), "split").arrays, source.arrays)


NVFP4 = ("amax", "outer_scale_denominator")


def inkling(shape=(12,)):
    found = w13_interleaved("model.llm.layers.2.mlp", *weights(2, 12, 6, 4))
    for number, (name, array) in enumerate(list(found.items())):
        found[f"{name}_scale"] = array[..., ::2] + 7
        for other, word in enumerate(NVFP4):
            found[f"{name}_{word}"] = np.arange(np.prod(shape), dtype="u4").reshape(shape) + 1000 * (2 * number + other)
    arrays = {name: np.ascontiguousarray(array) for name, array in found.items()}
    return MemoryReader(arrays, config={"model_type": "inkling2_loop", "text_config": {"n_routed_experts": 12}})


@pytest.mark.parametrize("layout", ["concat", "transformers", "vllm", "interleaved"])
def test_one_number_for_gate_and_up_comes_along(layout):
    """Inkling2-Loop: an expert has one amax and one denominator for both, so that nothing is taken apart."""
    source = inkling()
    fused = run(source, "prefuse", layout=layout)
    for word in NVFP4:
        name = next(n for n in fused.arrays if n.endswith(f"_{word}") and "down" not in n and "w2" not in n and "wo" not in n)
        assert np.array_equal(fused.arrays[name], source.arrays[f"model.llm.layers.2.mlp.experts.w13_weight_{word}"])
    assert same(run(fused, "split").arrays, source.arrays)


def test_one_number_for_both_is_never_taken_apart():
    """A record that is lost: the family's own layout has gate and up apart, and one number cannot be in two places."""
    fused = run(inkling(), "prefuse", layout="transformers").arrays
    arrays = {name.replace("model.llm", "model"): array for name, array in fused.items()}
    config = {"model_type": "qwen3_moe", "num_experts": 12}
    with pytest.raises(PlanError, match="one number for gate and up"):
        make_plan(MemoryReader(arrays, config=config), OUT, "split", Choices())


@pytest.mark.parametrize("shape", [(11,), (12, 3), (12, 2, 2)])
def test_numbers_for_other_experts_are_refused(shape):
    with pytest.raises((PlanError, InputError)):
        make_plan(inkling(shape), OUT, "prefuse")


def test_a_list_of_counts_is_for_its_layers():
    """Dots 3 Note: the layers of the vision encoder have more and more experts, and the list says how many."""
    arrays = {}
    for layer, count in ((3, 4), (4, 8)):
        gate, up, down = (w[:count] for w in weights(layer, 12, 6, 4))
        arrays |= {n.replace("up_proj", "fc3").replace("gate_proj", "fc1").replace("down_proj", "fc2"): np.ascontiguousarray(a)
                   for n, a in projections(f"vision_encoder.blocks.{layer}.mlp", gate, up, down).items()}  # fmt: skip
    stated = {"model_type": "dots3_note", "n_routed_experts": 12, "vision_config": {"pyramid_num_routed": [-1, -1, -1, 4, 8]}}
    source = MemoryReader(arrays, config=stated)
    fused = run(source, "prefuse")
    assert fused.arrays["vision_encoder.blocks.3.mlp.experts.wi"].shape == (4, 6, 8)
    assert same(run(fused, "split").arrays, arrays)
    lost = {name: array for name, array in arrays.items() if ".blocks.3.mlp.experts.3." not in name}
    with pytest.raises(InputError, match=r"blocks\.3\.mlp\.experts\.3\.\w+\.weight is missing"):
        make_plan(MemoryReader(lost, config=stated), OUT, "prefuse")
