"""What lies beside the model: which files are its own, which go along, and which never do."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from convert.cli import main
from convert.commit.files import Folder
from convert.errors import OutputError, StorageError
from layouts.checkpoint import open_checkpoint
from layouts.errors import InputError
from layouts.shards import model_files, unindexed
from layouts.side_files import sort_files
from scripts.make_checkpoint import make_checkpoint
from tests.layouts.test_hf import QWEN
from tests.tiny import checkpoint, config, load, same, tensors, tree

INDEX, MANIFEST = "model.safetensors.index.json", "convert_manifest.json"
STRAYS = ("consolidated.safetensors", "adapter_model.safetensors", "mmproj.safetensors", "vision.safetensors")
LEFT_OUT = (
    "pytorch_model-00001-of-00002.bin",
    "x.gguf",
    "original/params.json",
    "metal/model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "deep/model.safetensors",
    *("Model.SAFETENSORS", "x.GGUF", "PyTorch_Model.Bin", "Original/params.json"),
)
PLAIN = (".gitattributes", "tokenizer.model", "training_args.bin", "docs/original/a.md")
NEVER = (
    ".git/objects/ab/cd",
    ".cache/huggingface/x.lock",
    "a.incomplete",
    "deep/b.lock",
    "__pycache__/m.pyc",
    ".GIT/config",
    "b.LOCK",
)


def stray(path: Path, name: str) -> None:
    save_file({"model.layers.1.mlp.experts.0.other": np.ones(3, "f4")}, path / name)


def put(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"12345")


@pytest.fixture(params=["one file", "one file, indexed", "three files", "three files, not indexed", "a name of its own"])
def source(tmp_path, request):
    """A checkpoint, with the files of the model named, or not, in each of the ways there are."""
    found = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN), shards=3 if "three" in request.param else 1)
    if request.param == "one file, indexed":
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors(QWEN), "model.safetensors")}
        (found / INDEX).write_text(json.dumps(index))
    if "not indexed" in request.param:
        (found / INDEX).unlink()
    if request.param == "a name of its own":
        (found / "model.safetensors").rename(found / "weights.safetensors")
    return found


@pytest.fixture
def one(tmp_path):
    return checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN), shards=1)


@pytest.mark.parametrize("copy_all", [False, True])
def test_other_safetensors_beside_the_model_are_never_taken_for_it(source, tmp_path, copy_all):
    """Nor by the commands that read what was made; a split gives back each file of the model, and its index or none."""
    before = tree(source)
    strays = STRAYS[:3] if (source / "weights.safetensors").exists() else STRAYS
    for name in strays:
        stray(source, name)
    fused, back = tmp_path / "fused", tmp_path / "back"
    convert.prefuse(source, fused, copy_all=copy_all)
    assert all((fused / name).exists() == copy_all for name in strays)
    assert (fused / INDEX).exists() == copy_all
    assert convert.verify(source, fused, gemm=False).equal
    assert convert.verify(fused).equal
    convert.split(fused, back, copy_all=copy_all)
    assert convert.verify(source, back, gemm=False).equal
    assert {name: digest for name, digest in tree(back).items() if name not in (MANIFEST, *strays)} == before
    assert all((back / name).exists() == copy_all for name in strays)


def test_the_index_of_one_file_says_that_others_are_not_the_model(one, tmp_path):
    stray(one, "mmproj.safetensors")
    convert.prefuse(one, tmp_path / "out", copy_all=True)
    assert set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values()) == {"model.safetensors"}
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "else.safetensors")
    with pytest.raises(InputError, match=r"1 shards that it names are missing, the first is 'model.safetensors'"):
        open_checkpoint(tmp_path / "out")


def test_a_split_adds_an_index_where_a_file_put_there_since_would_be_the_model(one, tmp_path):
    (one / "model.safetensors").rename(one / "weights.safetensors")
    convert.prefuse(one, tmp_path / "fused")
    stray(tmp_path / "fused", "vision.safetensors")
    convert.split(tmp_path / "fused", tmp_path / "back", copy_all=True)
    assert (tmp_path / "back" / INDEX).exists()
    assert convert.verify(one, tmp_path / "back", gemm=False).equal


@pytest.mark.parametrize("copy_all", [False, True])
def test_an_adapter_beside_a_maxtext_tree_does_not_make_it_a_hugging_face_checkpoint(tmp_path, copy_all):
    one = make_checkpoint(tmp_path / "in", family="qwen3_moe")
    words = ("--quiet", *(["--copy-all"] if copy_all else []))
    stray(one, "mmproj.safetensors")
    assert main(["--prefuse", str(one), str(tmp_path / "tree"), "--to", "orbax", *words]) == 0
    assert (tmp_path / "tree" / "mmproj.safetensors").exists() == copy_all
    with closing(open_checkpoint(tmp_path / "tree")) as reader:
        assert reader.format == "orbax"
    assert main(["--verify", str(one), str(tmp_path / "tree"), "--no-gemm", "--quiet"]) == 0
    assert main(["--verify", str(tmp_path / "tree"), "--quiet"]) == 0
    assert main(["--split", str(tmp_path / "tree"), str(tmp_path / "back"), "--to", "hf", *words]) == 0
    before, after = tree(one), tree(tmp_path / "back")
    assert {n: d for n, d in before.items() if copy_all or n != "mmproj.safetensors"} == {
        n: d for n, d in after.items() if n != MANIFEST
    }


@pytest.mark.parametrize(
    ("names", "own"),
    [
        (["model.safetensors", "vision.safetensors"], ["model.safetensors"]),
        (["model-00001-of-00001.safetensors", "a-00001-of-00002.safetensors"], ["model-00001-of-00001.safetensors"]),
        (["b.safetensors", "a.safetensors", "mmproj-x.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["consolidated.safetensors"], ["consolidated.safetensors"]),
        ([], []),
    ],
)
def test_which_files_are_the_model_where_no_index_says_so(names, own):
    assert unindexed(names) == own


@pytest.mark.parametrize("other", ["model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"])
def test_two_sets_of_files_without_an_index_are_refused(tmp_path, other):
    put(tmp_path, "model.safetensors", other)
    with pytest.raises(InputError, match="are of two sets of files"):
        model_files(tmp_path, None)


def test_other_weights_are_listed_and_left_out(one, tmp_path, capsys):
    put(one, *LEFT_OUT, *NEVER, *PLAIN)
    assert main(["--prefuse", str(one), str(tmp_path / "out"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "left out, other weights and indexes (11 files, 55 B; --copy-all takes them):" in text
    for name in LEFT_OUT:
        assert f"  {name}  5 B" in text
    assert "never copied: .GIT/, .cache/, .git/, __pycache__/, a.incomplete, b.LOCK, deep/b.lock" in text
    report = convert.prefuse(one, tmp_path / "out")
    assert f"--copy-all takes them): {', '.join(sorted(LEFT_OUT))}" in str(report)
    convert.prefuse(one, tmp_path / "all", copy_all=True)
    for out, copied in (("out", PLAIN), ("all", PLAIN + LEFT_OUT)):
        for name in (*LEFT_OUT, *NEVER, *PLAIN):
            assert (tmp_path / out / name).exists() == (name in copied), name
        files = json.loads((tmp_path / out / MANIFEST).read_text())["files"]
        assert all("xxh3_128" in files[name] for name in copied)
        assert not {*LEFT_OUT, *NEVER} - {*copied} & files.keys()
    (tmp_path / "all" / "x.gguf").write_bytes(b"54321")
    assert not convert.verify(tmp_path / "all").equal


def test_a_disk_on_which_two_names_are_one_is_noticed(one, tmp_path, monkeypatch):
    put(one, "notes.md", "NOTES.md")
    copy = Folder.copy_in
    monkeypatch.setattr(Folder, "copy_in", lambda folder, source, name: copy(folder, source, name.lower()))
    with pytest.raises(StorageError, match=r"NOTES.md: it was copied, and is not there by this name"):
        convert.prefuse(one, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_copied_counts(one, tmp_path):
    put(one, "big.txt", "x.gguf")
    few, every = (convert.plan(one, tmp_path / "out", prefuse=True, copy_all=copy_all) for copy_all in (False, True))
    assert few.side_files["big.txt"] == 5
    assert every.side_bytes == few.side_bytes + 5
    assert few.left_out_files == {"x.gguf": 5}
    assert every.left_out_files == {}


@pytest.mark.parametrize("copy_all", [False, True])
def test_one_way_is_not_taken_for_the_other(one, tmp_path, copy_all):
    put(one, "x.gguf")
    convert.prefuse(one, tmp_path / "out", copy_all=copy_all)
    assert convert.prefuse(one, tmp_path / "out", copy_all=copy_all).proof
    with pytest.raises(OutputError, match=r"copy_all=True.*x\.gguf is (not )?there, and would be (copied|left out)"):
        convert.prefuse(one, tmp_path / "out", copy_all=not copy_all)


def test_a_staging_directory_is_taken_up_only_with_the_same_side_files(one, tmp_path):
    from convert.commit.identity import State, fingerprint

    put(one, "x.gguf")
    plans = [convert.plan(one, tmp_path / "out", prefuse=True, copy_all=copy_all) for copy_all in (False, True)]
    assert len({fingerprint(plan, {}, State("", "")) for plan in plans}) == 2


def test_what_is_in_a_folder_that_is_never_copied_is_nobodys_business(one, tmp_path):
    put(one, ".cache/x")
    (one / ".cache" / "lost").symlink_to("nowhere")
    (one / "x.lock").symlink_to("nowhere")
    report = convert.prefuse(one, tmp_path / "out")
    assert report.plan.never_copied == (".cache/", "x.lock")
    (one / ".cache" / "new").write_text("fetched since")
    assert convert.prefuse(one, tmp_path / "out").proof


def test_folders_of_weights_count_at_the_top_alone():
    found = sort_files(["original/a", "docs/original/a", "a/.git/b", ".git"], lambda _: 1)
    assert (list(found.weights), list(found.plain), found.never) == (["original/a"], ["docs/original/a"], (".git", "a/.git/"))


def test_files_of_any_name_are_the_model_where_none_is_called_so(one, tmp_path):
    (one / "model.safetensors").rename(one / "weights.safetensors")
    convert.prefuse(one, tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    assert same(load(tmp_path / "back"), tensors(QWEN))


@pytest.mark.parametrize("name", ["../x.txt", "a//b.txt", "/a.txt", "./a.txt", "a\n.txt", "\x1b[31m.txt"])
def test_a_name_that_no_output_may_have_is_refused_in_the_plan(name):
    """In a store there may be any; it was refused where it was copied, after all tensors had been written."""
    found = sort_files([name, "model.gguf", "../y.gguf"], lambda _: 1)
    with pytest.raises(InputError, match="not safe as the name of a file"):
        found.chosen(copy_all=False)
    weights = sort_files(["../y.gguf"], lambda _: 1)
    assert weights.chosen(copy_all=False) == ({}, {"../y.gguf": 1})  # named, and not copied
    with pytest.raises(InputError, match="not safe as the name of a file"):
        weights.chosen(copy_all=True)
