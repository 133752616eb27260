"""Hugging Face to MaxText on the disk: Orbax restores what we write, and the way back gives every file again."""

import json
import signal
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.errors import PlanError
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import tree

FAMILIES = ["qwen3_moe", "deepseek_v3"]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param) / "in", family=request.param, shard=100_000)


def restore(path: Path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(path / "0" / "items")


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_orbax_restores_the_tree_and_the_way_back_restores_the_files(source, tmp_path, scan):
    report = convert.prefuse(source, tmp_path / "tree", to="orbax", scan=scan)
    assert report.plan.format == "orbax"
    params = restore(tmp_path / "tree")["params"]["params"]
    hf = tensors(source)
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], hf["model.embed_tokens.weight"])
    last = max(int(name.split(".")[2]) for name in hf if ".experts." in name)
    decoder = params["decoder"]
    if "qwen3" in report.plan.family:
        block = decoder["layers"]["moe_block"] if scan else decoder[f"layers_{last}"]["moe_block"]
    else:
        layer = decoder["moe_layers"] if scan else decoder[f"moe_layers_{last - 1}"]
        block = layer["DeepSeekMoeBlock_0"]["MoeBlock_0"]
    gate, up = (hf[f"model.layers.{last}.mlp.experts.11.{word}_proj.weight"].T for word in ("gate", "up"))
    wi = block["wi"][11, -1] if scan else block["wi"][11]
    np.testing.assert_array_equal(wi, np.concatenate((gate, up), -1))
    convert.split(tmp_path / "tree", tmp_path / "again", to="hf")
    again = tree(tmp_path / "again")
    assert again.pop("convert_manifest.json")
    assert again == tree(source)


def test_a_tree_with_its_layers_first_says_so_itself(source, tmp_path):
    """`param_scan_axis` 0, from and to Hugging Face, fused later, split, verified: nobody has to say it twice."""
    convert.reformat(source, tmp_path / "tree", to="orbax", scan_axis=0)
    block = restore(tmp_path / "tree")["params"]["params"]["decoder"]
    block = block["layers"]["moe_block"] if "layers" in block else block["moe_layers"]["DeepSeekMoeBlock_0"]["MoeBlock_0"]
    assert block["wi_0"].shape[1:] == (12, 64, 40)
    convert.prefuse(tmp_path / "tree", tmp_path / "fused")
    convert.split(tmp_path / "fused", tmp_path / "split")
    for one, other in (("tree", "fused"), ("split", "fused"), ("tree", "split")):
        assert convert.verify(tmp_path / one, tmp_path / other, gemm=False).equal
        assert convert.verify(source, tmp_path / one, gemm=False).equal
    for name in ("tree", "fused", "split"):
        (convert.reformat if name == "tree" else convert.split)(tmp_path / name, tmp_path / f"{name}-hf", to="hf")
        assert tree(source).items() <= tree(tmp_path / f"{name}-hf").items()
    with pytest.raises(PlanError, match="it was written as maxtext-axis-0"):
        convert.plan(tmp_path / "fused", tmp_path / "out", split=True, to="hf", scan_axis=1)


def test_a_tree_of_maxtext_with_its_layers_first_has_to_be_named(tmp_path):
    """What nobody of ours wrote: shapes could tell 12 experts from 3 layers here, but not where both are as many."""
    shapes = {"wi_0": (3, 12, 8, 4), "wi_1": (3, 12, 8, 4), "wo": (3, 12, 4, 8)}
    params = {name: np.random.default_rng(0).standard_normal(shape, "f4") for name, shape in shapes.items()}
    item = {"params": {"params": {"decoder": {"layers": {"moe_block": params}}}}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in" / "0" / "items", item)
    convert.prefuse(tmp_path / "in", tmp_path / "out", scan_axis=0)
    verdict = convert.verify(tmp_path / "in", tmp_path / "out")
    assert verdict.equal
    assert "layer" in str(verdict)
    fused = restore(tmp_path / "out")["params"]["params"]["decoder"]["layers"]["moe_block"]["wi"]
    np.testing.assert_array_equal(fused, np.concatenate((params["wi_0"], params["wi_1"]), -1))
    plan = convert.plan(tmp_path / "in", tmp_path / "x", prefuse=True, scan_axis=0)
    assert {target.sizes["e"] for target in plan.targets if target.role == "wi"} == {12}


@pytest.mark.parametrize(
    ("name", "scan", "blocks"), [("qwen3_moe", True, 3), ("qwen3_moe", False, 3), ("deepseek_v3", True, 2)]
)
def test_the_summary_counts_layers_also_in_stacks(name, scan, blocks, tmp_path):
    make_checkpoint(tmp_path / "in", family=name)
    for to, command in (("tree", convert.prefuse), ("plain", convert.reformat)):
        report = command(tmp_path / "in", tmp_path / to, to="orbax", scan=bool(scan))
        assert f": {blocks} MoE blocks of 12 experts" in str(report)
    assert f": {blocks} MoE blocks of 12 experts" in str(convert.prefuse(tmp_path / "plain", tmp_path / "fused"))


def test_what_maxtext_has_saved_of_a_fused_tree_has_to_be_named(source, tmp_path, capsys):
    """A training run goes on from a prefused checkpoint, and what it saves says nothing of layouts."""
    convert.prefuse(source, tmp_path / "tree", to="orbax")
    metadata = tmp_path / "tree" / "0" / "items" / "_METADATA"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"custom_metadata": None}))
    names = [str(tmp_path / "tree"), str(tmp_path / "again")]
    assert main(["--split", "--to", "hf", *names, "--quiet"]) == 4
    assert "say so with --source-layout=concat" in capsys.readouterr().err
    assert main(["--split", "--to", "hf", *names, "--quiet", "--source-layout", "concat"]) == 0
    assert tree(source).items() <= tree(tmp_path / "again").items()
    (tmp_path / "tree" / "convert_manifest.json").unlink()  # MaxText does not keep it
    assert main(["--verify", str(source), names[0], "--no-gemm"]) == 4
    assert main(["--verify", str(source), names[0], "--no-gemm", "--source-layout", "concat"]) == 0
    convert.reformat(source, tmp_path / "plain", to="orbax")
    assert main(["--verify", str(tmp_path / "plain"), names[0], "--no-gemm"]) == 4
    assert main(["--verify", str(tmp_path / "plain"), names[0], "--source-layout", "concat"]) == 0


