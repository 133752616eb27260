"""Every form in which companions are published, on the disk: fused where it should be, the very bytes again, proven between."""

import json
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.errors import InputError, PlanError
from layouts.tensors import bits

E, K, N = 3, 256, 128
PER_EXPERT = {"model_type": "deepseek_v3", "n_routed_experts": E, "hidden_size": K}
LLAMA = {"model_type": "llama4", "text_config": {"model_type": "llama4_text", "num_local_experts": E, "hidden_size": K}}
QWEN = {"model_type": "qwen3_moe", "num_experts": E, "hidden_size": K}
STEP = {"model_type": "step3p5", "moe_num_experts": E, "hidden_size": K}
BLOCKS = {"quantization_config": {"weight_block_size": [128, 128]}}
MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}}
PLACES = {"deepseek_v3": "mlp.experts", "llama4": "feed_forward.experts", "qwen3_moe": "mlp.switch_mlp", "step3p5": "moe"}


def write(path: Path, tensors, config) -> Path:
    """A checkpoint of one file by hand: name -> (code, shape)."""
    rng, header, data = np.random.default_rng(7), {}, b""
    for name, (code, shape) in tensors.items():
        raw = rng.integers(0, 256, int(np.prod(shape)) * bits(code).itemsize, dtype="u1").tobytes()
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.mkdir()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (path / "config.json").write_text(json.dumps(config))
    return path


def header(path: Path):
    data = (path / "model.safetensors").read_bytes()
    found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in found.items() if name != "__metadata__"}


def apart(**parts):
    """One tensor for each expert and projection: part -> its code and its shape, of out and in."""
    return {
        f"{e}.{word}_proj.{part}": (code, shape(*((K, N) if word == "down" else (N, K))))
        for e in range(E) for word in ("gate", "up", "down") for part, (code, shape) in parts.items()
    }  # fmt: skip


def stacked(**parts):
    """One tensor for all experts of a projection."""
    return {
        f"{word}_proj.{part}": (code, shape(*((K, N) if word == "down" else (N, K))))
        for word in ("gate", "up", "down") for part, (code, shape) in parts.items()
    }  # fmt: skip


def fused(**parts):
    """Gate and up in one tensor, [in, out] as Llama-4 has them; companions behind an underscore."""
    return {
        f"{word}{part}": (code, shape(into, out))
        for word, into, out in (("gate_up_proj", K, 2 * N), ("down_proj", N, K)) for part, (code, shape) in parts.items()
    }  # fmt: skip


