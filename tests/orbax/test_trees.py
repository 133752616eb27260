"""Every tree of MaxText on the disk: proven on both sides, the way back byte for byte, and what is left out is said."""

import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.errors import PlanError, UsageError
from tests.planning.models import MODELS, TWINS, reader
from tests.tiny import tree

NEW = ("deepseek_v32", "kimi_k25", "qwen3_vl_moe", "qwen3_omni_moe", "qwen3_5_moe")


def save(name: str, where: Path) -> Path:
    found = reader(name)
    where.mkdir()
    save_file({key: array.view("f4") for key, array in found.arrays.items()}, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(found.config))
    return where


def edit(where: Path, *changes: str, drop: bool = False) -> None:
    """Flip a bit of some tensors, or leave them out."""
    file = where / "model.safetensors"
    arrays = load_file(file)
    for name in changes:
        if drop:
            del arrays[name]
        else:
            arrays[name].view("u4").flat[-1] ^= 1
    save_file(arrays, file)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A checkpoint and the fused tree of it, made once for each name."""
    found: dict[str, tuple[Path, Path]] = {}

    def made(name: str) -> tuple[Path, Path]:
        if name not in found:
            where = tmp_path_factory.mktemp(name)
            found[name] = save(name, where / "in"), where / "tree"
            convert.prefuse(*found[name], to="orbax")
        return found[name]

    return made


@pytest.mark.parametrize("name", NEW)
def test_there_proven_and_back(name, pairs, tmp_path):
    source, out = pairs(name)
    assert convert.verify(source, out, gemm=False).equal
    assert convert.digest(source).model == convert.digest(out).model
    convert.split(out, tmp_path / "again", to="hf")
    assert tree(source).items() <= tree(tmp_path / "again").items()


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(("scan", "axis", "fused"), [(True, 0, True), (True, 1, False), (False, 1, True), (False, 1, False)])
def test_there_proven_and_back_in_every_form(name, scan, axis, fused, tmp_path):
    source, out = save(name, tmp_path / "in"), tmp_path / "tree"
    (convert.prefuse if fused else convert.reformat)(source, out, to="orbax", scan=scan, scan_axis=axis)
    assert convert.verify(source, out).equal
    (convert.split if fused else convert.reformat)(out, tmp_path / "again", to="hf")
    assert tree(source).items() <= tree(tmp_path / "again").items()


def test_a_tree_says_along_which_axis_layers_are_that_maxtext_does_not_train(tmp_path, monkeypatch):
    """As many layers as experts: no shape tells it, and the record comes along, whatever is made of the tree."""
    monkeypatch.setattr("tests.planning.models.E", 3)
    source = save("deepseek_v3", tmp_path / "in")
    convert.reformat(source, tmp_path / "tree", to="orbax")
    convert.prefuse(tmp_path / "tree", tmp_path / "fused")
    assert convert.verify(source, tmp_path / "fused", gemm=False).equal
    convert.split(tmp_path / "fused", tmp_path / "again", to="hf")
    assert tree(source).items() <= tree(tmp_path / "again").items()


@pytest.mark.parametrize(("name", "root"), [("deepseek_v3", ()), ("qwen3_moe", ("model",))])
def test_a_model_below_another_root_is_one(name, root, tmp_path):
    """As MaxText's training engine saves it: the state of an NNX module, with that of its random numbers."""
    source = save(name, tmp_path / "in")
    convert.reformat(source, tmp_path / "tree", to="orbax")
    checkpointer = ocp.PyTreeCheckpointer()
    model = checkpointer.restore(tmp_path / "tree" / "0" / "items")["params"]["params"]
    model["decoder"]["rngs"] = {"dropout": {"key": np.ones(2, "u4")}}
    for word in reversed(root):
        model = {word: model}
    step = tmp_path / "engine"
    checkpointer.save(step / "model_params", model)
    shutil.copy(source / "config.json", step)
    with pytest.raises(PlanError, match=rf"first {'.'.join((*root, 'decoder.rngs'))}"):
        convert.reformat(step, tmp_path / "out", to="hf")
    loaded = convert.load(step, layout="native", names="hf", params_only=True)
    assert loaded.keys() == load_file(source / "model.safetensors").keys()
    with pytest.raises(PlanError, match=r"below another root than params\.params"):
        convert.save(loaded, tmp_path / "out", like=step, layout="native", names="hf")
    assert convert.digest(step).model == convert.digest(source).model
    checkpointer.save(tmp_path / "two", {"ema": model, "now": model})  # which of them is the model?
    shutil.copy(source / "config.json", tmp_path / "two")
    assert "nothing of the model is below params.params" in convert.digest(tmp_path / "two").why
    with pytest.raises(PlanError, match=r"nothing of the model is below params\.params, .*params_only=True should"):
        convert.reformat(tmp_path / "two", tmp_path / "out", to="hf", params_only=True)
    convert.prefuse(step, tmp_path / "fused")
    for tree_of in (step, tmp_path / "fused"):
        assert convert.verify(source, tree_of, gemm=False).equal
        out = tmp_path / f"{tree_of.name}-hf"
        (convert.split if tree_of.name == "fused" else convert.reformat)(tree_of, out, to="hf", params_only=True)
        assert convert.verify(source, out, gemm=False).equal


