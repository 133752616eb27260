"""MaxText's own models restore what we write and compute the logits that transformers computes, fused or not.

MaxText aligns what it restores with its model by repeating or padding where sizes differ, silently, so only logits prove that a
tree is right. It needs Python 3.12 and is not among our dependencies: `pip install -e '.[maxtext]'`, then `pytest -m clients
tests/clients/test_maxtext.py`.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
from layouts.tables.families import FAMILIES
from layouts.tables.maxtext_trees import TREES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
maxtext = pytest.importorskip("maxtext")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from maxtext.common.common_types import MODEL_MODE_TRAIN  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.utils import maxtext_utils, model_creation_utils  # noqa: E402

from tests.clients import tiny_models  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

LENGTH = 17
RUN: Mapping[str, Any] = {
    "run_name": "convert", "hardware": "cpu", "skip_jax_distributed_system": True, "enable_checkpointing": True,
    "override_model_config": True, "log_config": False, "dataset_type": "synthetic", "base_output_directory": "/nonexistent",
    "dtype": "float32", "weight_dtype": "float32", "matmul_precision": "highest", "attention": "dot_product",
    "per_device_batch_size": 2, "max_target_length": LENGTH, "max_prefill_predict_length": 4,
    "sparse_matmul": True, "megablox": False, "capacity_factor": -1.0,
}  # fmt: skip
"""How MaxText runs: on a CPU, in float32, no token dropped, through `jax.lax.ragged_dot`."""

WORDS: Mapping[str, tuple[str, ...]] = {
    "base_emb_dim": ("hidden_size",),
    "base_num_query_heads": ("num_attention_heads",),
    "base_num_kv_heads": ("num_key_value_heads",),
    "base_num_decoder_layers": ("num_hidden_layers",),
    "vocab_size": ("vocab_size",),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "top_k_experts"),
    "base_moe_mlp_dim": ("moe_intermediate_size", "intermediate_size"),
    "base_mlp_dim": ("intermediate_size_mlp", "intermediate_size"),
    "normalization_layer_epsilon": ("rms_norm_eps",),
    # where only some models have it
    "first_num_dense_layers": ("first_k_dense_replace",),
    "shared_experts": ("n_shared_experts",),
    "q_lora_rank": ("q_lora_rank",),
    "kv_lora_rank": ("kv_lora_rank",),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "n_routing_groups": ("n_group",),
    "topk_routing_group": ("topk_group",),
    "routed_scaling_factor": ("routed_scaling_factor",),
    "gdn_conv_kernel_dim": ("linear_conv_kernel_dim",),
    "gdn_key_head_dim": ("linear_key_head_dim",),
    "gdn_value_head_dim": ("linear_value_head_dim",),
    "gdn_num_key_heads": ("linear_num_key_heads",),
    "gdn_num_value_heads": ("linear_num_value_heads",),
    "interleave_moe_layer_step": ("interleave_moe_layer_step",),
    "chunk_attn_window_size": ("attention_chunk_size",),
    "indexer_n_heads": ("index_n_heads",),
    "indexer_head_dim": ("index_head_dim",),
    "indexer_topk": ("index_topk",),
    "o_groups": ("o_groups",),
    "o_lora_rank": ("o_lora_rank",),
    "compressed_rope_max_timescale": ("compress_rope_theta",),
}
"""MaxText's words, each with those of `config.json` that say the same."""

YARN = {"rope_type": "yarn", "rope_factor": 1, "original_max_position_embeddings": 128, "max_position_embeddings": 128}
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_moe-sparse": ("qwen3-30b-a3b", {}),
    "mixtral-heads": ("mixtral-8x7b", {}),
    # by default MaxText rotates halves for them; its YaRN with a factor of 1 rotates pairs, and scales nothing
    "deepseek_v2": ("deepseek2-16b", {**YARN, "mscale": 1.0}),
    "deepseek_v3": ("deepseek3-671b", YARN),
    "deepseek_v32-heads": ("deepseek3.2-671b", YARN),
    "deepseek_v4-cycles": (
        "deepseek4-284b",
        {"sliding_window_size": 16, "compress_ratios": [0, 0, 4, 128, 4, 128, 4], "partial_rotary_factor": 1.0},
    ),
    "gpt_oss": ("gpt-oss-20b", {"sliding_window_size": 16}),
    "qwen3_next-cycles": ("qwen3-next-80b-a3b", {"gdn_chunk_size": 4}),
    "qwen3_5_moe_text-cycles": ("qwen3.5-35b-a3b", {"gdn_chunk_size": 4, "use_mrope": False}),
    "gemma4_text-cycles": (
        "gemma4-26b",
        {"sliding_window_size": 16, "global_head_dim": 32, "global_num_kv_heads": 1, "partial_rotary_factor": 1.0},
    ),
    "llama4_text-top1": ("llama4-17b-16e", {"rope_use_scale": False}),
}
"""The tiny model of transformers, MaxText's name of its kind, and what that has otherwise than the tiny one."""

