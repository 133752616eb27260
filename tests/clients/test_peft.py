"""Real PEFT, of the versions around its change of roles, writes adapters of tiny models, and loads what they become.

Both versions are installed by the test, each in a place of its own. Equal means the same logits to the bit.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert.cli import main

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytestmark = pytest.mark.clients

OLD, NEW = "0.18.1", "0.21.2"
SCRIPT = """
import sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

what, adapter, logits, kind = sys.argv[1:]
torch.manual_seed(0)
size = dict(vocab_size=64, hidden_size=32, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **size)).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
if what == "write":
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=experts)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(adapter)
elif what == "load":
    model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    found = model(torch.arange(24)[None]).logits
torch.save(found, logits)
"""


@pytest.fixture(scope="session")
def peft(tmp_path_factory):
    """Run the script with a version of PEFT: the logits, as bytes."""
    root = tmp_path_factory.mktemp("peft")
    for version in (OLD, NEW):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", root / version]
        subprocess.run([*command, f"peft=={version}", "accelerate", "psutil"], check=True)

    def run(version, what, adapter, kind):
        environment = {**os.environ, "PYTHONPATH": str(root / version), "PYTHONWARNINGS": "ignore"}
        logits = root / "logits.pt"
        command = [sys.executable, "-c", SCRIPT, what, adapter, logits, kind]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return logits.read_bytes()

    return run


def run(*arguments):
    return main([*map(str, arguments), "--quiet"])


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_either_version_loads_what_the_other_wrote(kind, peft, tmp_path):
    base = peft(NEW, "base", tmp_path, kind)
    for wrote, loads, layout in ((OLD, NEW, "packed"), (NEW, OLD, "packed-reversed")):
        given = tmp_path / wrote
        wanted = peft(wrote, "write", given, kind)
        assert wanted != base
        if kind != "gpt_oss":  # whose roles are the same in both
            assert run("--prefuse", given, tmp_path / f"for-{loads}", "--layout", layout) == 0
            assert run("--verify", given, tmp_path / f"for-{loads}") == 0
            given = tmp_path / f"for-{loads}"
        assert peft(loads, "load", given, kind) == wanted


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_split_and_fused_again_it_is_the_same_file(kind, peft, tmp_path):
    given = tmp_path / "in"
    wanted = peft(NEW, "write", given, kind)
    assert run("--split", given, tmp_path / "split") == 0
    assert run("--verify", given, tmp_path / "split") == 0
    if kind != "gpt_oss":  # transformers has no modules for single experts of it
        assert peft(NEW, "load", tmp_path / "split", kind) == wanted
    assert run("--prefuse", tmp_path / "split", tmp_path / "again") == 0
    one, other = (load_file(path / "adapter_model.safetensors") for path in (given, tmp_path / "again"))
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)
    assert peft(NEW, "load", tmp_path / "again", kind) == wanted


@pytest.mark.parametrize("words", ["gate_proj up_proj down_proj", "w1 w3 w2"])
def test_separate_adapters_become_what_peft_itself_makes_of_them(words, peft, tmp_path):
    """PEFT 0.21 converts adapters of transformers 4 when it loads them; without rsLoRA it does it right."""
    kind, moe = ("mixtral", "block_sparse_moe") if "w1" in words else ("qwen3_moe", "mlp")
    rng, found = np.random.default_rng(0), {}
    for layer, e, word in ((layer, e, word) for layer in range(2) for e in range(4) for word in words.split()):
        name = f"base_model.model.model.layers.{layer}.{moe}.experts.{e}.{word}"
        i, o = (24, 32) if word in ("down_proj", "w2") else (32, 24)
        found[f"{name}.lora_A.weight"] = rng.standard_normal((4, i), dtype=np.float32)
        found[f"{name}.lora_B.weight"] = rng.standard_normal((o, 4), dtype=np.float32)
    given = tmp_path / "in"
    given.mkdir()
    save_file(found, given / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": words.split(), "peft_version": OLD}
    (given / "adapter_config.json").write_text(json.dumps(settings))
    wanted = peft(NEW, "load", given, kind)
    assert wanted != peft(NEW, "base", given, kind)
    assert run("--prefuse", given, tmp_path / "out") == 0
    assert run("--verify", given, tmp_path / "out") == 0
    assert peft(NEW, "load", tmp_path / "out", kind) == wanted
