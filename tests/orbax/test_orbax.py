"""Orbax in, Orbax out: what we write, Orbax's own clients restore, with every bit and the tree's structure."""

import json
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
from convert.cli import main
from scripts._checkpoint_tables import MAXTEXT_MODELS
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import restore
from tests.tiny import save as saved_by_orbax

save = partial(saved_by_orbax, zarr3=False)  # Orbax's own default
SMALL = {"experts": 5, "embed": 16, "mlp": 8, "layers": 3, "vocab": 32, "head_dim": 4}


def same(a: Any, b: Any) -> bool:
    one, other = np.asarray(a), np.asarray(b)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def assert_same_trees(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    unequal = [path for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True) if not same(x, y)]
    assert not unequal


def tree(seed: int = 0) -> dict[str, Any]:
    """Random bits, so that bfloat16 NaNs with payloads are among them."""
    rng = np.random.default_rng(seed)

    def bits(*shape: int) -> Any:
        return rng.integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)

    moe = {"gate": {"kernel": bits(6, 4)}, "wi_0": bits(4, 2, 6, 5), "wi_1": bits(4, 2, 6, 5), "wo": bits(4, 2, 5, 6)}
    dense = {"wi_0": {"kernel": bits(6, 5)}, "wi_1": {"kernel": bits(6, 5)}}
    return {"params": {"layers": {"moe_block": moe, "mlp": dense}}, "opt_state": {}, "step": np.int32(3)}


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("family", MAXTEXT_MODELS)
def test_train_states_are_fused_and_split_with_their_moments(family, scanned, tmp_path):
    source = make_checkpoint(tmp_path / "in", family=family, format="orbax", scanned=scanned, train_state=True, **SMALL)
    convert.prefuse(source, tmp_path / "fused")
    old, new = restore(source / "0" / "items"), restore(tmp_path / "fused" / "0" / "items")
    model = MAXTEXT_MODELS[family]
    for state in (lambda t: t["params"]["params"], lambda t: t["opt_state"][0]["nu"]["params"]):
        before, after = (state(t)["decoder"][model.moe if scanned else f"{model.moe}_0"] for t in (old, new))
        for part in model.block.split("."):
            before, after = before[part], after[part]
        assert sorted(after) == ["gate", "wi", "wo"]
        assert same(after["wi"], np.concatenate((before["wi_0"], before["wi_1"]), -1))
    convert.split(tmp_path / "fused", tmp_path / "again")
    assert_same_trees(restore(tmp_path / "again" / "0" / "items"), old)
    assert type(restore(tmp_path / "again" / "0" / "items")["step"]) is type(old["step"])
    assert convert.verify(source, tmp_path / "fused", gemm=False).equal
    assert convert.verify(tmp_path / "fused").equal


@pytest.mark.parametrize(("use_ocdbt", "use_zarr3"), [(True, False), (True, True), (False, False), (False, True)])
def test_every_storage_of_orbax_keeps_every_bit(use_ocdbt, use_zarr3, tmp_path):
    source = save(tmp_path / "in", tree(), ocdbt=use_ocdbt, zarr3=use_zarr3)
    convert.prefuse(source, tmp_path / "fused")
    metadata = json.loads((tmp_path / "fused" / "_METADATA").read_text())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (use_ocdbt, use_zarr3)
    assert metadata["custom_metadata"]["moe_layout"]["layout"] == "concat"
    moe = tree()["params"]["layers"]["moe_block"]
    fused = restore(tmp_path / "fused")["params"]["layers"]
    assert same(fused["moe_block"]["wi"], np.concatenate((moe["wi_0"], moe["wi_1"]), -1))
    assert sorted(fused["mlp"]) == ["wi_0", "wi_1"], "a dense layer's kernels are not experts"
    convert.split(tmp_path / "fused", tmp_path / "again")
    assert_same_trees(restore(tmp_path / "again"), restore(source))


