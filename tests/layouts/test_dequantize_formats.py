"""Every format that is computed, each value against one computed by hand from the published formula."""

import ctypes
import itertools
import platform

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import convert
from convert.errors import InputError, PlanError
from layouts.dequantize import dequantized
from layouts.quantisation import block_of
from tests.layouts.test_companion_forms import write
from tests.layouts.test_dequantize import reader

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
N, K = 6, 64
FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
WORDS = {"F32": "f4", "BF16": BF16, "F16": "f2", "F8_E4M3": E4M3, "F8_E8M0": E8M0, "U8": E8M0}
INT4 = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}}
INT8 = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8, "group_size": 32}}}}}
BLOCKS = {"text_config": {"quantization_config": {"weight_block_size": [4, 32]}}}


def values(kind, raw, k):
    """Numbers (rows, k) from bytes (rows, bytes), one by one."""
    if kind == "e4m3":
        return raw.view(E4M3).astype("f4")
    if kind in ("i1", "u1"):
        return raw.view("i1").astype("f4") if kind == "i1" else raw.astype("f4") - 128
    halves = np.stack((raw & 15, raw >> 4), -1).reshape(*raw.shape[:-1], -1)[..., :k]
    return np.array(FP4, "f4")[halves] if kind == "e2m1" else halves.astype("f4") - 8


