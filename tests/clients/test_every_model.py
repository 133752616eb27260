"""Every family that transformers can make a tiny model of: it loads what we prefuse, and computes the same logits.

The models are transformers' own, from their default configurations cut down to a few thousand weights. What we fuse is compared
with the parameters that the model itself holds, so that no line of ours is on both sides.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import convert
from convert.errors import PlanError
from layouts.families import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

SMALL = {
    "vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "head_dim": 16, "moe_intermediate_size": 40,
    "intermediate_size": 96,
    "num_experts": 12, "num_local_experts": 12, "n_routed_experts": 12, "moe_num_experts": 12, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 16, "shared_expert_intermediate_size": 56, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_dense_layers": 1, "expert_ffn_hidden_size": 40, "ffn_hidden_size": 96, "moe_topk": 2, "moe_k": 2,
    "num_layers": 2, "zero_expert_num": 0,
}  # fmt: skip
KINDS = (
    "qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite",
    "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "hy_v3", "afmoe", "exaone_moe", "cohere2_moe", "solar_open", "mellum",
    "mimo_v2_flash", "laguna", "axk1", "mixtral", "phimoe", "minimax", "minimax_m2", "qwen3_5_moe_text", "gpt_oss",
    "llama4_text", "granitemoe", "granitemoeshared", "jetmoe", "aria_text", "deepseek_v32", "glm_moe_dsa", "bailing_hybrid",
    "jamba", "beam", "flint", "kolibri1", "axk2", "kimi_linear", "deepseek_v4", "hy_v4",
    "granitemoe_swa", "granitemoehybrid",
)  # fmt: skip
NOT_HERE = {
    "qwen3_omni_moe": "no causal model; the thinker alone needs its vision and audio parts",
    "qwen3_vl_moe": "no causal model",
    "longcat_flash": "two attentions a layer, whose rotary sizes cannot be cut down by one number",
    "klear": "remote code",
    "arctic": "remote code",
    "hunyuan": "remote code",
    "unlimited_ocr": "no causal model",
    "mistral4": "no causal model",
    "mistral_large4": "no causal model",
    "step3p5": "no causal model",
    "inkling": "no causal model",
    "muse_spark": "no causal model",
    "openai_privacy_filter": "no causal model",
    "lfm2_moe": "its layer types are a list that a tiny model has to make up",
    "gemma4": "its head width varies from layer to layer and cannot be cut down by one number",
    "zaya": "its configuration cannot be cut down",
    "dbrx": "its configuration is nested, and transformers 5.23 does not build one of its own making",
}
"""Families without a model here, and why; tests/test_by_hand.py has them all the same."""
FUSED = ("experts.gate_up_proj", ".mlp.input_linear.weight")
"""What models call the parameter that holds gate and up."""
IDS = torch.arange(34).reshape(2, 17) * 7 % 160


def kind_of(path: Path) -> str:
    return json.loads((path / "config.json").read_text())["model_type"]


def logits(path: Path) -> np.ndarray:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert not info["missing_keys"], info
    assert not info["mismatched_keys"], info
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.numpy()


@pytest.fixture(scope="module", params=KINDS)
def original(request, tmp_path_factory):
    torch.manual_seed(0)
    usual = transformers.AutoConfig.for_model(request.param)
    sizes = {key: value for key, value in SMALL.items() if hasattr(usual, key)}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)  # there it is that of the rotary part alone
    if request.param in ("beam", "flint"):
        sizes["num_hidden_layers"] = 6  # the first ones are dense
    config = transformers.AutoConfig.for_model(request.param, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # initialised norms and biases are ones and zeros, which hide mistakes
        parameter.data += torch.randn_like(parameter) * 0.05
    path = tmp_path_factory.mktemp(request.param) / "original"
    model.save_pretrained(path, max_shard_size="200KB")
    held = {name: array for name, array in model.state_dict().items() if name.endswith(FUSED)}
    return path, held


def test_transformers_loads_what_we_prefuse(original, tmp_path):
    path, _ = original
    fused = next(family for family in FAMILIES if kind_of(path) in family.model_types).transformers
    if fused is not None:
        with pytest.raises(PlanError, match="there is nothing to prefuse"):
            convert.prefuse(path, tmp_path / "fused", layout="transformers")
        convert.prefuse(path, tmp_path / "concat")
        convert.split(tmp_path / "concat", tmp_path / "fused")
    else:
        convert.prefuse(path, tmp_path / "fused", layout="transformers")
        names = json.loads((tmp_path / "fused" / "convert_manifest.json").read_text())["tensors"]
        assert not any(".experts.0." in name for name in names)
    np.testing.assert_array_equal(logits(tmp_path / "fused"), logits(path))


def test_split_gives_back_the_files(original, tmp_path):
    path, _ = original
    convert.prefuse(path, tmp_path / "fused")
    convert.split(tmp_path / "fused", tmp_path / "again")
    for file in path.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_what_we_fuse_is_what_the_model_holds(original, tmp_path):
    """The model's own `gate_up_proj` is (E, 2N, K) with gate first, but where its family says otherwise."""
    path, held = original
    convert.prefuse(path, tmp_path / "fused")
    fused = {name: array for file in (tmp_path / "fused").glob("*.safetensors") for name, array in load_file(file).items()}
    wi = {int(name.split(".")[2]): array for name, array in fused.items() if name.endswith(".wi")}
    kind = kind_of(path)
    assert wi
    ups = {int(name.split(".")[2]): array for name, array in held.items()}
    assert ups.keys() == wi.keys()
    for layer, own in ups.items():
        if kind == "gpt_oss":
            wanted = torch.cat((own[..., ::2], own[..., 1::2]), -1)
        else:
            wanted = own if kind in ("llama4_text", "aria_text") else own.transpose(1, 2)
        assert torch.equal(wi[layer], wanted), layer


def test_no_family_is_forgotten():
    known = {kind for family in FAMILIES for kind in family.model_types if kind in KINDS}
    assert known == set(KINDS)
    without = {family.name for family in FAMILIES if family.format == "hf" and not known & set(family.model_types)}
    assert without == set(NOT_HERE)
