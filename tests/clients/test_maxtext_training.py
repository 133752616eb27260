"""A training run of MaxText goes on from the checkpoint that we prefused, weights and Adam's moments, as if nothing had been.

Trains tiny models for four steps, some on four simulated devices (fsdp 2, tensor 2), fuses what was saved after the third, and
lets MaxText do the fourth step again with `prefuse_moe_weights`. Needs what `test_maxtext` needs.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert
from layouts.checkpoint import open_checkpoint
from layouts.tensors import bits, numpy_dtype

maxtext = pytest.importorskip("maxtext")

pytestmark = pytest.mark.clients

OPTIONS = (
    "hardware=cpu skip_jax_distributed_system=true dataset_type=synthetic steps=4 checkpoint_period=2 "
    "async_checkpointing=false "
    "override_model_config=true log_config=false enable_goodput_recording=false monitor_goodput=false "
    "base_emb_dim=64 base_mlp_dim=32 base_moe_mlp_dim=32 base_num_query_heads=4 base_num_kv_heads=4 "
    "head_dim=16 vocab_size=160 num_experts=8 num_experts_per_tok=2 per_device_batch_size=2 "
    "max_target_length=16 dtype=float32 weight_dtype=float32 attention=dot_product sparse_matmul=true megablox=false "
    "capacity_factor=-1.0"
)
ON_FOUR = "ici_fsdp_parallelism=2 ici_tensor_parallelism=2"
LATENT = "q_lora_rank=0 kv_lora_rank=16 qk_nope_head_dim=16 qk_rope_head_dim=8 v_head_dim=16"
CASES = {
    "qwen3, scanned": ("model_name=qwen3-30b-a3b base_num_decoder_layers=2 scan_layers=true", 3),
    "qwen3, unscanned": ("model_name=qwen3-30b-a3b base_num_decoder_layers=2 scan_layers=false", 6),
    "qwen3, on 4 devices": (f"model_name=qwen3-30b-a3b base_num_decoder_layers=2 scan_layers=true {ON_FOUR}", 3),
    "deepseek": (
        f"model_name=deepseek2-16b base_num_decoder_layers=3 first_num_dense_layers=1 scan_layers=true {LATENT} {ON_FOUR}",
        3,
    ),
    "gpt-oss": (f"model_name=gpt-oss-20b base_num_decoder_layers=2 scan_layers=true sliding_window_size=8 {ON_FOUR}", 6),
}
"""The options of a model, and how many arrays of its are weights, mu or nu of a `wi`: gpt-oss scans pairs of layers."""


def train(where: Path, run: str, *options: str) -> Path:
    """The checkpoints of a run, which goes on from what it finds there."""
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    own = [f"run_name={run}", f"base_output_directory={where}"]
    command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", str(base), *own, *OPTIONS.split(), *options]
    devices = ["--xla_force_host_platform_device_count=4"] if ON_FOUR.split()[0] in options else []
    flags = [*os.environ.get("XLA_FLAGS", "").split(), *devices]  # XLA ends where there are none but a space
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return where / run / "checkpoints"


def arrays(path: Path) -> dict[str, np.ndarray]:
    reader = open_checkpoint(path)
    found = {}
    for name, spec in reader.tensors.items():
        block = reader.read(name, (slice(None),) * len(spec.shape))
        found[name] = block.view(bits(spec.dtype)).view(numpy_dtype(spec.dtype))
    reader.close()
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_from_a_prefused_checkpoint(case, tmp_path):
    options, moving = CASES[case]
    saved = train(tmp_path, "separate", *options.split())
    fused = tmp_path / "fused" / "checkpoints"
    fused.mkdir(parents=True)
    convert.prefuse(saved / "2", fused / "2")
    assert convert.verify(saved / "2", fused / "2").equal
    assert train(tmp_path, "fused", *options.split(), "prefuse_moe_weights=true") == fused
    before, wanted, found = arrays(saved / "2"), arrays(saved / "3"), arrays(fused / "3")
    stepped = 0
    for name, array in found.items():
        halves = [f"{name}_0", f"{name}_1"] if name.endswith(".wi") else [name]
        one, old = (
            np.concatenate([each[half] for half in halves], -1) if array.ndim else each[name] for each in (wanted, before)
        )
        if array.dtype == np.float32:
            np.testing.assert_allclose(array, one, atol=1e-7)
            stepped += name.endswith(".wi") and not np.array_equal(one, old)
        else:
            assert np.array_equal(array, one), name
    assert stepped == moving, "weights, mu and nu of every wi have moved in the fourth step"
    convert.split(fused / "3", tmp_path / "split", source_layout="concat")  # what MaxText saves does not say it
    assert arrays(tmp_path / "split").keys() == wanted.keys()
    assert convert.verify(fused / "3", tmp_path / "split", source_layout="concat").equal
