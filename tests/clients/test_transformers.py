"""The client that matters most: what we prefuse, transformers loads, and it computes the same logits.

The models are tiny and made by transformers itself, so nothing here shares a line with our tables.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

SMALL = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "mixtral": {"num_local_experts": 12, "intermediate_size": 96},
    "qwen2_moe": {
        "num_experts": 12, "moe_intermediate_size": 40, "intermediate_size": 96, "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {
        "num_experts": 12, "moe_intermediate_size": 40, "intermediate_size": 96, "head_dim": 16, "mlp_only_layers": [1],
    },
    # 2N == K: a forgotten transpose shows in the values only
    "qwen3_moe-square-tied": {
        "num_experts": 11, "moe_intermediate_size": 32, "intermediate_size": 96, "head_dim": 16, "tie_word_embeddings": True,
    },
    "olmoe": {"num_experts": 12, "intermediate_size": 32},
    "deepseek_v3": {
        "n_routed_experts": 12, "moe_intermediate_size": 40, "intermediate_size": 96, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
    },
    "glm4_moe": {
        "n_routed_experts": 12, "moe_intermediate_size": 40, "intermediate_size": 96, "first_k_dense_replace": 1,
        "head_dim": 16, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


IDS = torch.arange(34).reshape(2, 17) * 7 % 160


def logits(path: Path, ids: torch.Tensor = IDS) -> np.ndarray:
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
        return model.eval()(ids, use_cache=False).logits.numpy()


@pytest.fixture(scope="module", params=MODELS)
def original(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param.partition("-")[0], **SMALL | MODELS[request.param])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():  # initialised norms and biases are ones and zeros, which hide mistakes
        parameter.data += torch.randn_like(parameter) * 0.05
    path = tmp_path_factory.mktemp(request.param) / "original"
    model.save_pretrained(path, max_shard_size="200KB")
    return path


def test_transformers_loads_what_we_prefuse(original, tmp_path):
    convert.prefuse(original, tmp_path / "fused", layout="transformers")
    names = json.loads((tmp_path / "fused" / "convert_manifest.json").read_text())["tensors"]
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert not any(".experts.0." in name for name in names)
    np.testing.assert_array_equal(logits(tmp_path / "fused"), logits(original))


@pytest.mark.parametrize("layout", ["concat", "transformers"])
def test_split_gives_back_the_files(original, tmp_path, layout):
    convert.prefuse(original, tmp_path / "fused", layout=layout)
    convert.split(tmp_path / "fused", tmp_path / "again")
    for file in original.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


SHARED = Path(__file__).resolve().parents[3] / "shared" / "checkpoints"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the team's shared checkpoints are not part of the repository")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe_square_tied"])
def test_reference_logits_of_the_shared_checkpoints(name, tmp_path):
    reference = np.load(SHARED / name / "reference_logits.npz")
    convert.prefuse(SHARED / name, tmp_path / "fused", layout="transformers")
    found = [logits(path, torch.tensor(reference["input_ids"])) for path in (tmp_path / "fused", SHARED / name)]
    np.testing.assert_array_equal(*found)
    # The reference was computed on another machine, whose float32 kernels round otherwise; swapped halves differ by 3 to 5.
    np.testing.assert_allclose(found[0], reference["logits_f32"], rtol=0, atol=1e-4)
