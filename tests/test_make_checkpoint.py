"""What the script writes is what safetensors, transformers' index and Orbax say it is."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from scripts._checkpoint_tables import HF_MODELS, MAXTEXT_MODELS
from scripts.make_checkpoint import DTYPES, SIZES, _Values, make_checkpoint


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
                assert np.isfinite(tensor).all()
                if values == "identity" and dtype == "f32":
                    assert np.unique(tensor.view("u4")).size == tensor.size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 4, 256, 192), (4, 4, 512, 256)])
def test_identity_tells_experts_layers_and_rows_apart(dtype, shape):
    """Sizes of which multiples are powers of two, where low bits of a product, and blocks of elements, repeat."""
    tensor = _Values("identity", DTYPES[dtype], 0)("decoder.layers.wi_0", shape)
    rows = {row.tobytes() for row in tensor.view(f"u{tensor.itemsize}").reshape(-1, shape[-1])}
    assert len(rows) == np.prod(shape[:-1])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_files_are_the_bytes_that_safetensors_writes(family, tmp_path):
    path = make_checkpoint(tmp_path / "in", family=family, values="normal")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in path.glob("*.safetensors"):
        loaded = load_file(file)
        assert file.read_bytes() == save(loaded, metadata={"format": "pt"})
        tensors |= loaded
    assert index["metadata"] == {
        "total_parameters": sum(t.size for name, t in tensors.items() if "e_score" not in name),
        "total_size": sum(t.nbytes for t in tensors.values()),
    }
    assert {str(t.dtype) for name, t in tensors.items() if "e_score" in name} <= {"float32"}


def test_one_shard_has_no_index(tmp_path):
    path = make_checkpoint(tmp_path / "in", family="olmoe", layers=1, experts=2, shard=10**9)
    assert [file.name for file in path.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("family", HF_MODELS)
def test_config_says_the_sizes_of_the_tensors(family, tmp_path):
    config = json.loads((make_checkpoint(tmp_path / "in", family=family) / "config.json").read_text())
    assert config["model_type"] == family
    assert config[HF_MODELS[family].count_key] == SIZES["tiny"].experts
    widths = {key: SIZES["tiny"].shape(letter)[0] for key, letter in HF_MODELS[family].widths.items()}
    assert widths.items() <= config.items()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_jax_arrays_and_numpy_arrays_restore_alike(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        one, other = (
            checkpointer.restore(
                make_checkpoint(tmp_path / str(jax_arrays), family="mixtral", format="orbax", jax_arrays=jax_arrays, experts=3)
                / "0/items"
            )["params"]["params"]["decoder"]["layers"]["MoeBlock_0"]
            for jax_arrays in (True, False)
        )
    assert np.asarray(one["wi_0"]).tobytes() == np.asarray(other["wi_0"]).tobytes()
    assert type(one["wi_0"]) is not type(other["wi_0"])


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
    saved = json.loads((path / "0" / "_CHECKPOINT_METADATA").read_text())
    assert saved["custom_metadata"] == {"scan_layers": scanned}


def test_an_existing_output_is_refused(tmp_path):
    with pytest.raises(FileExistsError):
        make_checkpoint(tmp_path, family="mixtral")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [({"format": "gguf"}, KeyError), ({"family": "olmoe", "format": "orbax"}, KeyError), ({"values": "zeros"}, ValueError)],
)
def test_what_it_cannot_make_is_refused_before_anything_is_written(wrong, error, tmp_path):
    with pytest.raises(error):
        make_checkpoint(tmp_path / "in", **{"family": "mixtral"} | wrong)
    assert not (tmp_path / "in").exists()