CASES = {
    # kind, code, bytes of a row, scale: word, code, shape, rows and columns of a block, config, second: word, divides
    "fp8 channels": ("e4m3", "F8_E4M3", K, "weight_scale", "BF16", (N, 1), (1, K), {}, "", 0),
    "fp8 channels in a row": ("e4m3", "F8_E4M3", K, "weight_scale", "F32", (N,), (1, K), {}, "", 0),
    "fp8 tensor": ("e4m3", "F8_E4M3", K, "weight_scale", "F32", (), (N, K), {}, "", 0),
    "fp8 tensor in brackets": ("e4m3", "F8_E4M3", K, "weight_scale", "BF16", (1,), (N, K), {}, "", 0),
    "fp8 tensor of transformers": ("e4m3", "F8_E4M3", K, "weight_scale_inv", "F32", (), (N, K), {}, "", 0),
    "mistral": ("e4m3", "F8_E4M3", K, "qscale_weight", "F32", (), (N, K), {}, "", 0),
    "fp8 blocks of modelopt": ("e4m3", "F8_E4M3", K, "weight_scale", "F32", (2, 1, 2, 1), (4, 32), BLOCKS, "", 0),
    "fp8 blocks beside .scale": ("e4m3", "F8_E4M3", K, "scale", "F8_E8M0", (2, 2), (4, 32), BLOCKS, "", 0),
    "mxfp8": ("e4m3", "F8_E4M3", K, "weight_scale_inv", "U8", (N, K // 32), (1, 32), {}, "", 0),
    "int8": ("i1", "I8", K, "weight_scale", "BF16", (N, 1), (1, K), {}, "", 0),
    "nvfp4 of modelopt": ("e2m1", "U8", K // 2, "weight_scale", "F8_E4M3", (N, K // 16), (1, 16), {}, "weight_scale_2", 0),
    "nvfp4 of compressed-tensors": ("e2m1", "U8", K // 2, "weight_scale", "F8_E4M3", (N, K // 16), (1, 16), {},
                                    "weight_global_scale", 1),
    "mxfp4 of compressed-tensors": ("e2m1", "U8", K // 2, "weight_scale", "U8", (N, K // 32), (1, 32), {}, "", 0),
    "mxfp4": ("e2m1", "U8", K // 2, "weight_scale", "U8", (N, K // 32), (1, 32), {}, "", 0),
    "fp4 of deepseek-v4": ("e2m1", "I8", K // 2, "scale", "F8_E8M0", (N, K // 32), (1, 32), {}, "", 0),
    "int4": ("q4", "I32", K // 2, "weight_scale", "BF16", (N, K // 32), (1, 32), INT4, "", 0),
    "int4 of channels": ("q4", "I32", K // 2, "weight_scale", "F32", (N, 1), (1, K), {}, "", 0),
    "int8 in words": ("u1", "I32", K, "weight_scale", "F16", (N, K // 32), (1, 32), INT8, "", 0),
}  # fmt: skip


def made(case, lead=(), k=K):
    """The tensors of a case, with all bytes and odd scales among them, and the bits that should come of them."""
    kind, code, width, word, scale_code, shape, block, config, second, divides = CASES[case]
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (*lead, N, width), dtype="u1")
    raw.reshape(-1)[:256] = np.arange(256)[: raw.size]
    packed = case.endswith("of compressed-tensors") or code == "I32"
    shape = (*lead, *shape) if shape else shape
    if scale_code in ("U8", "F8_E8M0"):
        stored = rng.integers(90, 160, shape, dtype="u1")
        stored.reshape(-1)[:2] = (0, 254)
    elif scale_code == "F8_E4M3":
        stored = rng.integers(0, 127, shape, dtype="u1")
    else:
        stored = np.asarray(rng.standard_normal(shape)).astype(WORDS[scale_code])
        stored = stored.view(f"u{stored.itemsize}") if stored.ndim else np.array(stored[None].view(f"u{stored.itemsize}")[0])
    scales = np.atleast_1d(stored).view(WORDS[scale_code]).astype("f4")
    if second:
        factor = np.float32(37.3)
        scales = scales / factor if divides else scales * factor
    rows, columns = block
    grid = scales.reshape(*lead if shape else (), -1, 1, -(-K // columns), 1)[..., 0, :, 0] if scales.size > 1 else scales
    if scales.size > 1:
        grid = np.repeat(np.repeat(grid, rows, -2)[..., :N, :], columns, -1)[..., :k]
    with np.errstate(all="ignore"):
        wanted = (values(kind, raw, K)[..., :k] * grid).astype(BF16).view("u2")
    data = raw.view("u4") if code == "I32" else raw
    tensors = {f"x.weight{'_packed' * packed}": (code, data), f"x.{word}": (scale_code, stored)}
    if second:
        tensors[f"x.{second}"] = ("F32", np.full((1,) if divides else (), 37.3, "f4").view("u4"))
    if code == "I32":
        tensors["x.weight_shape"] = ("I64", np.array([N, k], "u8"))
    return tensors | {f"x.{act}_scale": ("F32", np.zeros((), "u4")) for act in ("input", "activation")}, config, wanted


def equal(found, wanted):
    """Bit for bit; of a NaN nobody promises more than that it is one."""
    nan = (wanted & 0x7FFF) > 0x7F80
    assert np.array_equal(found[~nan], wanted[~nan])
    assert ((found[nan] & 0x7FFF) > 0x7F80).all()


def with_zeros(case):
    """The same with zero points, one for each scale: packed along rows where the values are, eight or four to a word."""
    tensors, config, _ = made(case)
    kind, code, _, word, scale_code, shape, block, *_ = CASES[case]
    bits, columns = 4 if kind == "q4" else 8, block[1]
    zeros = np.random.default_rng(9).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    raw = tensors["x.weight_packed" if code == "I32" else "x.weight"][1].view("u1")
    scales = tensors[f"x.{word}"][1].view(WORDS[scale_code]).astype("f4").reshape(-1, 1 if columns == K else K // columns)
    grid, low = (np.repeat(each, columns, 1) for each in (scales, zeros.reshape(scales.shape)))
    wanted = ((values(kind, raw, K) - low.astype("f4")) * grid).astype(BF16).view("u2")
    stored = zeros.astype("i1").view("u1")
    if code == "I32":
        stored = np.zeros((-(-N // (32 // bits)), shape[1]), "u4")
        for (row, column), zero in np.ndenumerate(zeros):
            at, inside = divmod(row, 32 // bits)
            stored[at, column] |= np.uint32((int(zero) + 2 ** (bits - 1)) << (bits * inside))
    return tensors | {"x.weight_zero_point": (code, stored)}, config, wanted


ZEROS = ["int4", "int4 of channels", "int8 in words", "int8"]


@pytest.mark.parametrize("case", ZEROS)
def test_zero_points_are_taken_from_values_first(case):
    tensors, config, wanted = with_zeros(case)
    plain = dequantized(reader(tensors, config))
    equal(plain.read("x.weight", (slice(None), slice(None))), wanted)
    rng = np.random.default_rng(1)
    for _ in range(30):
        cut = tuple(slice(*map(int, sorted(rng.integers(0, size + 1, 2)))) for size in (N, K))
        equal(plain.read("x.weight", cut), wanted[cut])
    assert plain.tensors.keys() == {"x.weight"}
    assert not (wanted == made(case)[2]).all()


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit_whole_and_in_parts(case):
    tensors, config, wanted = made(case)
    plain = dequantized(reader({"norm": ("BF16", np.zeros(3, "u2")), **tensors}, config))
    assert {name: (spec.dtype, spec.shape) for name, spec in plain.tensors.items()} == {
        "norm": ("BF16", (3,)), "x.weight": ("BF16", (N, K)),
    }  # fmt: skip
    assert "quantization_config" not in str(plain.config)
    equal(plain.read("x.weight", (slice(None), slice(None))), wanted)
    rng = np.random.default_rng(1)
    for _ in range(30):
        cut = tuple(slice(*map(int, sorted(rng.integers(0, size + 1, 2)))) for size in (N, K))
        equal(plain.read("x.weight", cut), wanted[cut])
    assert all(any(f"left out  x.{act}_scale" in line for line in plain.computed) for act in ("input", "activation"))


@pytest.mark.parametrize(("case", "zeros"), [*((case, False) for case in CASES), *((case, True) for case in ZEROS)])
def test_what_goes_out_by_columns_is_turned_as_bytes(case, zeros):
    """As a conversion asks for it: into columns of the output, strip by strip, all of it from what was read first."""
    tensors, config, wanted = (with_zeros if zeros else made)(case)
    source = reader(tensors, config)
    plain, read, begun = dequantized(source), source.read, []
    source.read = lambda name, *more: begun.append(name) or read(name, *more)
    out = np.zeros((K, 2, N), "u2")
    for first in range(0, K, 24):
        there = out[first : first + 24, 1]
        cut = (slice(0, N), slice(first, min(first + 24, K)))
        assert np.may_share_memory(plain.read("x.weight", cut, lambda *_, there=there: there.T), out)
    equal(out[:, 1], wanted.T)
    assert not out[:, 0].any()
    assert begun.count("x.weight_packed" if "x.weight_packed" in tensors else "x.weight") == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the bits of MXCSR")
@pytest.mark.parametrize("case", ["fp8 channels", "nvfp4 of modelopt"])
def test_threads_that_flush_subnormals_compute_the_same(case):
    """As libraries have it that were linked with -ffast-math: codes of subnormals are none once they are multiplied."""
    tensors, config, wanted = made(case)
    plain, math, kept = dequantized(reader(tensors, config)), ctypes.CDLL("libm.so.6"), (ctypes.c_uint32 * 8)()
    math.fegetenv(kept)
    flushing = (ctypes.c_uint32 * 8)(*kept)
    flushing[7] |= 0x8040  # MXCSR: results that are subnormal are zero, and so are operands
    math.fesetenv(flushing)
    try:
        found = plain.read("x.weight", (slice(None), slice(None)))
    finally:
        math.fesetenv(kept)
    equal(found, wanted)


@pytest.mark.parametrize("case", ["fp8 channels", "nvfp4 of modelopt", "mxfp8", "fp8 tensor"])
def test_stacks_of_matrices(case):
    tensors, config, wanted = made(case, lead=(3,))
    plain = dequantized(reader(tensors, config))
    equal(plain.read("x.weight", (slice(None),) * 3), wanted)
    cut = (slice(1, 3), slice(2, 5), slice(7, 43))
    equal(plain.read("x.weight", cut), wanted[cut])


def test_a_size_of_groups_is_not_guessed():
    """57 columns have two scales in groups of 32, and in groups of 48; in groups of 128 they have one."""
    tensors, _, wanted = made("int4", k=57)
    groups = {str(size): {"weights": {"num_bits": 4, "group_size": size}} for size in (128, 32, 48)}
    config = {"quantization_config": {"config_groups": groups}}
    with pytest.raises(PlanError, match=r"x\.weight_scale fits groups of 32 and 48 columns"):
        dequantized(reader(tensors, config))
    groups["48"]["weights"]["group_size"] = [48]
    equal(dequantized(reader(tensors, config)).read("x.weight", (slice(None), slice(None))), wanted)


def test_values_of_one_word_are_as_wide_as_config_json_says():
    """Four columns are one word of eight bits each, as of four bits."""
    tensors, config, _ = made("int8 in words", k=4)
    tensors["x.weight_packed"] = ("I32", np.full((N, 1), 0x7F8081FF, "u4"))
    tensors["x.weight_scale"] = ("F16", np.full((N, 1), 0x3C00, "u2"))
    found = dequantized(reader(tensors, config)).read("x.weight", (slice(None), slice(None)))
    assert np.array_equal(found.view(BF16).astype("f4"), np.tile(np.array([127, 1, 0, -1], "f4"), (N, 1)))


def test_packing_hides_sizes_that_are_told():
    """57 columns in 8 words: the last holds one value, and the last group has 25."""
    tensors, config, wanted = made("int4", k=57)
    plain = dequantized(reader(tensors, config))
    equal(plain.read("x.weight", (slice(None), slice(None))), wanted)
    equal(plain.read("x.weight", (slice(1, 4), slice(50, 57))), wanted[1:4, 50:57])


@pytest.mark.parametrize(
    ("case", "change", "error", "words"),
    [
        ("int4", {"x.weight_shape": None}, InputError, "weight_shape should be there"),
        ("int8", {"y.weight": ("I8", np.zeros((2, 2), "u1"))}, PlanError, "y.weight .* belongs to no format"),
        ("mxfp4", {"y.weight": ("U8", np.zeros((2, 2), "u1"))}, PlanError, "y.weight .* belongs to no format"),
        ("mxfp4", {"y.weight": ("F8_E4M3FNUZ", np.zeros((2, 2), "u1"))}, InputError, "y.weight .* has no y.weight_scale_inv"),
        ("nvfp4 of modelopt", {"x.weight_scale_2": ("I32", np.zeros((), "u4"))}, PlanError, "and I32 in x.weight_scale_2"),
        ("int4", {"x.weight_shape": ("I64", np.array([N, 99], "u8"))}, InputError, "is no grid of blocks"),
        ("int4", {"x.weight_zero_point": ("I32", np.zeros((2, 2), "u4"))}, InputError, r"zero points of INT4, I32 \(1, 2\)"),
        ("int4", {"x.weight_zero_point": ("I8", np.zeros((6, 2), "u1"))}, InputError, "zero points of INT4, I32"),
        ("int8", {"x.weight_zero_point": ("I32", np.zeros((1, 1), "u4"))}, InputError, "zero points of INT8, I8"),
        ("fp8 tensor", {"x.weight_zero_point": ("I8", np.zeros((), "u1"))}, PlanError, "zero_point .* no format"),
        ("int4", {"x.weight_g_idx": ("I32", np.zeros(K, "u4"))}, PlanError, "orders columns"),
        ("nvfp4 of modelopt", {"x.weight_scale_2": ("F32", np.zeros(5, "u4"))}, InputError, "is no grid"),
        ("nvfp4 of modelopt", {"x.weight_scale_2": None}, PlanError, "no such format"),
        ("nvfp4 of modelopt", {"x.weight_scale": ("F8_E4M3", np.zeros((N, K // 8), "u1"))}, InputError, "is no grid"),
        ("mxfp4", {"y.qweight": ("I32", np.zeros((2, 2), "u4"))}, PlanError, "qweight .* no format that is computed"),
        ("mxfp4", {"e.gate_up_proj_weight_scale": ("F32", np.zeros((), "u4"))}, PlanError, "_weight_scale .* no format"),
        ("fp8 blocks of modelopt", {"y.weight": ("F8_E4M3", np.zeros((4, 4), "u1"))}, InputError, "has no y.weight_scale_inv"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(case, change, error, words):
    tensors, config, _ = made(case)
    with pytest.raises(error, match=words):
        dequantized(reader({name: entry for name, entry in (tensors | change).items() if entry}, config))


def test_scales_of_norms_and_routers_are_nobodys():
    tensors, config, _ = made("mxfp4")
    others = {
        "router.scale": ("BF16", np.zeros(4, "u2")),
        "norm.scale": ("BF16", np.zeros(4, "u2")),
        "norm.weight": ("BF16", np.zeros(4, "u2")),
    }
    plain = dequantized(reader(tensors | others, config))
    assert set(others) < set(plain.tensors)


@pytest.mark.parametrize(
    ("config", "block"),
    [
        ({}, None),
        ({"quantization_config": {"weight_block_size": [128, 64]}}, (128, 64)),
        ({"quantization_config": {"weight_block_size": [128]}}, None),
        ({"quantization_config": {"weight_block_size": [128, True]}}, None),
        ({"quantization_config": {"quant_algo": "FP8_PB_WO"}}, (128, 128)),
        ({"a": {"b": {"quantization_config": {"weight_block_size": [2, 3]}}}}, (2, 3)),
        ({place: {"quantization_config": {"weight_block_size": size}} for place, size in (("a", [2, 3]), ("b", [3, 2]))}, None),
        ({"compression_config": {"config_groups": {"x": {"weights": {"block_structure": [128, 128]}}}}}, (128, 128)),
        ({"quantization_config": {"config_groups": 3}}, None),
    ],
)  # fmt: skip
def test_the_size_of_blocks_is_what_config_says(config, block):
    assert block_of(config) == block


def test_kimi_k2_5_from_end_to_end(tmp_path):
    """INT4 experts below `text_config`: a bfloat16 model comes out, and nothing in it says that it is quantised."""
    tensors, config, wanted = made("int4")
    arrays = {}
    for expert, word in itertools.product(range(2), ("gate", "up", "down")):
        place = f"language_model.model.layers.1.mlp.experts.{expert}.{word}_proj."
        arrays |= {name.replace("x.", place): entry for name, entry in tensors.items()}
    for name in [name for name in arrays if ".down_proj." in name]:  # [K, N], and one word for eight columns
        del arrays[name]
    for expert in range(2):
        place = f"language_model.model.layers.1.mlp.experts.{expert}.down_proj."
        arrays[f"{place}weight_packed"] = ("I32", np.full((K, 1), 0x76543210, "u4"))
        arrays[f"{place}weight_scale"] = ("BF16", np.full((K, 1), 0x3F80, "u2"))
        arrays[f"{place}weight_shape"] = ("I64", np.array([K, N], "u8"))
    stated = {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", "n_routed_experts": 2, **config}}
    source = write(tmp_path / "in", {name: (code, array.shape) for name, (code, array) in arrays.items()}, stated)
    data = (source / "model.safetensors").read_bytes()
    head = data[: 8 + int.from_bytes(data[:8], "little")]
    (source / "model.safetensors").write_bytes(head + b"".join(array.tobytes() for _, array in arrays.values()))
    (source / "hf_quant_config.json").write_text("{}")
    plan = convert.plan(source, tmp_path / "out", prefuse=True, dequantize="bf16")
    assert "INT4  language_model.model.layers.*.mlp.experts.*.gate_proj.weight  x2" in plan.computed_kinds
    convert.prefuse(source, tmp_path / "out", dequantize="bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    place = "language_model.model.layers.1.mlp.experts"
    assert set(found) == {f"{place}.wi", f"{place}.wo"}
    equal(found[f"{place}.wi"][1].view("u2"), np.concatenate((wanted.T, wanted.T), 1))
    assert np.array_equal(found[f"{place}.wo"][0].astype("f4"), np.repeat(np.arange(-8, -2, dtype="f4")[:, None], K, 1))
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


ROWS, COLUMNS = 200, 2046
_INTS = {"x.weight_packed": ("I32", (ROWS, COLUMNS // 8 + 1)), "x.weight_scale": ("BF16", (ROWS, 64)),
         "x.weight_zero_point": ("I32", (ROWS // 8, 64)), "x.weight_shape": ("I64", (2,))}  # fmt: skip
LARGE = {
    "int4 with zeros": (_INTS, INT4),
    "fp8 blocks": (
        {"x.weight": ("F8_E4M3", (ROWS, COLUMNS)), "x.weight_scale_inv": ("F32", (-(-ROWS // 24), 64))},
        {"quantization_config": {"weight_block_size": [24, 32]}},
    ),
    "fp8 tensor": ({"x.weight": ("F8_E4M3", (ROWS, COLUMNS)), "x.weight_scale": ("F32", ())}, {}),
    "int8 of odd rows": ({"x.weight": ("I8", (ROWS, COLUMNS + 1)), "x.weight_scale": ("BF16", (ROWS, 1))}, {}),
    "nvfp4": (
        {"x.weight": ("U8", (ROWS, 1024)), "x.weight_scale": ("F8_E4M3", (ROWS, 128)), "x.weight_scale_2": ("F32", ())},
        {},
    ),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_matrix_that_is_computed_part_by_part_is_the_same_as_row_by_row(case):
    """More elements than are computed at a time, in blocks that parts cut."""
    wanted, config = LARGE[case]
    rng, tensors = np.random.default_rng(7), {}
    for name, (code, shape) in wanted.items():
        wide = np.dtype(WORDS.get(code, "i4")).itemsize if code not in ("I8", "F8_E4M3", "U8") else 1
        array = rng.integers(0, 200, (*shape, wide), dtype="u1").view(f"u{wide}")[..., 0]
        tensors[name] = (code, np.array([ROWS, COLUMNS], "u8") if code == "I64" else array)
    source = dequantized(reader(tensors, config))
    rows, columns = source.tensors["x.weight"].shape
    whole = source.read("x.weight", (slice(None), slice(None)))
    assert whole.size > 1 << 18
    for row in (*range(0, rows, 7), rows - 1):
        equal(source.read("x.weight", (slice(row, row + 1), slice(None)))[0], whole[row])
    equal(source.read("x.weight", (slice(5, rows - 3), slice(3, columns - 5))), whole[5 : rows - 3, 3 : columns - 5])


@pytest.mark.parametrize("word", ["weight_offset", "deq_scale", "quant_bias", "weight_scale_second", "weight_offset_second"])
def test_what_ascend_puts_beside_int8_is_not_passed_over(word):
    tensors, config, _ = made("int8")
    with pytest.raises(PlanError, match=f"{word} .*belongs to no format that is computed"):
        dequantized(reader(tensors | {f"x.{word}": ("F32", np.zeros((N, 1), "u4"))}, config))