def test_an_optimizer_that_is_left_out_need_not_be_fused(tmp_path):
    source = save("qwen3_moe", tmp_path / "in")
    convert.reformat(source, tmp_path / "tree", to="orbax")
    checkpointer = ocp.PyTreeCheckpointer()
    found = checkpointer.restore(tmp_path / "tree" / "0" / "items")
    checkpointer.save(tmp_path / "run" / "items", found | {"opt_state": {"muon": {"mu": found["params"]}}})
    shutil.copy(source / "config.json", tmp_path / "run")
    with pytest.raises(PlanError, match="muon's"):
        convert.reformat(tmp_path / "run", tmp_path / "out", to="hf")
    convert.reformat(tmp_path / "run", tmp_path / "out", to="hf", params_only=True)
    assert convert.verify(source, tmp_path / "out", gemm=False).equal
    leaf = "model.layers.0.mlp.gate.weight"
    assert leaf in convert.load(tmp_path / "run", layout="concat", names="hf", params_only=True)


BITS = [
    ("deepseek_v32", "model.layers.3.eh_proj.weight"),
    ("deepseek_v32", "model.layers.3.mlp.experts.7.down_proj.weight"),
    ("deepseek_v32", "model.layers.3.embed_tokens.weight"),
    ("qwen3_vl_moe", "model.visual.blocks.1.attn.qkv.weight"),
    ("qwen3_vl_moe", "model.visual.blocks.0.attn.qkv.bias"),
    ("qwen3_omni_moe", "thinker.audio_tower.conv2d3.weight"),
]


@pytest.mark.parametrize(("name", "tensor"), BITS)
def test_one_flipped_bit_is_found(name, tensor, pairs, tmp_path):
    source, out = pairs(name)
    other = Path(shutil.copytree(source, tmp_path / "other"))
    edit(other, tensor)
    verdict = convert.verify(other, out, gemm=False)
    assert not verdict.equal
    assert tensor.split(".experts")[0] in str(verdict)
    assert convert.digest(other).model != convert.digest(out).model


@pytest.mark.slow
def test_large_tensors_that_take_turns_are_compared_in_parts(pairs, tmp_path, monkeypatch):
    """Along the axis that they have in common with the array; where config.json says other sizes, they differ."""
    source, out = pairs("qwen3_5_moe")
    monkeypatch.setattr("convert.verifier.bits.formats._LARGE", 100)
    assert convert.verify(source, out, gemm=False).equal
    other = Path(shutil.copytree(source, tmp_path / "other"))
    edit(other, name := "model.language_model.layers.6.linear_attn.in_proj_z.weight")
    assert name in str(convert.verify(other, out, gemm=False))
    file = Path(shutil.copytree(out, tmp_path / "tree")) / "config.json"
    file.write_text(file.read_text().replace('"linear_num_value_heads": 4', '"linear_num_value_heads": 6'))
    assert "in_proj_qkvz.kernel has 28 rows, and 36 by config.json" in convert.digest(tmp_path / "tree").why
    (other / "config.json").write_text(file.read_text())
    verdict = str(convert.verify(other, tmp_path / "tree", gemm=False))
    assert "layers.0.linear_attn.in_proj_qkv.weight differs from params.params.decoder.layers.layer_0.attention" in verdict


