"""Biases, scales and packed weights: fused along the same axes as their projection, or refused with the reason."""

from pathlib import Path

import numpy as np
import pytest

from convert.errors import InputError, PlanError
from convert.options import Choices
from convert.planning.planner import make_plan
from convert.report import Report
from layouts.tensors import TensorSpec, bits
from tests.tiny import MemoryReader, run

E, K, N = 12, 512, 256
RNG = np.random.default_rng(1)
PLACE = "model.layers.3.mlp.experts"
WORDS = ("gate_proj", "up_proj", "down_proj")


def typed(arrays, codes, config) -> MemoryReader:
    """A reader whose tensors have the element types of `codes`, by the end of their names."""
    reader = MemoryReader(arrays, config=config)
    for name, array in arrays.items():
        code = next((code for end, code in codes.items() if name.endswith(end)), "F32")
        assert array.dtype == bits(code), (name, code)
        reader.tensors[name] = TensorSpec(name=name, dtype=code, shape=array.shape)
    return reader


def random(shape, code) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, bits(code).itemsize), dtype="u1").view(bits(code))[..., 0]


def checkpoint(parts, codes, *, n=N, config=None) -> MemoryReader:
    """Experts with these parts: word -> a function of (out, in) that gives the shape."""
    arrays = {}
    for e in range(E):
        for word in WORDS:
            out, into = (K, n) if word == "down_proj" else (n, K)
            for part, shape in parts.items():
                code = codes.get(part, "F32")
                arrays[f"{PLACE}.{e}.{word}.{part}"] = random(shape(out, into), code)
    stated = {"model_type": "deepseek_v3", "n_routed_experts": E} | (config or {})
    return typed(arrays, {f".{part}": code for part, code in codes.items()}, stated)


def round_trip(reader, **choices) -> dict[str, np.ndarray]:
    fused = run(reader, "prefuse", **choices)
    fused.tensors = {t.spec.name: t.spec for t in make_plan(reader, Path("out"), "prefuse", Choices(**choices)).targets}
    back = make_plan(fused, Path("out"), "split")
    assert {t.spec.name: (t.spec.dtype, t.spec.shape) for t in back.targets} == {
        name: (spec.dtype, spec.shape) for name, spec in reader.tensors.items()
    }
    again = run(fused, "split")
    assert again.arrays.keys() == reader.arrays.keys()
    assert all(np.array_equal(array, reader.arrays[name]) for name, array in again.arrays.items())
    return fused.arrays


