"""What the script writes is what safetensors, transformers' index and Orbax say it is."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from scripts._checkpoint_tables import HF_MODELS, MAXTEXT_MODELS
from scripts.make_checkpoint import make_checkpoint


@pytest.mark.parametrize("family", HF_MODELS)
def test_hf_checkpoints_are_whole_and_repeatable(family, tmp_path):
    one, other = (make_checkpoint(tmp_path / name, family=family) for name in ("one", "other"))
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    assert all((one / file).read_bytes() == (other / file).read_bytes() for file in files)
    weight_map = json.loads((one / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for shard in set(weight_map.values()):
        with safe_open(one / shard, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), shard)
    assert found == weight_map
    homes = {w: {s for n, s in weight_map.items() if f".0.{w}." in n} for w in HF_MODELS[family].experts[1:]}
    assert len(set.union(*homes.values())) > 1, "gate and up of one expert should be in different shards"


@pytest.mark.parametrize("values", ["random", "normal", "identity"])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_values_are_finite_or_unique(values, dtype, tmp_path):
    path = make_checkpoint(tmp_path / "in", family="mixtral", values=values, dtype=dtype, experts=2, layers=1)
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="np") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                assert any(tensor.tobytes())
                if values != "identity":
                    assert np.isfinite(tensor).all()
                elif dtype == "f32":
                    assert np.unique(tensor.view("u4")).size == tensor.size


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("family", MAXTEXT_MODELS)
def test_orbax_checkpoints_restore_as_maxtext_lays_them_out(family, scanned, tmp_path):
    import orbax.checkpoint as ocp

    path = make_checkpoint(
        tmp_path / "in", family=family, format="orbax", scanned=scanned, train_state=True, experts=5, embed=16, mlp=8
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore(path / "0" / "items")
    decoder = state["params"]["params"]["decoder"]
    model = MAXTEXT_MODELS[family]
    layers = 2 if model.dense else 3
    block = decoder[model.moe if scanned else f"{model.moe}_0"]
    for part in model.block.split("."):
        block = block[part]
    assert block["wi_0"].shape == ((5, layers, 16, 8) if scanned else (5, 16, 8))
    assert block["wo"].shape == ((5, layers, 8, 16) if scanned else (5, 8, 16))
    assert state["opt_state"][0]["mu"]["params"]["decoder"].keys() == decoder.keys()
    assert int(state["step"]) == 7


def test_an_existing_output_is_refused(tmp_path):
    with pytest.raises(FileExistsError):
        make_checkpoint(tmp_path, family="mixtral")
