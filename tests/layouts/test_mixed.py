"""What real checkpoints do to a table: two layouts in one, one name for two layouts, names that only look like experts."""

from pathlib import Path

import numpy as np
import pytest

import convert
from convert.errors import InputError, PlanError
from convert.options import Choices
from convert.planning.planner import make_plan
from tests.layouts.by_hand import MODELS, config, tensors, weights
from tests.layouts.by_hand.styles import in_out, interleaved, out_in, projections
from tests.tiny import MemoryReader, checkpoint, run, same

OUT = Path("out")
QWEN35, VL = MODELS["qwen3_5_moe"], MODELS["qwen3_vl_moe"]


def concat(layer: int, e: int = 12, k: int = 6, n: int = 4) -> np.ndarray:
    gate, up, _ = weights(layer, e, k, n)
    return np.concatenate((gate, up), -1)


def test_a_fused_decoder_with_an_mtp_block_of_single_experts():
    """Qwen3.5 as published; decided for each block, and put back so."""
    arrays = (
        tensors(QWEN35) | projections("mtp.layers.0.mlp", *weights(5, 12, 6, 4)) | {"mtp.norm.weight": np.arange(3, dtype="u4")}
    )
    source = MemoryReader(arrays, config=config(QWEN35, "qwen3_5_moe", 12))
    for layout in ("concat", "transformers", "vllm", "per-shard"):
        fused = run(source, "prefuse", layout=layout)
        assert same(run(fused, "split").arrays, arrays)
        twice = run(run(source, "prefuse", layout="flashinfer"), "prefuse", layout=layout)
        assert same(twice.arrays, fused.arrays)
        assert same(run(twice, "split").arrays, arrays)
    assert np.array_equal(run(source, "prefuse").arrays["mtp.layers.0.mlp.experts.wi"], concat(5))


def test_a_checkpoint_of_which_some_layers_are_fused():
    at = "model.layers.{}.mlp"
    arrays = projections(at.format(1), *weights(1, 12, 6, 4)) | out_in(at.format(2), *weights(2, 12, 6, 4))
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    source = MemoryReader(arrays, config={"model_type": "qwen3_moe", "num_experts": 12})
    fused = run(source, "prefuse")
    for layer in (1, 2):
        assert np.array_equal(fused.arrays[f"model.layers.{layer}.mlp.experts.wi"], concat(layer))
    assert same(run(fused, "split").arrays, arrays)
    plan = make_plan(source, OUT, "prefuse", Choices(layout="transformers"))
    assert {target.moved for target in plan.targets} == {True, False}


@pytest.mark.parametrize(("version", "style"), [("4.57.1", in_out), ("5.0.0", out_in), ("6.1", out_in)])
def test_one_name_for_two_layouts_is_told_by_who_wrote_it(version, style):
    """Square: 2N == K, so that no shape helps."""
    arrays = {n: np.ascontiguousarray(a) for n, a in style("model.language_model.layers.1.mlp", *weights(1, 12, 8, 4)).items()}
    source = MemoryReader(arrays, config=config(VL, "qwen3_vl_moe", 12) | {"transformers_version": version})
    assert np.array_equal(run(source, "prefuse").arrays["model.language_model.layers.1.mlp.experts.wi"], concat(1, k=8))


@pytest.mark.parametrize(("name", "style"), [("fused-in-out", in_out), ("fused-out-in", out_in)])
def test_where_nobody_says_who_wrote_it_the_user_must(name, style):
    arrays = {n: np.ascontiguousarray(a) for n, a in style("model.language_model.layers.1.mlp", *weights(1, 12, 8, 4)).items()}
    stated = {key: value for key, value in config(VL, "qwen3_vl_moe", 12).items() if key != "transformers_version"}
    source = MemoryReader(arrays, config=stated)
    with pytest.raises(PlanError, match=r"--source-layout=fused-in-out.*--source-layout=fused-out-in"):
        make_plan(source, OUT, "prefuse")
    fused = run(source, "prefuse", source_layout=name)
    assert np.array_equal(fused.arrays["model.language_model.layers.1.mlp.experts.wi"], concat(1, k=8))


@pytest.mark.parametrize(("kind", "style"), [("gpt_oss", interleaved), ("openai_privacy_filter", in_out)])
def test_interleaved_and_concatenated_under_the_same_names(kind, style):
    gate, up, down = weights(1, 12, 6, 6)
    arrays = {name: np.ascontiguousarray(array) for name, array in style("model.layers.1.mlp", gate, up, down).items()}
    source = MemoryReader(arrays, config={"model_type": kind, "num_local_experts": 12})
    assert np.array_equal(run(source, "prefuse").arrays["model.layers.1.mlp.experts.wi"], concat(1, n=6))


