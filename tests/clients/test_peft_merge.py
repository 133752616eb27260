"""PEFT's own merge of tiny models against ours, tensor by tensor, as transformers saves them.

PEFT multiplies with BLAS, and rounds the update to the type of the weights before it adds it; we add in float32 and round
once. So whole numbers, which no sum rounds, have to give the same numbers in every type; others are compared in float32, within
what the order of a sum can change.
"""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.clients.test_peft import NEW, OLD

pytestmark = pytest.mark.clients

RANK = 4
SCRIPT = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

def made(root, kind, dtype, whole):
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2, head_dim=8,
                num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_local_experts=4, num_experts_per_tok=2,
                tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size), dtype=dtype)

    def fill(parameter, most):
        with torch.no_grad():
            draw = torch.randint(-most, most + 1, parameter.shape) if whole else torch.randn(parameter.shape) / 4
            parameter.copy_(draw)

    for parameter in model.parameters():
        fill(parameter, 8)
    model.save_pretrained(f"{root}/base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "embed_tokens", "lm_head"],
                        modules_to_save=["norm"], target_parameters=experts)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            fill(parameter, 2)
    model.save_pretrained(f"{root}/adapter")
    model.merge_and_unload().save_pretrained(f"{root}/wanted")

torch.manual_seed(0)
root, kind = sys.argv[1:]
for dtype, whole in ((torch.float32, True), (torch.bfloat16, True), (torch.float32, False)):
    made(f"{root}/{dtype}-{whole}", kind, dtype, whole)
"""


@pytest.fixture(scope="module")
def peft(tmp_path_factory):
    """Run the script with a version of PEFT."""
    root = tmp_path_factory.mktemp("peft")

    def run(version, *arguments):
        place = root / version
        if not place.exists():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", place]
            subprocess.run([*command, f"peft=={version}", "accelerate", "psutil"], check=True)
        environment = {"PYTHONPATH": str(place), "PYTHONWARNINGS": "ignore", "PATH": "/usr/bin:/bin", "HOME": str(root)}
        command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return run


def load(path):
    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def three(root):
    """Base, what PEFT made of it, and what we did."""
    words = ["--merge", root / "adapter", root / "ours", "--base", root / "base", "--quiet"]
    assert main([str(word) for word in words]) == 0
    base, wanted, found = (load(root / name) for name in ("base", "wanted", "ours"))
    assert found.keys() == wanted.keys() == base.keys()
    for word in ("experts", "q_proj", "o_proj", "embed_tokens", "lm_head", "model.norm"):
        assert any(word in name and (base[name] != wanted[name]).any() for name in base), word
    return base, wanted, found


@pytest.mark.parametrize(("kind", "version"), [("qwen3_moe", NEW), ("mixtral", NEW), ("gpt_oss", NEW), ("qwen3_moe", OLD)])
def test_it_is_what_peft_merges(kind, version, peft, tmp_path):
    peft(version, tmp_path, kind)
    for dtype in ("float32", "bfloat16"):
        _, wanted, found = three(tmp_path / f"torch.{dtype}-True")
        for name in wanted:
            assert found[name].dtype == wanted[name].dtype, name
            assert np.array_equal(found[name].astype("f4"), wanted[name].astype("f4")), name  # PEFT's -0.0 + 0.0 is 0.0
    base, wanted, found = three(tmp_path / "torch.float32-False")
    for name in wanted:
        update = np.abs(wanted[name].astype(float) - base[name]).max()
        assert np.abs(found[name].astype(float) - wanted[name]).max() <= 2.0**-24 * (RANK + 2) * 4 * (1 + update), name