def test_maxtext_is_told_whether_layers_are_stacked(source, tmp_path):
    for scan in (True, False):
        convert.prefuse(source, tmp_path / str(scan), to="orbax", scan=scan)
        with ocp.CheckpointManager(tmp_path / str(scan), item_names=("items",)) as manager:
            assert manager.metadata(0).custom_metadata == {"scan_layers": scan}


def test_without_fusing_and_fused_later(source, tmp_path):
    convert.reformat(source, tmp_path / "tree", to="orbax")
    assert not any(
        path.endswith(".wi") for path in json.loads((tmp_path / "tree" / "convert_manifest.json").read_text())["tensors"]
    )
    convert.prefuse(tmp_path / "tree", tmp_path / "fused")
    convert.prefuse(source, tmp_path / "at-once", to="orbax")
    one, other = (restore(tmp_path / name) for name in ("fused", "at-once"))
    assert json.dumps(one, default=lambda a: a.tobytes().hex()) == json.dumps(other, default=lambda a: a.tobytes().hex())
    assert convert.verify(tmp_path / "fused", tmp_path / "at-once", gemm=False).equal
    assert convert.verify(tmp_path / "at-once").equal
    convert.reformat(tmp_path / "fused", tmp_path / "again", to="hf")
    again = tree(tmp_path / "again")
    assert again.pop("convert_manifest.json")
    assert again == tree(source)


def test_from_maxtext_into_any_layout(source, tmp_path):
    convert.prefuse(source, tmp_path / "tree", to="orbax")
    convert.prefuse(tmp_path / "tree", tmp_path / "vllm", to="hf", layout="vllm")
    assert convert.verify(source, tmp_path / "vllm", gemm=False).equal
    convert.split(tmp_path / "vllm", tmp_path / "again")
    assert convert.verify(source, tmp_path / "again", gemm=False).equal


def test_the_checkpoint_manager_of_maxtext_restores_it(source, tmp_path):
    convert.prefuse(source, tmp_path / "tree", to="orbax")
    with ocp.CheckpointManager(tmp_path / "tree", item_names=("items",)) as manager:
        assert manager.latest_step() == 0
        restored = manager.restore(0, args=ocp.args.Composite(items=ocp.args.PyTreeRestore()))
    assert "decoder" in restored["items"]["params"]["params"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--prefuse", "{in}", "{out}", "--to", "orbax", "--layout", "vllm"], 4, "no place for layout 'vllm'"),
        (["--to", "orbax", "{in}", "{out}", "--compute", "query-scale"], 2, "nothing of this model is computed"),
        (["--split", "{in}", "{out}", "--compute", "query-scale"], 2, "--compute is for conversions between formats"),
    ],
)
def test_what_maxtext_cannot_hold_is_refused(source, tmp_path, capsys, arguments, code, words):
    names = {"in": str(source), "out": str(tmp_path / "out")}
    assert main([argument.format(**names) for argument in arguments] + ["--quiet"]) == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_tree_without_config_is_refused_with_what_to_do(source, tmp_path, capsys):
    convert.reformat(source, tmp_path / "tree", to="orbax")
    (tmp_path / "tree" / "config.json").unlink()
    assert main(["--to", "hf", str(tmp_path / "tree"), str(tmp_path / "out"), "--quiet"]) == 3
    assert "put the model's config.json there" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(forks, source, tmp_path):
    code = (
        "import os, signal, sys, convert.orbax.write as w; from convert.cli import main\n"
        "w.OrbaxWriter._write_beside = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(main(sys.argv[1:]))"
    )
    command = ["--to", "orbax", str(source), str(tmp_path / "tree"), "--quiet"]
    assert forks.run(code, *command).returncode == -signal.SIGKILL
    assert not (tmp_path / "tree").exists()
    assert convert.reformat(source, tmp_path / "tree", to="orbax").resumed
    convert.reformat(tmp_path / "tree", tmp_path / "again", to="hf")
    assert tree(source).items() <= tree(tmp_path / "again").items()