def test_a_model_of_two_parts_with_experts_of_two_kinds():
    """Qwen3-Omni: thinker and talker have their own numbers and widths."""
    thinker, talker = weights(1, 12, 6, 4), weights(2, 4, 10, 2)
    arrays = projections("thinker.model.layers.1.mlp", *thinker) | projections("talker.model.layers.1.mlp", *talker)
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    stated = {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": {"num_experts": 12}},
              "talker_config": {"text_config": {"num_experts": 4}}}  # fmt: skip
    source = MemoryReader(arrays, config=stated)
    for layout in ("concat", "fused-moe", "gmm-ep"):
        fused = run(source, "prefuse", layout=layout)
        assert same(run(fused, "split").arrays, arrays)
    assert run(source, "prefuse").arrays["talker.model.layers.1.mlp.experts.wi"].shape == (4, 10, 4)
    lost = "talker.model.layers.1.mlp.experts.3.up_proj.weight"
    arrays = {name: array for name, array in arrays.items() if name != lost}
    with pytest.raises(InputError, match=lost):
        make_plan(MemoryReader(arrays, config=stated), OUT, "prefuse")


def test_layers_behind_the_last_are_converted_like_the_rest():
    """DeepSeek-V3's MTP block is `model.layers.61`, one more than num_hidden_layers."""
    deepseek = MODELS["deepseek"]
    arrays = tensors(deepseek, layers=(60, 61)) | {"model.layers.61.eh_proj.weight": np.arange(4, dtype="u4")}
    arrays |= {f"model.layers.{layer}.input_layernorm.weight": np.zeros(2, "u4") for layer in range(60)}
    source = MemoryReader(
        arrays, config=config(deepseek, "deepseek_v3", 12) | {"num_hidden_layers": 61, "first_k_dense_replace": 60}
    )
    fused = run(source, "prefuse")
    assert np.array_equal(fused.arrays["model.layers.61.mlp.experts.wi"], concat(61))
    assert "model.layers.61.eh_proj.weight" in fused.arrays
    assert same(run(fused, "split").arrays, arrays)


def test_a_router_may_have_more_rows_than_there_are_experts():
    """LongCat: some experts are the identity and have no weights."""
    longcat = MODELS["longcat_flash"]
    arrays = tensors(longcat) | {"model.layers.2.mlp.router.classifier.weight": np.zeros((12 + 4, 6), "u4")}
    source = MemoryReader(arrays, config=config(longcat, "longcat_flash", 12) | {"zero_expert_num": 4})
    assert same(run(run(source, "prefuse"), "split").arrays, arrays)


def idle(more, e=12):
    """LongCat as transformers 5 holds it: gate and up of experts that are the identity, which have no down."""
    arrays = {}
    for layer in (2, 11):
        held, down = out_in(f"model.layers.{layer}.mlp", *weights(layer, e + more, 6, 4)), weights(layer, e, 6, 4)[2]
        arrays |= held | {f"model.layers.{layer}.mlp.experts.down_proj": down.swapaxes(1, 2)}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return MemoryReader(arrays, config=config(MODELS["longcat_flash"], "longcat_flash", 12) | {"zero_expert_num": 4})


def test_experts_that_are_the_identity_may_have_rows_of_gate_and_up():
    source = idle(4)
    fused = run(source, "prefuse")
    gate, up, _ = weights(11, 16, 6, 4)
    assert np.array_equal(fused.arrays["model.layers.11.mlp.experts.wi"], np.concatenate((gate, up), -1))
    assert np.array_equal(fused.arrays["model.layers.11.mlp.experts.wo"], weights(11, 12, 6, 4)[2])
    assert same(run(fused, "split").arrays, source.arrays)


@pytest.mark.parametrize(("more", "e", "config"), [(3, 12, {}), (5, 12, {}), (4, 11, {}), (4, 12, {"zero_expert_num": 0})])
def test_other_experts_without_down_are_missing_ones(more, e, config):
    source = idle(more, e)
    source.config |= config
    with pytest.raises(InputError, match=r"experts, but config\.json says 12"):
        make_plan(source, OUT, "prefuse")


def test_all_of_them_with_down_are_too_many():
    with pytest.raises(PlanError, match="do not fit together"):
        make_plan(idle(0, 16), OUT, "prefuse")


def test_a_bit_of_an_idle_row_is_compared(tmp_path):
    """No expert reads it, and it is in the file all the same."""
    for name in ("one", "other"):
        source = idle(4)
        if name == "other":
            source.arrays["model.layers.11.mlp.experts.gate_up_proj"][14, 3, 2] ^= 1
        checkpoint(tmp_path / name, source.arrays, source.config)
    report = convert.verify(tmp_path / "one", tmp_path / "other", gemm=False)
    assert not report.equal
    assert "layer 11, expert 14, gate" in str(report)


def test_a_missing_expert_is_named():
    model = MODELS["deepseek"]
    lost = "model.layers.11.mlp.experts.11.gate_proj.weight"
    arrays = {name: array for name, array in tensors(model).items() if name != lost}
    with pytest.raises(InputError, match=f"{lost} is missing") as error:
        make_plan(MemoryReader(arrays, config=config(model, "deepseek_v3", 12)), OUT, "prefuse")
    assert error.value.exit_code == 3


def test_a_whole_last_expert_is_missed_by_what_config_says():
    model = MODELS["deepseek"]
    arrays = {name: array for name, array in tensors(model).items() if ".experts.11." not in name}
    with pytest.raises(InputError, match=r"experts\.11\.\w+\.weight is missing"):
        make_plan(MemoryReader(arrays, config=config(model, "deepseek_v3", 12)), OUT, "prefuse")