@pytest.mark.parametrize("twin", TWINS)
def test_a_copy_that_is_none_is_not_dropped(twin, tmp_path, capsys):
    source = save("deepseek_v32", tmp_path / "in")
    name = f"model.layers.3.{twin.removeprefix('layers.3.')}"
    edit(source, name)
    assert main(["--prefuse", str(source), str(tmp_path / "out"), "--to", "orbax", "--quiet"]) == 4
    assert f"{name} (in model.safetensors) is not what" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    convert.prefuse(source, tmp_path / "out", to="orbax", drop_mtp=True)


def test_what_is_left_out_is_said(tmp_path, capsys):
    source, out = save("deepseek_v32", tmp_path / "in"), tmp_path / "out"
    gone = {name for name in load_file(source / "model.safetensors") if name.startswith("model.layers.3.")}
    assert main(["--prefuse", str(source), str(out), "--to", "orbax", "--drop-mtp", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "left out, as --drop-mtp says:" in said
    assert all(f"  {name}\n" in said for name in gone)
    report = convert.prefuse(source, out, to="orbax", drop_mtp=True)
    manifest = json.loads((out / "convert_manifest.json").read_text())
    assert manifest["left_out"] == dict.fromkeys(sorted(gone), "--drop-mtp") == dict(sorted(report.plan.left_out.items()))
    assert not any("mtp" in name for name in manifest["tensors"])
    verdict = convert.verify(source, out, gemm=False)
    assert verdict.equal
    assert f"{len(gone)} tensors of MTP blocks were left out" in str(verdict)
    convert.split(out, tmp_path / "again", to="hf")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(
        np.array_equal(a.view("u4"), again.pop(n).view("u4"))
        for n, a in load_file(source / "model.safetensors").items()
        if n not in gone
    )
    assert not again
    # What is missing without the user's word is a difference.
    convert.prefuse(source, tmp_path / "whole", to="orbax")
    edit(source, *gone, drop=True)
    assert not convert.verify(source, tmp_path / "whole", gemm=False).equal


def test_a_block_is_left_out_on_the_way_back(tmp_path):
    source = save("deepseek_v32", tmp_path / "in")
    convert.prefuse(source, tmp_path / "tree", to="orbax")
    report = convert.split(tmp_path / "tree", tmp_path / "again", to="hf", drop_mtp=True)
    assert all(name.startswith("params.params.mtp_block.") for name in report.plan.left_out)
    assert not any("layers.3." in name for name in load_file(tmp_path / "again" / "model.safetensors"))


def test_blocks_without_a_place_are_named_with_the_way_out(tmp_path):
    """Qwen3-Next publishes `mtp.*`, and MaxText has no place for it."""
    source = save("qwen3_next", tmp_path / "in")
    file = source / "model.safetensors"
    save_file(load_file(file) | {"mtp.fc.weight": np.ones((8, 16), "f4"), "mtp.norm.weight": np.ones(8, "f4")}, file)
    with pytest.raises(PlanError, match=r"2 tensors have no place .*drop_mtp=True leaves out"):
        convert.prefuse(source, tmp_path / "out", to="orbax")
    convert.prefuse(source, tmp_path / "out", to="orbax", drop_mtp=True)
    assert convert.verify(source, tmp_path / "out", gemm=False).equal


def test_where_nothing_can_be_left_out(tmp_path):
    source = save("deepseek_v32", tmp_path / "in")
    with pytest.raises(UsageError, match="drop_mtp=True is for conversions between formats"):
        convert.prefuse(source, tmp_path / "out", drop_mtp=True)
    with pytest.raises(UsageError, match="content=True: drop_mtp=True leaves out"):
        convert.prefuse(source, tmp_path / "out", to="orbax", drop_mtp=True, content=True)


def test_every_tree_has_a_model():
    from layouts.tables.families import FAMILIES
    from layouts.tables.maxtext_trees import TREES

    names = {next(f.name for f in FAMILIES if name in f.model_types) for name in MODELS}
    assert set(TREES) - names == {"deepseek_v2"}, "which has the tree of deepseek_v3"