WHOLE = lambda o, i: (o, i)  # noqa: E731
FP8 = ("F8_E4M3", WHOLE)
SCALAR, ONE = ("F32", lambda *_: ()), ("F32", lambda *_: (1,))
W, WO = (E, K, 2 * N), (E, N, K)
CASES = {
    "modelopt block scales of four dims": (
        PER_EXPERT | MODELOPT, apart(weight=FP8, weight_scale=("F32", lambda o, i: (o // 128, 1, i // 128, 1))),
        {"wi": W, "wi_scale": (E, 2, 2), "wo_scale": (E, 1, 2)}),
    "compressed-tensors blocks": (
        PER_EXPERT | {"quantization_config": {"config_groups": {"group_0": {"weights": {"block_structure": [128, 128]}}}}},
        apart(weight=FP8, weight_scale=("BF16", lambda o, i: (o // 128, i // 128))), {"wi_scale": (E, 2, 2)}),
    "scalars in brackets": (PER_EXPERT, apart(weight=FP8, weight_scale=ONE, input_scale=ONE),
        {"wi_scale": (E, 2), "wi_input_scale": (E, 2), "wo_scale": (E,)}),
    "scalars": (PER_EXPERT, apart(weight=FP8, weight_scale=SCALAR, input_scale=SCALAR), {"wi_scale": (E, 2), "wo_scale": (E,)}),
    "nvfp4 of modelopt": (
        PER_EXPERT, apart(weight=("U8", lambda o, i: (o, i // 2)), weight_scale=("F8_E4M3", lambda o, i: (o, i // 16)),
                          weight_scale_2=SCALAR, input_scale=SCALAR),
        {"wi": (E, 2 * N, K // 2), "wi_scale": (E, 2 * N, K // 16), "wi_scale_2": (E, 2)}),
    "nvfp4 of compressed-tensors": (
        PER_EXPERT, apart(weight_packed=("U8", lambda o, i: (o, i // 2)), weight_scale=("F8_E4M3", lambda o, i: (o, i // 16)),
                          weight_global_scale=ONE, input_global_scale=ONE),
        {"wi_packed": (E, 2 * N, K // 2), "wi_global_scale": (E, 2), "wo_input_global_scale": (E,)}),
    "nvfp4 awq": (
        PER_EXPERT, apart(weight=("U8", lambda o, i: (o, i // 2)), weight_scale=("F8_E4M3", lambda o, i: (o, i // 16)),
                          weight_scale_2=SCALAR, pre_quant_scale=("BF16", lambda _, i: (i,))),
        {"wi_pre_quant_scale": (E, 2, K), "wo_pre_quant_scale": (E, N)}),
    "int8 with zero points is not packed": (
        PER_EXPERT, apart(weight=("I8", WHOLE), weight_scale=("BF16", lambda o, _: (o, 1)),
                          weight_zero_point=("I8", lambda o, _: (o, 1))),
        {"wi": W, "wo": WO, "wi_scale": (E, 1, 2 * N), "wi_zero_point": (E, 1, 2 * N)}),
    "int8 with one zero point": (
        PER_EXPERT, apart(weight=("I8", WHOLE), weight_scale=ONE, weight_zero_point=("I8", lambda *_: (1,))),
        {"wi": W, "wi_zero_point": (E, 2)}),
    "int4 with zero points": (
        PER_EXPERT, apart(weight_packed=("I32", lambda o, i: (o, i // 8)), weight_scale=("F16", lambda o, i: (o, i // 32)),
                          weight_zero_point=("I32", lambda o, i: (o // 8, i // 32)), weight_shape=("I64", lambda *_: (2,))),
        {"wi_packed": (E, 2 * N, K // 8), "wi_zero_point": (E, 2 * N // 8, K // 32)}),
    "ascend w8a8": (
        PER_EXPERT, apart(weight=("I8", WHOLE), weight_scale=("F32", lambda o, _: (o, 1)),
                          weight_offset=("F32", lambda o, _: (o, 1)), input_scale=ONE, input_offset=ONE,
                          deq_scale=("F32", lambda o, _: (o,)),
                          quant_bias=("I32", lambda o, _: (o,))),
        {"wi": W, "wi_offset": (E, 1, 2 * N), "wi_input_offset": (E, 2), "wi_deq_scale": (E, 2 * N), "wo_quant_bias": (E, K)}),
    "ascend w4a8": (
        PER_EXPERT, apart(weight=("I8", WHOLE), weight_scale=("F32", lambda o, _: (o, 1)),
                          weight_scale_second=("F32", lambda o, i: (o, i // 32)),
                          weight_offset_second=("F32", lambda o, i: (o, i // 32))),
        {"wi": W, "wi_scale_second": (E, K // 32, 2 * N), "wo_offset_second": (E, N // 32, K)}),
    "fp8 beside .scale is not packed": (
        PER_EXPERT | BLOCKS, apart(weight=FP8, scale=("F8_E8M0", lambda o, i: (o // 128, i // 128))),
        {"wi": W, "wi_block_scale": (E, 2, 2)}),
    "fp4 beside .scale": (
        PER_EXPERT, apart(weight=("I8", lambda o, i: (o, i // 2)), scale=("F8_E8M0", lambda o, i: (o, i // 32))),
        {"wi": (E, 2 * N, K // 2), "wi_block_scale": (E, 2 * N, K // 32)}),
    "gptq without an order": (
        PER_EXPERT, apart(qweight=("I32", lambda o, i: (i // 8, o)), qzeros=("I32", lambda o, i: (i // 128, o // 8)),
                          scales=("F16", lambda o, i: (i // 128, o)), g_idx=("I32", lambda *_: (0,))),
        {"wi_qweight": (E, K // 8, 2 * N), "wi_g_idx": (E, 0, 2), "wo_g_idx": (E, 0)}),
    "llama-4 nvfp4": (
        LLAMA, fused(**{"": ("U8", lambda i, o: (E, i // 2, o)), "_weight_scale": ("F8_E4M3", lambda i, o: (E, i // 16, o)),
                        "_weight_scale_2": SCALAR, "_input_scale": SCALAR}),
        {"wi": (E, K // 2, 2 * N), "wi_scale": (E, K // 16, 2 * N), "wi_scale_2": (), "wi_input_scale": ()}),
    "llama-4 fp8": (
        LLAMA, fused(**{"": ("F8_E4M3", lambda i, o: (E, i, o)), "_weight_scale": SCALAR, "_input_scale": ONE}),
        {"wi": W, "wi_scale": (), "wi_input_scale": ()}),
    "llama-4 fp8 per expert": (
        LLAMA, fused(**{"": ("F8_E4M3", lambda i, o: (E, i, o)), "_weight_scale": ("F32", lambda *_: (E,)),
                        "_input_scale": ("F32", lambda *_: (E, 1))}),
        {"wi": W, "wi_scale": (E,), "wi_input_scale": (E,)}),
    "llama-4 fp8 channels": (
        LLAMA, fused(**{"": ("F8_E4M3", lambda i, o: (E, i, o)), "_scale": ("F32", lambda _, o: (E, 1, o))}),
        {"wi": W, "wi_scale": (E, 1, 2 * N)}),
    "llama-4 fp8 as transformers saves FBGEMM's": (
        LLAMA, fused(**{"": ("F8_E4M3", lambda i, o: (E, i, o)),
                        "_scale": ("F32", lambda i, o: (E, 1, o) if i == K else (E, o, 1))}),
        {"wi": W, "wi_scale": (E, 1, 2 * N), "wo_scale": (E, K)}),
    "fp8 of transformers, static": (
        PER_EXPERT, apart(weight=FP8, weight_scale_inv=SCALAR, activation_scale=SCALAR),
        {"wi": W, "wi_scale_inv": (E, 2), "wi_activation_scale": (E, 2), "wo_activation_scale": (E,)}),
    "step: gate and up stacked, a scalar each": (
        STEP, stacked(weight=("F8_E4M3", lambda o, i: (E, o, i)), weight_scale=("F32", lambda *_: (E,))),
        {"wi": W, "wi_scale": (E, 2)}),
    "mlx mxfp4": (
        QWEN, stacked(weight=("U32", lambda o, i: (E, o, i // 8)), scales=("U8", lambda o, i: (E, o, i // 32))),
        {"wi": (E, 2 * N, K // 8), "wi_group_scales": (E, 2 * N, K // 32)}),
    "mlx affine": (
        QWEN, stacked(weight=("U32", lambda o, i: (E, o, i // 4)), scales=("BF16", lambda o, i: (E, o, i // 64)),
                      biases=("BF16", lambda o, i: (E, o, i // 64)), bias=("BF16", lambda o, _: (E, o))),
        {"wi": (E, 2 * N, K // 4), "wi_group_biases": (E, 2 * N, K // 64), "wi_bias": (E, 2 * N)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["concat", "vllm"])
def test_fused_proven_and_back(case, layout, tmp_path):
    config, tensors, wanted = CASES[case]
    place = f"model.layers.2.{PLACES[config['model_type']]}"
    source = write(tmp_path / "in", {f"{place}.{name}": entry for name, entry in tensors.items()}, config)
    convert.prefuse(source, tmp_path / "out", layout=layout)
    proven = {level.name: level for level in convert.verify(source, tmp_path / "out", gemm=False).levels}
    assert proven["exact"].state == "equal"
    assert not any(level.differences for level in proven.values())
    convert.split(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    if layout == "concat":
        found = {name.rpartition(".")[2]: shape for name, (_, shape) in header(tmp_path / "out").items()}
        assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("layout", ["concat", "vllm"])
def test_a_flipped_bit_in_one_number_is_seen(layout, tmp_path):
    config, tensors, _ = CASES["llama-4 nvfp4"]
    source = write(tmp_path / "in", {f"model.layers.2.feed_forward.experts.{n}": entry for n, entry in tensors.items()}, config)
    convert.prefuse(source, tmp_path / "out", layout=layout)
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-1] ^= 1  # down_proj_input_scale
    (source / "model.safetensors").write_bytes(data)
    exact = next(level for level in convert.verify(source, tmp_path / "out", gemm=False).levels if level.name == "exact")
    assert any("down (wo) input_scale" in line for line in exact.differences)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0.gate_proj.weight.absmax", "bitsandbytes"),
        ("0.gate_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("2.down_proj.SCB", "bitsandbytes"),
        ("1.up_proj.trellis", "EXL3"),
        ("1.up_proj.q_weight", "EXL2"),
        ("1.up_proj.base_layer.weight", "adapter inside a model.*merge_and_unload"),
        ("1.up_proj.lora_A.default.weight", "adapter inside a model"),
        ("1.up_proj.W_q", "HQQ"),
        ("1.up_proj.codebooks", "AQLM"),
        ("1.up_proj.weight._data", "optimum-quanto"),
        ("1.up_proj.weight:_data:int_data", "optimum-quanto or torchao"),
        ("1.up_proj.compressed", "compressed-tensors' 2:4"),
        ("1.up_proj.weight_scales", "EETQ"),
        ("1.up_proj.act_global_scale", "FP-Quant"),
        ("1.up_proj.tables", "HIGGS"),
        ("1.up_proj.col_vals", "SpQR"),
        ("1.up_proj.qbiases", "transformers' Metal"),
        ("1.up_proj.weight_quantizer._amax", "a quantiser's own state.*export it"),
        ("gate_up_proj.lora_B.weight", "adapter inside a model"),
    ],
)
def test_other_libraries_forms_are_refused_by_name(name, words, tmp_path):
    tensors = apart(weight=("BF16", WHOLE)) | {f"{name.partition('_proj')[0]}_proj.a_word": ("U8", (4,)), name: ("U8", (4,))}
    source = write(tmp_path / "in", {f"model.layers.2.mlp.experts.{n}": entry for n, entry in tensors.items()}, PER_EXPERT)
    with pytest.raises(PlanError, match=f"belongs to (an )?{words}"):
        convert.plan(source, tmp_path / "out", prefuse=True)


def test_names_of_llama_cpp_are_refused(tmp_path):
    tensors = {f"blk.0.ffn_{word}_exps.weight": ("U8", (E, N, 34)) for word in ("gate", "up", "down")}
    with pytest.raises(PlanError, match=r"belongs to GGUF.*llama\.cpp"):
        convert.plan(write(tmp_path / "in", tensors, QWEN), tmp_path / "out", prefuse=True)


@pytest.mark.parametrize("word", ["weight.absmax", "lora_A.weight"])
def test_what_is_no_experts_is_copied(word, tmp_path):
    name = f"model.layers.2.self_attn.q_proj.{word}"
    tensors = {f"model.layers.2.mlp.experts.{n}": entry for n, entry in apart(weight=("BF16", WHOLE)).items()}
    plan = convert.plan(write(tmp_path / "in", tensors | {name: ("U8", (4,))}, PER_EXPERT), tmp_path / "out", prefuse=True)
    assert [target.spec.name for target in plan.targets if target.role == "verbatim"] == [name]


@pytest.mark.parametrize(
    ("tensors", "config", "error", "words"),
    [
        (apart(weight=("I8", lambda o, i: (o, i // 2 + 1))), PER_EXPERT, PlanError, "neither one nor a whole number of values"),
        (apart(weight=("U8", lambda o, i: (o, i // 16))), PER_EXPERT, PlanError, "neither one nor a whole number of values"),
        (apart(weight=("BF16", lambda o, i: (o, i // 2))), PER_EXPERT, PlanError, "do not fit together"),
        (apart(weight=FP8, weight_scale=("F32", lambda o, i: (o // 128, 2, i // 128, 1))), PER_EXPERT | MODELOPT, PlanError,
         "weight_scale"),
        (apart(weight=FP8, weight_scale=("F32", lambda o, i: (o // 128, 1, i // 128, 1))), PER_EXPERT, PlanError,
         "states no weight_block_size"),
        (apart(weight=("BF16", lambda o, _: (o, 0))), PER_EXPERT, InputError, "has no elements"),
        (apart(weight=FP8, weight_scale=("F32", lambda _, i: (i, 1))), PER_EXPERT, PlanError, "256 scales for 128 values"),
        (apart(weight=FP8, weight_scale=("F32", lambda o, _: (o * 3 // 4, 1))), PER_EXPERT, PlanError,
         "192 scales for 256 values .k.: blocks of one size"),
        (apart(weight=FP8, weight_scale=("F32", lambda _, i: (1, i))), PER_EXPERT, PlanError, "and one for all outputs"),
        (apart(qweight=("I16", lambda o, i: (o // 4, i)), qzeros=("F16", lambda o, i: (i // 128, o)),
               scales=("F16", lambda o, i: (i // 128, o))), PER_EXPERT, PlanError, "is (I16|F16), but q(weight|zeros) of GPTQ"),
        (fused(**{"": ("F8_E4M3", lambda i, o: (E, i, o)), "_weight_scale": ("F32", lambda *_: (2,))}), LLAMA, InputError,
         "is of 2 experts"),
        (fused(**{"": ("F8_E4M3", lambda i, o: (E, i, o)), "_weight_scale_3": SCALAR}), LLAMA, PlanError, "does not know"),
        (fused(_weight=("BF16", lambda i, o: (E, i, o))), LLAMA, PlanError, "does not know"),
    ],
    ids=["odd columns", "too many", "floats", "four other dims", "no block size", "empty", "finer", "no blocks", "inputs",
         "gemv", "two of three", "third", "word"],
)  # fmt: skip
def test_what_only_looks_like_it_is_refused(tensors, config, error, words, tmp_path):
    place = f"model.layers.2.{PLACES[config['model_type']]}"
    source = write(tmp_path / "in", {f"{place}.{name}": entry for name, entry in tensors.items()}, config)
    with pytest.raises(error, match=words):
        convert.plan(source, tmp_path / "out", prefuse=True)