COMPUTED = {
    "mixtral-heads": "query-scale",
    "gemma4_text-cycles": "embedding-scale",
    "deepseek_v4-cycles": "exact-values",
}
"""Saved in float32: of bfloat16, queries would be rounded, as MaxText's own converter does it, and logits be 0.003 apart."""
LENGTHS = {"deepseek_v4-cycles": 160}
"""More tokens than become one in any layer."""

TEXT: Mapping[str, Any] = {"use_multimodal": False, "use_mrope": False, "n_routing_groups": -1, "topk_routing_group": -1}
ALONE: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "qwen3_vl_moe-text": ("qwen3-vl-30b-a3b", TEXT),
    "qwen3_omni_moe": ("qwen3-omni-30b-a3b", {**TEXT, "use_audio": False}),
    "deepseek_v3-kimi": ("kimi-k2-1t", {**YARN, **TEXT}),
    "deepseek_v3-mtp": ("deepseek3-671b", {**YARN, **TEXT, "mtp_num_layers": 1}),
}
"""The same of models that are tried in one form: fused, and stacked where MaxText does that.

It is the text of Qwen3-VL and Qwen3-Omni; MaxText has encoders only where it is given pictures.
"""


def test_every_tree_is_here():
    types = {case.partition("-")[0] for case in (*CASES, *ALONE)}
    assert {family.name for family in FAMILIES if types & {*family.model_types}} == set(TREES)


def logits(case: str, stated: Any, tree: Path, ids: np.ndarray, axis: int | None, *, fused: bool, **more: Any) -> np.ndarray:
    """What MaxText's model computes with the parameters of a tree whose layers are stacked along an axis, or are not."""
    kind, special = {**CASES, **ALONE}[case]
    own = {
        word: next((getattr(stated, name) for name in names if hasattr(stated, name)), None) for word, names in WORDS.items()
    }
    rope = stated.rope_parameters
    rope = rope.get("full_attention", rope.get("main", rope))
    words: dict[str, Any] = {
        **RUN,
        **{word: value for word, value in own.items() if value is not None},
        "max_target_length": ids.shape[1],
        "head_dim": getattr(stated, "head_dim", None) or stated.hidden_size // stated.num_attention_heads,
        "rope_max_timescale": int(rope["rope_theta"]),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        **special,
        "model_name": kind,
        "scan_layers": axis is not None,
        "param_scan_axis": 1 if axis is None else axis,
        "prefuse_moe_weights": fused,
        "load_parameters_path": str(tree / "0" / "items"),
        **more,
    }
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    config = pyconfig.initialize(["", str(base), *(f"{word}={_text(value)}" for word, value in words.items())])
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = model_creation_utils.from_pretrained(config, mesh=mesh, model_mode=MODEL_MODE_TRAIN)
    tokens = jnp.asarray(ids, jnp.int32)
    with jax.set_mesh(mesh):
        found = model(
            decoder_input_tokens=tokens,
            decoder_positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), tokens.shape),
            decoder_segment_ids=jnp.ones_like(tokens),
            enable_dropout=False,
            decoder_target_tokens=tokens,
            decoder_target_mask=jnp.ones_like(tokens),
        )
    return np.asarray(found[0] if isinstance(found, tuple) else found, np.float32)


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def make(case: str, where: Path) -> tuple[Any, np.ndarray, np.ndarray]:
    """Save a tiny model of transformers as `where / "in"`: its config, tokens, and its logits for these."""
    built = tiny_models.build(case)
    built = built.float() if case in COMPUTED else built
    for name, buffer in built.named_buffers():
        if name.endswith("correction_bias"):  # zeros are right wherever they go
            buffer.normal_(std=0.3)
        if name.endswith("tid2eid"):
            buffer.random_(tiny_models.EXPERTS)
    built.save_pretrained(where / "in")
    ids = torch.randint(3, 160, (2, LENGTHS.get(case, LENGTH)), generator=torch.Generator().manual_seed(1))
    stated = built.config.get_text_config()
    stated.allow_global_per_layer_attribute_access = True  # of Gemma 4, whose layers differ
    return stated, ids.numpy(), tiny_models.forward(built.float(), ids).numpy()


@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    where = tmp_path_factory.mktemp(request.param)
    return request.param, where, *make(request.param, where)


@pytest.mark.parametrize("fused", [True, False], ids=["prefused", "split"])
@pytest.mark.parametrize("axis", [1, 0, None])
def test_maxtext_computes_what_transformers_does(model, axis, fused):
    case, where, stated, ids, wanted = model
    tree = where / f"tree-{axis}-{fused}"
    (convert.prefuse if fused else convert.reformat)(
        where / "in", tree, to="orbax", scan=axis is not None, scan_axis=axis, compute=COMPUTED.get(case)
    )
    found = logits(case, stated, tree, ids, axis, fused=fused)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("case", ALONE)