@pytest.mark.parametrize("word", ["weight", "weight_packed", "qweight"])
def test_the_summary_counts_blocks_whatever_their_weights_are_called(word):
    code = "I32" if word == "qweight" else "U8"
    plan = make_plan(checkpoint({word: lambda out, into: (out, into // 8)}, {word: code}), Path("out"), "prefuse")
    assert ": 1 MoE block of 12 experts" in str(Report(plan=plan, seconds=1, resumed=0))


def pair(reader, part) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.stack([reader.arrays[f"{PLACE}.{e}.{word}.{part}"] for e in range(E)]) for word in WORDS[:2])  # type: ignore[return-value]


BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
FP8 = {"weight": "F8_E4M3", "weight_scale_inv": "F32"}
FP8_PARTS = {"weight": lambda o, i: (o, i), "weight_scale_inv": lambda o, i: (-(-o // 128), -(-i // 128))}


def test_fp8_blocks_fuse_with_their_weights():
    reader = checkpoint(FP8_PARTS, FP8, config=BLOCKS)
    gate, up = pair(reader, "weight_scale_inv")
    found = round_trip(reader)
    assert np.array_equal(found[f"{PLACE}.wi_scale_inv"], np.concatenate((gate, up), 1).swapaxes(1, 2))
    rows = round_trip(reader, layout="transformers")
    assert np.array_equal(rows[f"{PLACE}.gate_up_proj_scale_inv"], np.concatenate((gate, up), 1))
    shards = round_trip(reader, layout="per-shard", shards=2)
    turned = [w[:, s : s + 1].swapaxes(1, 2) for s in (0, 1) for w in (gate, up)]
    assert np.array_equal(shards[f"{PLACE}.wi_scale_inv"], np.concatenate(turned, -1))
    assert round_trip(reader, layout="vllm")[f"{PLACE}.w13_weight_scale_inv"].shape == (E, 4, 4)
    assert round_trip(reader, layout="lane")[f"{PLACE}.wi_scale_inv"].shape == (E, 4, 4)
    assert round_trip(reader, layout="fused-moe")[f"{PLACE}.w13_scale_inv"].shape == (E, 2, 4, 2)


def test_blocks_are_padded_and_take_turns_with_their_weights():
    """Five blocks of 64 columns: two to a turn of 128, and one in the last turn."""
    parts = {**FP8_PARTS, "weight_scale_inv": lambda o, i: (-(-o // 64), -(-i // 64))}
    reader = checkpoint(parts, FP8, n=320, config={"quantization_config": {"weight_block_size": [64, 64]}})
    gate, up = (np.pad(w.swapaxes(1, 2), ((0, 0), (0, 0), (0, 1))) for w in pair(reader, "weight_scale_inv"))
    turns = [w[..., at : at + 2] for at in (0, 2, 4) for w in (gate, up)]
    found = round_trip(reader, layout="lane", align=128)
    assert np.array_equal(found[f"{PLACE}.wi_scale_inv"], np.concatenate(turns, -1))
    assert found[f"{PLACE}.wi"].shape[-1] == 2 * 384


@pytest.mark.parametrize(
    ("n", "config", "choices", "words"),
    [
        (192, BLOCKS, {}, "a block of 128 would lie across gate and up: n is 192"),
        (N, BLOCKS, {"layout": "per-shard", "shards": 4}, "n = 2 does not divide into s = 4"),
        (N, BLOCKS, {"layout": "interleaved"}, "takes gate and up in turn"),
        (N, BLOCKS, {"layout": "glu32"}, "a block of 128 would lie across"),
        (300, BLOCKS, {"layout": "lane", "align": 128}, "a block of 128 would lie across gate and up: n is 300"),
        (N, {}, {}, "config.json states no weight_block_size"),
        (N, {"quantization_config": {"weight_block_size": [64, 128]}}, {}, "no weight_block_size that explains them"),
    ],
)
def test_blocks_that_would_be_torn_are_refused(n, config, choices, words):
    with pytest.raises(PlanError, match=words):
        make_plan(checkpoint(FP8_PARTS, FP8, n=n, config=config), Path("out"), "prefuse", Choices(**choices))


def test_a_block_size_is_never_inferred_from_the_grid():
    """192 rows in a grid of 2 would be blocks of 96, which is what transformers makes of it; they are 128 and 64."""
    reader = checkpoint(FP8_PARTS, FP8, n=192, config=BLOCKS)
    assert reader.arrays[f"{PLACE}.0.gate_proj.weight_scale_inv"].shape[0] == 2
    with pytest.raises(PlanError, match="lie across gate and up"):
        make_plan(reader, Path("out"), "prefuse")


@pytest.mark.parametrize("shape", [lambda o, _: (o, 1), lambda o, _: (o,), lambda o, i: (o, i // 32)])
def test_scales_of_channels_and_of_groups_fuse(shape):
    reader = checkpoint({"weight": lambda o, i: (o, i), "weight_scale": shape}, {"weight": "F8_E4M3", "weight_scale": "BF16"})
    gate, up = pair(reader, "weight_scale")
    scale = round_trip(reader)[f"{PLACE}.wi_scale"]
    both = np.concatenate((gate, up), 1)
    assert np.array_equal(scale, both.swapaxes(1, 2) if both.ndim == 3 else both)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_each_projection_stays_two(shape):
    parts = {"weight": lambda o, i: (o, i), "weight_scale": lambda *_: shape, "input_scale": lambda *_: shape}
    reader = checkpoint(parts, {"weight": "F8_E4M3"})
    gate, up = pair(reader, "weight_scale")
    wanted = np.stack((gate, up), 1).reshape(E, 2)
    assert np.array_equal(round_trip(reader)[f"{PLACE}.wi_scale"], wanted)
    assert np.array_equal(round_trip(reader, layout="vllm")[f"{PLACE}.w13_weight_scale"], wanted)
    with pytest.raises(PlanError, match=r"one number for gate.*would change values.*\(E, 2\)"):
        make_plan(reader, Path("out"), "prefuse", Choices(layout="transformers"))


INT4 = {
    "weight_packed": lambda o, i: (o, i // 8),
    "weight_scale": lambda o, i: (o, i // 32),
    "weight_shape": lambda *_: (2,),
}


@pytest.mark.parametrize("layout", ["concat", "transformers", "vllm", "flashinfer"])
def test_int4_keeps_its_rows(layout):
    reader = checkpoint(INT4, {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I32"})
    gate, up = pair(reader, "weight_packed")
    found = round_trip(reader, layout=layout)
    (wi,) = (array for name, array in found.items() if name.endswith(("wi_packed", "gate_up_proj_packed", "w13_weight_packed")))
    assert np.array_equal(wi, np.concatenate((up, gate) if layout == "flashinfer" else (gate, up), 1))
    (scale,) = (array for name, array in found.items() if name.endswith(("wi_scale", "gate_up_proj_scale", "w13_weight_scale")))
    assert scale.shape == (E, 2 * N, K // 32), "scales lie as the packed values do"


def test_packed_values_are_not_padded_along_the_packed_axis():
    reader = checkpoint(INT4, {"weight_packed": "I32", "weight_scale": "BF16", "weight_shape": "I32"})
    with pytest.raises(PlanError, match="packed along the axis that would be padded"):
        make_plan(reader, Path("out"), "prefuse", Choices(layout="fused-moe"))


def test_nvfp4_keeps_its_rows_and_its_two_scalars():
    parts = {
        "weight": lambda o, i: (o, i // 2), "weight_scale": lambda o, i: (o, i // 16),
        "weight_scale_2": lambda *_: (), "input_scale": lambda *_: (),
    }  # fmt: skip
    reader = checkpoint(parts, {"weight": "U8", "weight_scale": "F8_E4M3"})
    found = round_trip(reader)
    assert found[f"{PLACE}.wi"].shape == (E, 2 * N, K // 2)
    assert found[f"{PLACE}.wi_scale"].shape == (E, 2 * N, K // 16)
    assert found[f"{PLACE}.wi_scale_2"].shape == (E, 2)


@pytest.mark.parametrize(
    ("parts", "codes", "wanted"),
    [
        ({"weight": lambda o, i: (o, i), "weight_scale_inv": lambda o, i: (o, i // 32)},
         {"weight": "F8_E4M3", "weight_scale_inv": "U8"}, {"wi": (E, K, 2 * N), "wi_scale_inv": (E, K // 32, 2 * N)}),
        ({"weight": lambda o, i: (o, i // 2), "scale": lambda o, i: (o, i // 32)},
         {"weight": "I8", "scale": "F8_E8M0"}, {"wi": (E, 2 * N, K // 2), "wi_block_scale": (E, 2 * N, K // 32)}),
        ({"weight": lambda o, i: (o, i), "qscale_weight": lambda o, _: (o, 1)},
         {"weight": "F8_E4M3"}, {"wi": (E, K, 2 * N), "wi_qscale": (E, 1, 2 * N)}),
        ({"qweight": lambda o, i: (i // 8, o), "qzeros": lambda o, i: (i // 128, o // 8),
          "scales": lambda o, i: (i // 128, o), "g_idx": lambda _, i: (i,)},
         {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"},
         {"wi_qweight": (E, K // 8, 2 * N), "wi_qzeros": (E, K // 128, 2 * N // 8), "wi_scales": (E, K // 128, 2 * N)}),
        ({"qweight": lambda o, i: (i, o // 8), "qzeros": lambda o, i: (i // 128, o // 8), "scales": lambda o, i: (i // 128, o)},
         {"qweight": "I32", "qzeros": "I32", "scales": "F16"}, {"wi_qweight": (E, K, 2 * N // 8)}),
    ],
    ids=["mxfp8", "deepseek-v4 fp4", "mistral qscale", "gptq", "awq"],
)  # fmt: skip
def test_every_scheme_fuses_and_comes_back(parts, codes, wanted):
    found = round_trip(checkpoint(parts, codes))
    for name, shape in wanted.items():
        assert found[f"{PLACE}.{name}"].shape == shape


def test_mxfp4_of_gpt_oss_is_sorted_by_rows():
    arrays, place = {}, "model.layers.3.mlp.experts"
    shapes = {
        "gate_up_proj_blocks": (E, 2 * N, K // 32, 16), "gate_up_proj_scales": (E, 2 * N, K // 32),
        "gate_up_proj_bias": (E, 2 * N),
        "down_proj_blocks": (E, K, N // 32, 16), "down_proj_scales": (E, K, N // 32), "down_proj_bias": (E, K),
    }  # fmt: skip
    codes = {"_blocks": "U8", "_scales": "U8", "_bias": "BF16"}
    for name, shape in shapes.items():
        arrays[f"{place}.{name}"] = random(shape, codes["_" + name.rpartition("_")[2]])
    reader = typed(arrays, codes, {"model_type": "gpt_oss", "num_local_experts": E})
    found = round_trip(reader)
    for part in ("blocks", "scales", "bias"):
        rows = arrays[f"{place}.gate_up_proj_{part}"]
        assert np.array_equal(found[f"{place}.wi_{part}"], np.concatenate((rows[:, ::2], rows[:, 1::2]), 1))
    assert np.array_equal(found[f"{place}.wo_blocks"], arrays[f"{place}.down_proj_blocks"])


@pytest.mark.parametrize("name", ["weight.absmaxes", "weight_scale_3", "weight_scale_inv_", "weights"])
def test_a_companion_that_nobody_knows_is_refused(name):
    reader = checkpoint({"weight": lambda o, i: (o, i)}, {"weight": "BF16"})
    arrays = reader.arrays | {f"{PLACE}.0.gate_proj.{name}": np.zeros(3, "u1")}
    with pytest.raises(PlanError, match="is an expert tensor that family deepseek_v3 does not know"):
        make_plan(MemoryReader(arrays, config=reader.config), Path("out"), "prefuse")


def test_a_lost_scale_is_missed():
    reader = checkpoint(FP8_PARTS, FP8, config=BLOCKS)
    name = f"{PLACE}.7.up_proj.weight_scale_inv"
    del reader.arrays[name], reader.tensors[name]
    with pytest.raises(InputError, match=rf"{name} is missing"):
        make_plan(reader, Path("out"), "prefuse")


def test_a_layer_that_lost_all_its_scales_is_missed():
    reader = checkpoint(FP8_PARTS, FP8, config=BLOCKS)
    other = {name.replace(".3.", ".4.", 1): array for name, array in reader.arrays.items() if not name.endswith("scale_inv")}
    both = typed(reader.arrays | other, {f".{part}": code for part, code in FP8.items()}, reader.config)
    with pytest.raises(InputError, match=r"has a scale_inv beside it and .*layers\.4.* has none"):
        make_plan(both, Path("out"), "prefuse")


def test_companions_of_another_number_of_experts_are_refused():
    reader = checkpoint({"weight": lambda o, i: (o, i)}, {"weight": "BF16"}, config={"n_routed_experts": None})
    arrays = reader.arrays | {f"{PLACE}.{e}.{w}.bias": np.zeros(3, "u2") for e in range(E) for w in WORDS}
    with pytest.raises(PlanError, match="do not belong together"):
        make_plan(MemoryReader(arrays, config=reader.config), Path("out"), "prefuse")