def test_standard_clients_restore_the_output(tmp_path):
    source = make_checkpoint(tmp_path / "in", family="mixtral", format="orbax", **SMALL)
    convert.prefuse(source, tmp_path / "fused")
    wanted = restore(tmp_path / "fused" / "0" / "items")
    assert_same_trees(ocp.StandardCheckpointer().restore(tmp_path / "fused" / "0" / "items"), wanted)
    with ocp.CheckpointManager(tmp_path / "fused", item_handlers=ocp.PyTreeCheckpointHandler(), item_names=None) as manager:
        assert manager.latest_step() == 0


def test_a_sharded_restore_gives_jax_arrays(tmp_path):
    source = save(tmp_path / "in", tree())
    convert.prefuse(source, tmp_path / "fused")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("expert",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    plain = restore(tmp_path / "fused")["params"]
    wanted = {"params": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), plain)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arguments = ocp.checkpoint_utils.construct_restore_args(wanted)
        found = checkpointer.restore(
            tmp_path / "fused", args=ocp.args.PyTreeRestore(wanted, restore_args=arguments, partial_restore=True)
        )
    assert all(isinstance(leaf, jax.Array) and leaf.sharding == sharding for leaf in jax.tree.leaves(found))
    assert_same_trees(found["params"], plain)


def test_several_steps_are_not_chosen_from(tmp_path, capsys):
    for step in ("100", "200"):
        save(tmp_path / "in" / step / "items", tree())
    assert main(["--prefuse", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]) == 3
    assert "100" in (message := capsys.readouterr().err)
    assert "200" in message
    assert main(["--prefuse", str(tmp_path / "in" / "200"), str(tmp_path / "out"), "--quiet"]) == 0


def test_an_unmarked_wi_is_refused_until_its_layout_is_named(tmp_path, capsys):
    params = tree()
    moe = params["params"]["layers"]["moe_block"]
    moe["wi"] = np.concatenate((moe.pop("wi_0"), moe.pop("wi_1")), -1)
    source = save(tmp_path / "in", params)
    assert main(["--split", str(source), str(tmp_path / "out"), "--quiet"]) == 4
    assert "--source-layout" in capsys.readouterr().err
    assert main(["--split", str(source), str(tmp_path / "out"), "--quiet", "--source-layout", "concat"]) == 0
    assert_same_trees(restore(tmp_path / "out"), restore(save(tmp_path / "separate", tree())))


def test_an_optimizer_state_that_does_not_concatenate_is_refused(tmp_path, capsys):
    params = tree()
    factored = {"wi_0": np.ones((4, 2), np.float32), "wi_1": np.ones((4, 2), np.float32)}
    params["opt_state"] = {"v_row": {"layers": {"moe_block": factored}}}
    assert main(["--prefuse", str(save(tmp_path / "in", params)), str(tmp_path / "out"), "--quiet"]) == 4
    assert "opt_state.v_row.layers.moe_block.wi_0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_side_files_and_custom_metadata_come_along(tmp_path):
    source = make_checkpoint(tmp_path / "in", family="mixtral", format="orbax", **SMALL)
    (source / "0" / "iter").mkdir()
    (source / "0" / "iter" / "process_0.json").write_text("{}")
    convert.prefuse(source, tmp_path / "fused")
    for file in ("0/_CHECKPOINT_METADATA", "0/iter/process_0.json"):
        assert (tmp_path / "fused" / file).read_bytes() == (source / file).read_bytes()


def test_an_optimizer_that_cannot_be_fused_is_refused_or_left_out(tmp_path, capsys):
    weights = {name: np.ones((2, 4, 6), np.float32) for name in ("wi_0", "wi_1")} | {"wo": np.ones((2, 6, 4), np.float32)}
    rows = {name: {"v_row": np.ones((2, 4), np.float32), "v_col": np.ones((2, 6), np.float32)} for name in weights}
    tree = {"params": {"params": {"decoder": {"moe": weights}}}, "opt_state": {"v": {"params": {"decoder": {"moe": rows}}}}}
    save(tmp_path / "in", tree)
    assert main(["--prefuse", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]) == 4
    assert "--drop-optimizer" in capsys.readouterr().err
    assert main(["--prefuse", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet", "--drop-optimizer"]) == 0
    found = restore(tmp_path / "out")
    assert not found["opt_state"]
    assert found["params"]["params"]["decoder"]["moe"]["wi"].shape == (2, 4, 12)