def swapped(source: Path, out: Path, edit) -> Path:
    """The checkpoint with its tensors edited, by safetensors itself."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            save_file(edit(load_file(file)), out / file.name, {"format": "pt"})
        elif file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    return out


def test_the_two_formats_are_compared_tensor_by_tensor(source, tmp_path):
    for scan, fused in ((True, True), (False, False)):
        tree_path = tmp_path / f"tree-{scan}"
        (convert.prefuse if fused else convert.reformat)(source, tree_path, to="orbax", scan=scan)
        assert convert.verify(source, tree_path).equal
        assert convert.verify(tree_path, source).equal


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("model.layers.1.mlp.experts.3.gate_proj.weight", "exact"),
        ("model.layers.1.mlp.experts.11.down_proj.weight", "exact"),
        ("model.layers.1.input_layernorm.weight", "others"),
        ("model.layers.0.self_attn.o_proj.weight", "others"),
        ("model.embed_tokens.weight", "others"),
    ],
)
def test_one_flipped_bit_is_found_across_formats(source, tmp_path, name, level):
    def flip(tensors):
        if name in tensors:
            tensors[name] = tensors[name].copy()
            tensors[name].view("u2").reshape(-1)[-1] ^= 1
        return tensors

    convert.prefuse(source, tmp_path / "tree", to="orbax")
    verdict = convert.verify(swapped(source, tmp_path / "other", flip), tmp_path / "tree")
    assert [each.name for each in verdict.levels if each.differences] == ([level, "identity"] if level == "exact" else [level])
    assert any(name in line for each in verdict.levels for line in each.differences)


@pytest.fixture(scope="module")
def normal(tmp_path_factory) -> Path:
    """Experts whose numbers are those of a model, so that GEMMs of them say something."""
    return make_checkpoint(tmp_path_factory.mktemp("normal") / "in", family="deepseek_v3", values="normal", layers=4)


@pytest.mark.parametrize(("scan", "axis"), [(True, 1), (True, 0), (False, None)])
def test_grouped_gemms_are_compared_across_formats(normal, tmp_path, capsys, scan, axis):
    """Experts one by one on one side, `wi` with its scan axes on the other; the first layer has none and counts as 0."""
    convert.prefuse(normal, tmp_path / "tree", to="orbax", scan=scan, scan_axis=axis)
    verdict = convert.verify(tmp_path / "tree", normal)
    assert verdict.equal, verdict
    names = ["exact", "others", "identity", "gemm", "gradients", "layer", "files", "recorded"]
    assert [level.name for level in verdict.levels] == names
    wanted = {(True, 1): "e l k (g n)", (True, 0): "l e k (g n)"}.get((scan, axis), "e k (g n)")
    assert f"'e g k n' against '{wanted}'" in verdict.levels[3].covered
    assert list(verdict.levels[3].errors) == ["layer 1", "layer 2", "layer 3"]
    assert "the checkpoint's routers" in verdict.levels[5].covered
    narrow = convert.verify(normal, tmp_path / "tree", layers=[2], experts=[3])
    assert list(narrow.levels[3].errors) == ["layer 2"]
    assert main(["--verify", str(normal), str(tmp_path / "tree"), "--dry-run"]) == 0
    assert "3 MoE layers" in capsys.readouterr().out


def exchange(tensors):
    names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    found = {}
    for name, array in tensors.items():
        *place, word, weight = name.split(".")
        word = names.get(word, word) if "experts" in place else word
        found[".".join([*place, word, weight])] = array
    return found


def test_the_probes_find_an_exchange_by_themselves(normal, tmp_path):
    convert.prefuse(normal, tmp_path / "tree", to="orbax")
    other = swapped(normal, tmp_path / "other", exchange)
    (other / "model.safetensors.index.json").unlink()
    verdict = convert.verify(other, tmp_path / "tree")
    assert [level.name for level in verdict.levels if level.differences] == ["exact", "identity", "gemm", "layer"]


def test_gate_and_up_exchanged_are_found_across_formats(source, tmp_path):
    convert.prefuse(source, tmp_path / "tree", to="orbax")
    other = swapped(source, tmp_path / "other", exchange)
    (other / "model.safetensors.index.json").unlink()
    verdict = convert.verify(other, tmp_path / "tree")
    assert not verdict.equal
    assert len(verdict.levels[0].differences) >= 24