def test_maxtext_computes_the_text(case, tmp_path):
    stated, ids, wanted = make(case, tmp_path)
    if case in EDITED:
        EDITED[case](tmp_path / "in")
    axis = None if case.startswith("qwen") else 1  # it has no stacks where pictures go into deeper layers
    convert.prefuse(tmp_path / "in", tmp_path / "tree", to="orbax", scan=axis is not None)
    found = logits(case, stated, tmp_path / "tree", ids, axis, fused=True)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False], ids=["prefused", "split"])
def test_maxtext_computes_with_fp8(tmp_path, fused):
    """Scales stand where its model of FP8 has them: it computes what transformers does with the product."""
    case = "qwen3_5_moe_text-cycles"
    built = tiny_models.build(case).float()
    for name in ("in", "product"):
        built.save_pretrained(tmp_path / name)
    _quantise(tmp_path / "in", tmp_path / "product")
    ids = torch.randint(3, 160, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    wanted = tiny_models.forward(type(built).from_pretrained(tmp_path / "product", dtype="float32"), ids).numpy()
    (convert.prefuse if fused else convert.reformat)(tmp_path / "in", tmp_path / "tree", to="orbax")
    stated, special = (
        built.config.get_text_config(),
        {"model_name": "qwen3.5-35b-a3b-fp8", "weight_dtype": "float8_e4m3fn", "weight_block_size": BLOCK},
    )
    found = logits(case, stated, tmp_path / "tree", ids.numpy(), 1, fused=fused, **special)
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


BLOCK = 8


def _quantise(where: Path, product: Path) -> None:
    """Make FP8 of what MaxText has as FP8, as it is published, and write the products into another checkpoint."""
    from safetensors.torch import load_file, save_file

    found, products = dict[str, Any](), load_file(where / "model.safetensors")
    for name, weight in products.items():
        found[name] = weight
        if name.split(".")[-2] in QUANTISED:
            blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            scale = blocks.abs().amax((1, 3)) / 448
            spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            found[name], found[f"{name}_scale_inv"] = (weight / spread).to(torch.float8_e4m3fn), scale
            products[name] = found[name].float() * spread
    save_file(found, where / "model.safetensors")
    save_file(products, product / "model.safetensors", {"format": "pt"})
    config = json.loads((where / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (where / "config.json").write_text(json.dumps(config))


QUANTISED = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


def _thinker(where: Path) -> None:
    """MaxText has no talker."""
    from safetensors.torch import load_file, save_file

    file = where / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name.startswith("thinker.")}, file)


def _as_kimi(where: Path) -> None:
    """As K2.5 is published: its text within a model that sees."""
    from safetensors.torch import load_file, save_file

    file, config = where / "model.safetensors", json.loads((where / "config.json").read_text())
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(file).items()}, file)
    (where / "config.json").write_text(
        json.dumps({"model_type": "kimi_k25", "text_config": {**config, "model_type": "kimi_k2"}})
    )


def _with_mtp(where: Path) -> None:
    """With a block that predicts one token further, as DeepSeek publishes it; transformers leaves it out."""
    from safetensors.torch import load_file, save_file

    file, config = where / "model.safetensors", json.loads((where / "config.json").read_text())
    tensors, layers = load_file(file), config["num_hidden_layers"]
    last, k = f"model.layers.{layers - 1}.", config["hidden_size"]
    block = {name.removeprefix(last): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)}
    block |= {f"{name}.weight": torch.ones(k, dtype=torch.bfloat16) for name in ("enorm", "hnorm", "shared_head.norm")}
    block["eh_proj.weight"] = torch.ones(k, 2 * k, dtype=torch.bfloat16)
    block["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    block["shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | {f"model.layers.{layers}.{name}": tensor for name, tensor in block.items()}, file)
    (where / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))


EDITED: Mapping[str, Callable[[Path], None]] = {
    "qwen3_omni_moe": _thinker,
    "deepseek_v3-kimi": _as_kimi,
    "deepseek_v3-mtp": _with_mtp,
}


def test_gate_and_up_exchanged_are_noticed(tmp_path):
    """That the test above can fail: MaxText takes the halves the wrong way round without a word."""
    case = "qwen3_moe-sparse"
    stated, ids, wanted = make(case, tmp_path)
    for file in (tmp_path / "in").glob("*.safetensors"):
        _exchange(file)
    convert.prefuse(tmp_path / "in", tmp_path / "wrong", to="orbax")
    found = logits(case, stated, tmp_path / "wrong", ids, 1, fused=True)
    assert np.abs(found - wanted).max() > 0.1


def _exchange(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    words = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    tensors = {".".join(words.get(part, part) for part in name.split(".")): t for name, t in load_file(file).items()}
    save_file(tensors, file)
