"""FP8 of Qwen3.5, with a scale for each block: MaxText keeps both, in a tree of its own (`qwen3.5-35b-a3b-fp8`)."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from convert.cli import main
from tests import tiny

BLOCK, K, N, E, HEADS, LAYERS = 4, 8, 12, 3, 2, 8
LINEAR = {"in_proj_qkv": (32, K), "in_proj_z": (16, K), "out_proj": (K, 16)}
FULL = {"q_proj": (HEADS * 16, K), "k_proj": (16, K), "v_proj": (16, K), "o_proj": (K, 16)}
PLAIN = {"in_proj_b.weight": (4, K), "in_proj_a.weight": (4, K), "conv1d.weight": (32, 1, 4)}
PLAIN |= {"A_log": (4,), "dt_bias": (4,), "norm.weight": (4,)}
TEXT = {
    "model_type": "qwen3_5_moe_text", "num_hidden_layers": LAYERS, "num_experts": E, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}  # fmt: skip
CONFIG = {
    "model_type": "qwen3_5_moe",
    "text_config": TEXT,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}


def published() -> dict[str, np.ndarray]:
    """As Qwen publishes it: projections quantised, routers, gates of shared experts and short tensors not."""
    rng, found = np.random.default_rng(0), dict[str, np.ndarray]()

    def plain(name, *shape):
        found[name] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    def quantised(name, out, into):
        found[f"{name}.weight"] = rng.standard_normal((out, into)).astype(ml_dtypes.float8_e4m3fn)
        plain(f"{name}.weight_scale_inv", out // BLOCK, into // BLOCK)

    plain("lm_head.weight", 5, K)
    plain("model.language_model.embed_tokens.weight", 5, K)
    plain("model.language_model.norm.weight", K)
    for i in range(LAYERS):
        layer = f"model.language_model.layers.{i}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            plain(f"{layer}.{name}.weight", K)
        for name, shape in (FULL if i % 4 == 3 else LINEAR).items():
            quantised(f"{layer}.{'self_attn' if i % 4 == 3 else 'linear_attn'}.{name}", *shape)
        for name, shape in ({} if i % 4 == 3 else PLAIN).items():
            plain(f"{layer}.linear_attn.{name}", *shape)
        for name in ("q_norm", "k_norm") if i % 4 == 3 else ():
            plain(f"{layer}.self_attn.{name}.weight", 8)
        plain(f"{layer}.mlp.gate.weight", E, K)
        plain(f"{layer}.mlp.shared_expert_gate.weight", 1, K)
        for place in ("shared_expert", *(f"experts.{e}" for e in range(E))):
            for name, shape in (("gate_proj", (N, K)), ("up_proj", (N, K)), ("down_proj", (K, N))):
                quantised(f"{layer}.mlp.{place}.{name}", *shape)
    return found


def save(where: Path, change=lambda _: None) -> Path:
    where.mkdir()
    arrays = published()
    change(arrays)
    save_file(arrays, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(CONFIG))
    return where


def by_hand(hf: dict[str, np.ndarray], *, fused: bool) -> dict[str, np.ndarray]:
    """What MaxText 0.2.5 has of layers 0 and 4 (`layer_0`), and of 3 and 7, whose attention is full; layers are axis 1."""

    def at(layers, name, change):
        return np.stack([change(hf[f"model.language_model.layers.{i}.{name}"]) for i in layers], 1)

    def turned(layer, word):
        """`concat_qkvz_scales_and_transpose`: the blocks of each of two heads of keys, of queries, keys, values and gates."""
        names = (f"model.language_model.layers.{layer}.linear_attn.in_proj_{name}.weight{word}" for name in ("qkv", "z"))
        qkv, z = (hf[name] for name in names)
        rows = 4 // (BLOCK if word else 1)
        q, k, v = qkv[: 2 * rows], qkv[2 * rows : 4 * rows], qkv[4 * rows :]
        return np.concatenate([part.reshape(2, -1, part.shape[1]) for part in (q, k, v, z)], 1).reshape(-1, qkv.shape[1]).T

    found = {}
    for word, end in (("", ""), ("_scale_inv", "_scale")):
        found[f"layer_3.attention.attention.query.kernel{end}"] = at(
            (3, 7), f"self_attn.q_proj.weight{word}", lambda x: x.T.reshape(x.shape[1], HEADS, -1)
        )
        found[f"layer_3.attention.attention.out.kernel{end}"] = at((3, 7), f"self_attn.o_proj.weight{word}", np.transpose)
        found[f"layer_0.mlp.shared_expert.wo.kernel{end}"] = at(
            (0, 4), f"mlp.shared_expert.down_proj.weight{word}", np.transpose
        )
        found[f"layer_0.attention.in_proj_qkvz.kernel{end}"] = np.stack([turned(i, word) for i in (0, 4)], 1)
        wi = [
            np.stack([at((0, 4), f"mlp.experts.{e}.{name}.weight{word}", np.transpose).swapaxes(0, 1) for e in range(E)])
            for name in ("gate_proj", "up_proj")
        ]
        parts = {"wi": np.concatenate(wi, -1)} if fused else {"wi_0": wi[0], "wi_1": wi[1]}
        found |= {f"layer_0.mlp.routed_experts.{name}{end}": array for name, array in parts.items()}
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    where = tmp_path_factory.mktemp("fp8")
    convert.prefuse(save(where / "in"), where / "tree", to="orbax")
    return where / "in", where / "tree"


FORMS = [(True, None, True), *(pytest.param(*form, marks=pytest.mark.slow) for form in
         [(True, 0, True), (False, None, True), (True, None, False), (True, 0, False), (False, None, False)])]  # fmt: skip


@pytest.mark.parametrize(("scan", "axis", "fused"), FORMS)
def test_there_proven_and_back(scan, axis, fused, pair, tmp_path):
    source, out = pair
    if (scan, axis, fused) != (True, None, True):
        out = tmp_path / "tree"
        (convert.prefuse if fused else convert.reformat)(source, out, to="orbax", scan=scan, scan_axis=axis)
    if scan and axis is None:
        tree = convert.load(out, names=lambda name: name.removeprefix("params.params.decoder.layers."))
        for name, array in by_hand(published(), fused=fused).items():
            assert np.array_equal(np.asarray(tree[name]).view("u1"), np.ascontiguousarray(array).view("u1")), name
    verdict = convert.verify(source, out, gemm=not fused)
    assert verdict.equal, str(verdict)
    assert convert.verify(out).equal
    assert convert.digest(source).model == convert.digest(out).model
    (convert.split if fused else convert.reformat)(out, tmp_path / "again", to="hf")
    assert tiny.tree(source).items() <= tiny.tree(tmp_path / "again").items()


SCALE = "model.language_model.layers.5.mlp.experts.1.up_proj.weight_scale_inv"
QKV = "model.language_model.layers.4.linear_attn.in_proj_qkv.weight_scale_inv"


@pytest.mark.parametrize("name", [QKV, pytest.param(SCALE, marks=pytest.mark.slow)])
def test_a_scale_that_differs_or_is_missing_is_told(name, pair, tmp_path, capsys):
    other = save(tmp_path / "other", lambda arrays: arrays[name].view("u2").__ixor__(1))
    assert not convert.verify(other, pair[1], gemm=False).equal
    lacks = save(tmp_path / "lacks", lambda arrays: arrays.pop(name))
    assert main(["--prefuse", str(lacks), str(tmp_path / "no"), "--to", "orbax", "--quiet"]) == 3
    assert name.removesuffix("_scale_inv") in capsys.readouterr().err


def test_layouts_that_cut_blocks_are_refused(tmp_path, capsys):
    source = save(tmp_path / "in")
    command = ["--prefuse", str(source), str(tmp_path / "no"), "--to", "orbax", "--quiet"]
    assert main([*command, "--layout", "per-shard", "--shards", "3"]) == 4
    assert "experts have scales by block" in capsys.readouterr().err
    config = source / "config.json"
    config.write_text(config.read_text().replace('"linear_key_head_dim": 4', '"linear_key_head_dim": 6'))
    assert main(command) == 4
    assert "linear_key_head_dim 6 and weight_block_size 4" in capsys.readouterr().err


@pytest.mark.parametrize("block", ["[2, 2]", "[4, 8]"])
def test_grids_that_are_none_are_refused(block, tmp_path, capsys):
    """Of other blocks than there are numbers for, or of blocks that are longer than wide, which MaxText turns."""
    source = save(tmp_path / "in")
    (source / "config.json").write_text((source / "config.json").read_text().replace("[4, 4]", block))
    assert main(["--prefuse", str(source), str(tmp_path / "no"), "--to", "orbax", "--quiet"]) == 4
    assert "no grid of whole square blocks" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_dequantised_it_is_the_tree_without_scales(tmp_path):
    source, out = save(tmp_path / "in"), tmp_path / "tree"
    convert.prefuse(source, out, to="orbax", dequantize="bf16")
    tree = convert.load(out, names=lambda name: name.removeprefix("params.params.decoder.layers."))
    assert not [name for name in tree if name.endswith("_scale")]
    convert.split(out, tmp_path / "again", to="hf")
    for where in (out, tmp_path / "again"):
        assert "quantization_config" not in json.loads((where / "config.json").read_text()), "it would be computed once more"
    weight, scale = (
        published()[f"model.language_model.layers.4.mlp.experts.1.up_proj.weight{word}"] for word in ("", "_scale_inv")
    )
    wanted = weight.astype("f4") * scale.astype("f4").repeat(BLOCK, 0).repeat(BLOCK, 1)
    assert np.array_equal(tree["layer_0.mlp.routed_experts.wi"][1, 1, :, N:], wanted.astype(ml_dtypes.bfloat16).T)
