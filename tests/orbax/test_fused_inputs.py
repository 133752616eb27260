"""Hugging Face checkpoints whose experts are fused already, in any form, go to MaxText at once, and come back."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from layouts.disk.files import CONFIG, RECORD
from scripts.make_checkpoint import make_checkpoint
from tests.planning.test_cross import reader
from tests.tiny import MemoryReader, tree

MANIFEST = "convert_manifest.json"
FORMS = {
    "transformers": {},
    "vllm": {},
    "flashinfer": {},
    "interleaved": {},
    "glu32": {},
    "per-shard": {"shards": 4, "align": 24},
    "lane": {"shards": 2, "align": 128},
    "fused-moe": {},
    "gmm-ep": {},
}


CASES = [("qwen3_moe", form) for form in FORMS]
CASES += [("gpt_oss", form) for form in ("vllm", "gmm-ep")]  # with biases, which are padded, too
CASES += [("deepseek_v3", "fused-moe")]


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    roots = {family: tmp_path_factory.mktemp(family) for family, _ in CASES}
    for family, root in roots.items():
        if family == "gpt_oss":
            _write(reader(family), root / "in")
        else:
            make_checkpoint(root / "in", family=family, shard=100_000, mlp=64, experts=4, layers=2)
        convert.reformat(root / "in", root / "apart", to="orbax")
        convert.prefuse(root / "in", root / "concat", to="orbax")
    return roots


@pytest.fixture
def root(roots) -> Path:
    return roots["qwen3_moe"]


def _write(model: MemoryReader, out: Path) -> None:
    out.mkdir()
    save_file({name: array.view("f4") for name, array in model.arrays.items()}, out / "model.safetensors", {"format": "pt"})
    (out / CONFIG).write_text(json.dumps(model.config))


def arrays(path: Path) -> dict[str, str]:
    entries = json.loads((path / MANIFEST).read_text())["tensors"]
    assert entries
    return {name: entry if isinstance(entry, str) else json.dumps(entry) for name, entry in entries.items()}


def tensors(path: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def files(path: Path) -> dict[str, str]:
    return {name: digest for name, digest in tree(path).items() if name != MANIFEST}


def unmarked(fused: Path, out: Path) -> Path:
    """The same, as if transformers 5 had saved it: without what we say of it."""
    shutil.copytree(fused, out)
    (out / MANIFEST).unlink()
    config = json.loads((out / CONFIG).read_text())
    del config[RECORD]
    (out / CONFIG).write_text(json.dumps(config))
    for file in out.glob("*.safetensors"):
        save_file(load_file(file), file, {"format": "pt"})
    return out


@pytest.mark.parametrize(("family", "form"), CASES)
def test_a_fused_checkpoint_goes_to_maxtext_at_once(roots, tmp_path, family, form):
    root = roots[family]
    convert.prefuse(root / "in", tmp_path / "hf", layout=form, **FORMS[form])
    convert.reformat(tmp_path / "hf", tmp_path / "apart", to="orbax")
    assert arrays(tmp_path / "apart") == arrays(root / "apart")
    convert.prefuse(tmp_path / "hf", tmp_path / "concat", to="orbax")
    assert arrays(tmp_path / "concat") == arrays(root / "concat")
    assert convert.verify(tmp_path / "hf", tmp_path / "concat", gemm=False).equal
    convert.split(tmp_path / "concat", tmp_path / "again", to="hf")
    assert tensors(tmp_path / "again") == tensors(root / "in"), "as before anybody fused them"


def test_so_does_one_that_transformers_5_has_saved(root, tmp_path):
    convert.prefuse(root / "in", tmp_path / "ours", layout="transformers")
    unmarked(tmp_path / "ours", tmp_path / "hf")
    convert.prefuse(tmp_path / "hf", tmp_path / "concat", to="orbax")
    assert arrays(tmp_path / "concat") == arrays(root / "concat")
    assert convert.verify(tmp_path / "hf", tmp_path / "concat", gemm=False).equal
    assert convert.verify(root / "in", tmp_path / "concat", gemm=False).equal
    convert.split(tmp_path / "concat", tmp_path / "again", to="hf")
    assert files(tmp_path / "again") == files(tmp_path / "hf"), "byte for byte, in the form that it came in"


@pytest.mark.parametrize(("shards", "columns"), [(1, 256), (2, 512), (4, 1024)])
def test_one_command_makes_what_vllm_in_maxtext_wants(root, tmp_path, shards, columns):
    """Each shard with the next multiple of 256 columns; N is 64 here."""
    words = ["--to", "orbax", "--layout", "per-shard", "--shards", str(shards), "--align", "maxtext", "--quiet"]
    assert main(["--prefuse", str(root / "in"), str(tmp_path / "tree"), *words]) == 0
    said = {"to": "orbax", "layout": "per-shard", "shards": shards, "align": "maxtext"}
    plan = convert.plan(root / "in", tmp_path / "other", prefuse=True, **said)
    wi = [made for made in plan.targets if made.spec.name.endswith(".wi")]
    assert wi
    assert all(made.spec.shape[-1] == 2 * columns for made in wi)
    verdict = convert.verify(root / "in", tmp_path / "tree", gemm=False)
    assert verdict.equal, verdict
    convert.split(tmp_path / "tree", tmp_path / "again", to="hf")
    assert files(tmp_path / "again") == files(root / "in")
