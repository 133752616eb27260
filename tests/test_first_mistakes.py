"""What a new user does wrong first gets an answer of its own: what it is, where, what to do. Exact texts."""

import errno
import json
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from convert.cli import main
from convert.errors import printable
from scripts.make_checkpoint import make_checkpoint

OUT = "out"
FOLDERS = {
    ("m.gguf",): "no safetensors and no Orbax checkpoint, but m.gguf: GGUF files, for llama.cpp: take the safetensors of the "
    "same model",
    ("config.json", "pytorch_model-00001-of-00002.bin"): "no safetensors and no Orbax checkpoint, but "
    "pytorch_model-00001-of-00002.bin: PyTorch pickles, which run code when they are read: save the model as safetensors with "
    "transformers' save_pretrained",
    (
        "consolidated.00.pth",
    ): "no safetensors and no Orbax checkpoint, but consolidated.00.pth: PyTorch pickles, which run code "
    "when they are read: save the model as safetensors with transformers' save_pretrained",
    (".metadata", "__0_0.distcp"): "no safetensors and no Orbax checkpoint, but __0_0.distcp: a torch.distributed.checkpoint: "
    "save the model as safetensors, or convert it with torch.distributed.checkpoint.format_utils first",
    ("flax_model.msgpack",): "no safetensors and no Orbax checkpoint, but flax_model.msgpack: Flax or TensorFlow weights: take "
    "the safetensors of the same model",
    ("weights.npz",): "no safetensors and no Orbax checkpoint, but weights.npz: NumPy archives, as MLX once wrote them: take "
    "the safetensors of the same model",
    ("model.onnx",): "no safetensors and no Orbax checkpoint, but model.onnx: an ONNX graph: take the safetensors that it was "
    "exported from",
    ("model.zip",): "no safetensors and no Orbax checkpoint, but model.zip: an archive: unpack it, and give the directory",
    ("x.tar.gz",): "no safetensors and no Orbax checkpoint, but x.tar.gz: an archive: unpack it, and give the directory",
    (
        "a.safetensors.part",
    ): "no safetensors and no Orbax checkpoint, but a.safetensors.part: a download that has not finished: run it again",
    (".cache/huggingface/download/x.incomplete", "config.json"): "no safetensors and no Orbax checkpoint, but x.incomplete: a "
    "download that has not finished: run it again",
    (
        "MODEL.SAFETENSORS",
    ): "MODEL.SAFETENSORS would be read under a name that ends in .safetensors, in small letters; rename it",
    ("a/model.safetensors",): "the checkpoint is not here, but below; give {0}/a",
    ("a/model.safetensors", "b/model.safetensors"): "the checkpoint is not here, but below; give one of {0}/a, {0}/b",
    ("models--o--x/snapshots/1/x", "models--o--y/snapshots/1/x"): "a cache of several models; give one of {0}/models--o--x, "
    "{0}/models--o--y",
    ("snapshots/1/x", "snapshots/2/x"): "2 snapshots are here; give one of them: {0}/snapshots/1, {0}/snapshots/2",
    ("config.json",): "neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here: it has a config.json and no "
    "weights; download them, too",
    ("model-Q4_K_M.gguf", "a/b/model.safetensors"): "the checkpoint is not here, but below; give {0}/a/b",
    ("run/checkpoints/1000/items/_METADATA",): "the checkpoint is not here, but below; give {0}/run/checkpoints/1000/items",
    tuple(f"{n}/model.safetensors" for n in "abcdefghi"): "the checkpoint is not here, but below; give one of {0}/a, {0}/b, "
    "{0}/c, {0}/d, {0}/e, {0}/f, {0}/g, {0}/h, ... (9)",
    ("a/b/c/d/e/model.safetensors",): "neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here",
    (".git/x/model.safetensors",): "neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here",
    **{
        (*others, name): f"no safetensors and no Orbax checkpoint, but {name}: {words}"
        for words, files in {
            "a checkpoint of DeepSpeed: join its parts with its zero_to_fp32.py, and save the model as safetensors": (
                ("global_step10",),
                ("latest", "zero_to_fp32.py"),
                ("mp_rank_00_model_states.pt",),
            ),
            "a checkpoint of Megatron-LM: export it to Hugging Face's safetensors first": (
                ("iter_0000100", "latest_checkpointed_iteration.txt"),
                ("mp_rank_00",),
                ("model_optim_rng.pt",),
            ),
            "an archive of NeMo: export it to Hugging Face's safetensors first": (("model.nemo",),),
            "an engine of TensorRT: take the safetensors that it was built from": (("config.json", "rank0.engine"),),
            "PyTorch pickles, which run code when they are read: save the model as safetensors with transformers' "
            "save_pretrained": (("model.pkl",), ("last.ckpt",)),
            "Flax or TensorFlow weights: take the safetensors of the same model": (("saved_model.pb",), ("m.ckpt.index",)),
            "an archive: unpack it, and give the directory": (("model.safetensors.xz",), ("model.safetensors.gz",)),
        }.items()
        for *others, name in files
    },
    ("manifests/x", "blobs/sha256-1"): "no safetensors and no Orbax checkpoint, but sha256-1: a store of Ollama, which keeps "
    "GGUF: take the safetensors of the same model",
    **{
        (name,): f"neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here: it has a {name} and no weights; "
        "download them, too"
        for name in ("tokenizer.json", "tokenizer_config.json")
    },
    ("README.md",): "neither *.safetensors files nor an Orbax checkpoint (_METADATA) found here",
}
"""Files that are there -> what is said of their directory."""


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What a command prints, of which only the last line is looked at, and its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))

    def run(*words: str) -> tuple[int, str]:
        try:
            code = main(words)
        except SystemExit as stopped:
            code = stopped.code
        return code, capsys.readouterr().err.strip().rpartition("\n")[2].rpartition("\r")[2]

    return run


@pytest.mark.parametrize("files", FOLDERS, ids=lambda files: files[-1])
def test_a_directory_without_a_checkpoint_says_what_it_is(said, tmp_path, files):
    for name in files:
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_bytes(b"{}")
    for words in (("--prefuse", "given", OUT), ("--verify", "given", "given"), ("--digest", "given")):
        assert said(*words, "--quiet") == (3, f"convert: given: {FOLDERS[files].format('given')}")


def test_what_is_no_directory(said, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    absent = "no such directory; give the directory that holds the checkpoint"
    assert said("--prefuse", "nowhere", OUT) == (3, f"convert: nowhere: {absent}")
    assert said("--prefuse", "./a/b", OUT) == (
        3,
        "convert: a/b: no such directory. If it is a model of the Hugging Face hub, download it first: "
        "hf download a/b --local-dir b",
    )
    assert said("--prefuse", "/a/b", OUT) == (3, f"convert: /a/b: {absent}")
    assert said("--prefuse", "a/b/c", OUT) == (3, f"convert: a/b/c: {absent}")
    (tmp_path / "gone").symlink_to("elsewhere")
    assert said("--prefuse", "gone", OUT) == (
        3,
        "convert: gone: a link to elsewhere, which is not there; give the directory that holds the checkpoint",
    )
    code, text = said("--prefuse", "model.safetensors", OUT)
    assert (code, text) == (
        3,
        "convert: model.safetensors: this is a file; give the directory that holds the checkpoint: .",
    )


GONE = "nothing is fetched from there; download it, and give the directory"
REMOTE = "this is on another machine; mount it, or copy it here"
GGUF = "no such directory; this is a model of Ollama or llama.cpp (GGUF); take its safetensors"
YOURS = "no such directory; this stands for a path of yours; put that in its place"
ADDRESSES = {
    "https://huggingface.co/a/b/blob/main/model-00001-of-00016.safetensors": "download it first: hf download a/b --local-dir b",
    "https://huggingface.co/a/b/tree/v2": "download it first: hf download a/b --revision v2 --local-dir b",
    **dict.fromkeys(("a/b/tree/main", "git@hf.co:a/b"), "no such directory; download it first: hf download a/b --local-dir b"),
    **dict.fromkeys(
        ("https://huggingface.co/datasets/a/b", "hf://spaces/a/b", "https://modelscope.cn/models/a/b", "ftp://x/y"), GONE
    ),
    **dict.fromkeys(("ssh://host/x", "scp://host/x", "sftp://host/x"), REMOTE),
    **dict.fromkeys(("host:/x", "me@host:x", "git@github.com:a/b.git", "dbfs:/x"), f"no such directory; {REMOTE}"),
    **dict.fromkeys(("qwen3:30b", "qwen3:latest", "a/b:Q4_K_M", "a/b-GGUF:F16"), GGUF),
    **dict.fromkeys(("/path/to/checkpoint", "path/to/x", "<ckpt>"), YOURS),
    "wandb://a/b": "the stores that are known are gs:// and s3://; copy it there, or to a disk",
    "-": "no such directory; a checkpoint is a directory; - is none",
    "models\\x": "no such directory; \\ separates no folders here; write /",
    "\u201cckpt\u201d": "no such directory; its quotes belong to the name; leave them out",
    "a/\xabckpt\xbb": "no such directory; its quotes belong to the name; leave them out",
    "https://huggingface.co/Qwen/Qwen3-30B-A3B/tree/main": "download it first: hf download Qwen/Qwen3-30B-A3B --local-dir "
    "Qwen3-30B-A3B",
    "hf://a/b": "download it first: hf download a/b --local-dir b",
    "https://huggingface.co/a": "nothing is fetched from there; download it, and give the directory",
    "https://example.org/a/b": "nothing is fetched from there; download it, and give the directory",
    **dict.fromkeys(
        ("http://www.huggingface.co/a/b/tree/main", "hf://a/b/x"),
        "download it first: hf download a/b --local-dir b",
    ),
    "file:///tmp/x": "give the path alone, without file://",
    "S3://bucket/a": "an address begins with s3://",
    "gcs://bucket/a": "Google's store is gs://BUCKET/PATH",
    "s3a://bucket/a": "Amazon's store is s3://BUCKET/PATH",
    "r2://bucket/a": "a store that speaks S3 is s3://BUCKET/PATH, and its address is AWS_ENDPOINT_URL",
    "az://bucket/a": "the stores that are known are gs:// and s3://; copy it there, or to a disk",
    "gs://": "it names no bucket; give gs://BUCKET/PATH",
    "s3:///a": "it names no bucket; give s3://BUCKET/PATH",
    "huggingface.co/a/b": "no such directory; download it first: hf download a/b --local-dir b",
    "hf://a/b@v2/x": "download it first: hf download a/b --revision v2 --local-dir b",
    "a/b@v2": "no such directory; download it first: hf download a/b --revision v2 --local-dir b",
    "GS:/bucket/a": "no such directory; an address begins with gs://",
    "C:\\models\\x": "no such directory; this is a path of Windows; in WSL, C:\\ is /mnt/c/",
    "\\\\host\\x": "no such directory; this is a path of Windows; in WSL, C:\\ is /mnt/c/",
    "me@host:/x": "no such directory; this is on another machine; mount it, or copy it here",
    "$CKPT/x": "no such directory; $ stands for a variable only without single quotes",
    "ckpt*": "no such directory; nothing has a name of this pattern",
    "'x'": "no such directory; its quotes belong to the name; leave them out",
    "x ": "no such directory; its name begins or ends with a space",
    "a/model.safetensors": "no such directory; give the directory that holds the checkpoint",
    "gs:/bucket/a": "no such directory; an address begins with gs://",
    "~/ckpt": "no such directory; ~ stands for your home only without quotes",
}
"""What is no path here -> what is said of it."""


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_is_no_path(said, address):
    assert said("--prefuse", address, OUT) == (3, f"convert: {address}: {ADDRESSES[address]}")


OUTPUTS = {
    "~/out": "~ stands for your home only without quotes",
    "$HOME/out": "$ stands for a variable only without single quotes",
    "out*": "nothing has a name of this pattern",
    "out ": "its name begins or ends with a space",
    "here/'out'": "its quotes belong to the name; leave them out",
    "gs:/bucket/out": "an address begins with gs://",
    "-": "a checkpoint is a directory; - is none",
    "/path/to/out": "this stands for a path of yours; put that in its place",
    "<out>": "this stands for a path of yours; put that in its place",
    "\u201cout\u201d": "its quotes belong to the name; leave them out",
    "a\\out": "\\ separates no folders here; write /",
    "me@host:out": "this is on another machine; mount it, or copy it here",
    "x\udcff": "its name holds bytes that are no characters",
    "n" * 240: "File name too long, or that of " + "n" * 240 + ".partial-... beside it",
    "/".join(["n" * 200] * 30): "File name too long, or that of " + "n" * 200 + ".partial-... beside it",
    "C:\\out": "this is a path of Windows; in WSL, C:\\ is /mnt/c/",
    "me@host:/out": "this is on another machine; mount it, or copy it here",
}
"""What nobody means to call an output -> what is said of it."""


@pytest.mark.parametrize("action", ["--prefuse", "--split"])
@pytest.mark.parametrize("out", OUTPUTS, ids=lambda out: ascii(out[:20]))
def test_an_output_is_not_made_where_nobody_means_it(said, tmp_path, out, action):
    for words in ((), ("--dry-run",)):
        shown = printable(out)
        assert said(action, "in", out, *words) == (2, f"convert: {shown}: {OUTPUTS[out]}; choose another output")
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_name_is_no_text_may_hold_safetensors_and_no_tree(said, tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    (folder := tmp_path / "x\udcff").mkdir()
    assert said("--prefuse", "in", f"{folder}/out", "--quiet")[0] == 0
    why = "it holds bytes that are no characters, and TensorStore opens no such path; rename it"
    for words in ((), ("--dry-run",)):
        assert said("--to", "orbax", "in", f"{folder}/tree", *words) == (2, f"convert: {printable(str(folder))}/tree: {why}")
    assert said("--to", "orbax", "in", "tree", "--quiet")[0] == 0
    (tmp_path / "tree").rename(folder / "tree")
    assert said("--inspect", f"{folder}/tree") == (3, f"convert: {printable(str(folder))}/tree/0/items: {why}")
    assert sorted(each.name for each in folder.iterdir()) == ["out", "tree"]


@pytest.mark.parametrize("name", ["out.gguf", "out.safetensors", "out.bin", "out.Json"])
def test_an_output_is_not_called_like_a_file(said, name):
    why = f"the output is a directory, and this is the name of a file; leave out .{name.partition('.')[2]}"
    assert said("--prefuse", "in", f"a/{name}") == (2, f"convert: a/{name}: {why}")


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_what_stands_in_the_place_of_the_output(said, tmp_path, words):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    for folder in ("empty", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    (tmp_path / "file").write_text("dear")
    (tmp_path / "link").symlink_to("nowhere")
    kinds = {"file": "no directory", "full": "no checkpoint", "link": "a link"}
    for name, what in kinds.items():
        for more in ((), ("--overwrite",)):
            assert said("--prefuse", "in", name, *words, *more) == (
                5,
                f"convert: {name} is {what}, and --overwrite replaces only a checkpoint; remove it yourself, or choose "
                "another output",
            )
    assert said("--prefuse", "in", "empty", *words) == (
        5,
        "convert: empty exists already; remove it, choose another output, or pass --overwrite",
    )
    assert said("--prefuse", "in", "in/out", *words)[0] == said("--prefuse", "in", ".", *words)[0] == 5
    assert (tmp_path / "full" / "letter").read_text() == "dear"


@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--dry-run",)])
def test_the_wrong_order_removes_nothing(said, tmp_path, words):
    make_checkpoint(tmp_path / "ckpt", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    before = sorted(tmp_path.rglob("*"))
    there = (
        "no such directory; give the directory that holds the checkpoint. But ckpt is there: the input comes first, then the "
    )
    assert said("--prefuse", "new", "ckpt", *words) == (3, f"convert: new: {there}output")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_what_is_replaced_lies_where_something_may_be_made(said, tmp_path, monkeypatch, words):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    make_checkpoint(tmp_path / "old", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    assert said("--prefuse", "in", "old", "--overwrite", *words) == (
        6,
        f"convert: old: nothing may be made in {tmp_path}; ask its owner for the right, or choose another output",
    )


def test_an_output_that_is_no_store_says_so(said):
    assert said("--prefuse", "in", "hf://me/out") == (2, "convert: hf://me/out: write it to a disk, then: hf upload")
    assert said("--prefuse", "in", "file:///out") == (2, "convert: file:///out: give the path alone, without file://")


def test_what_is_there_is_taken_by_its_name(said, tmp_path):
    make_checkpoint(tmp_path / "my $x" / "ckpt ", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    assert said("--prefuse", "my $x/ckpt ", "my $x/out", "--quiet")[0] == 0
    assert said("--prefuse", "my $x/ckpts", "out") == (
        3,
        "convert: my $x/ckpts: no such directory; give the directory that holds the checkpoint (did you mean my $x/ckpt ?)",
    )


HEADS = {
    b"PK\3\4": "It is a PyTorch pickle: save the model as safetensors",
    b"GGUF": "It is a GGUF file, for llama.cpp: take the safetensors of the same model",
    b"\x1f\x8b": "It is compressed: unpack it",
    bytes(99): "It begins with zeros, as what a download has not filled: download or copy it again",
    b"": "It is empty. Download or copy it again",
    b"<html>\n404": "It is text, such as the answer of a server ('<html> 404'): download it again",
    b'{"error": 1}': "It is text, such as the answer of a server ('{\"error\": 1}'): download it again",
    b"version https://git-lfs.github.com": "It is a git-lfs pointer: run 'git lfs pull' where it came from",
}
"""How a file begins that is called *.safetensors -> what is said of it."""


@pytest.mark.parametrize("head", HEADS)
def test_a_file_that_is_none_says_what_it_is(said, tmp_path, head):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").write_bytes(head)
    code, text = said("--inspect", "in")
    assert code == 3
    assert text.startswith("convert: in/model.safetensors: not a sound safetensors file: ")
    assert text.endswith(f". {HEADS[head]}")


def test_a_link_to_nothing_is_not_to_be_removed(said, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors").symlink_to("../../blobs/1")
    assert said("--prefuse", "in", OUT) == (
        3,
        "convert: in/model.safetensors: a link to ../../blobs/1, which is not there; copy what it leads to, too (cp -rL)",
    )
    (tmp_path / "loop").symlink_to("loop")
    code, text = said("--prefuse", "loop", OUT)
    assert (code, text.startswith("convert: loop: cannot be followed: ")) == (3, True)


QUANTISED = {
    "absmax": "its codes depend on the order in which weights lie; take the checkpoint it was made from, or dequantise it",
    "quant_state.bitsandbytes__nf4": "its codes",
    "SCB": "its codes",
}
"""A tensor that bitsandbytes has left beside those of experts -> what is said of it."""


@pytest.mark.parametrize("word", QUANTISED)
def test_a_quantised_model_says_by_what(said, tmp_path, word):
    (tmp_path / "in").mkdir()
    name = f"model.layers.0.mlp.experts.0.down_proj.weight.{word}"
    save_file({name: np.ones((2, 4), np.float32)}, tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text('{"model_type": "qwen3_moe"}')
    code, text = said("--prefuse", "in", OUT, "--quiet")
    assert code == 4
    assert (
        f"{name} (in model.safetensors) belongs to bitsandbytes, which no layout of plain weights can hold: {QUANTISED[word]}"
        in text
    )


@pytest.mark.parametrize("indexed", [True, False])
def test_an_unfinished_download_is_counted(said, tmp_path, indexed):
    (tmp_path / "in").mkdir()
    names = [f"model-{number:05}-of-00016.safetensors" for number in range(1, 17)]
    for number, name in enumerate(names):
        if number in (0, 1, 3, 15):
            save_file({f"x.{number}": np.ones(2, np.float32)}, tmp_path / "in" / name)
    if indexed:
        weight_map = {f"x.{number}": name for number, name in enumerate(names)}
        (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for words in (("--prefuse", "in", OUT), ("--inspect", "in"), ("--digest", "in")):
        code, text = said(*words)
        assert code == 3
        assert text.startswith("convert: in")
        assert "12 of 16 shards" in text
        assert "model-00003-of-00016.safetensors" in text


def test_a_dense_model_has_nothing_to_fuse(said, tmp_path):
    (tmp_path / "dense").mkdir()
    names = ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    save_file({name: np.ones((4, 4), np.float32) for name in names}, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "qwen3"}')
    assert said("--prefuse", "dense", OUT, "--quiet") == (
        4,
        "convert: dense: model_type 'qwen3' in config.json is no known MoE family, and none of its 3 tensors is called an "
        "expert's: a dense model has nothing to fuse. If these are experts, say with --family how they are stored",
    )


@pytest.mark.parametrize("given", ["own/model-x", "cache/models--own--model-x", "cache"])
@pytest.mark.parametrize("main_is", [None, "2", "nothing", "../../../elsewhere"])
def test_a_model_in_the_cache_of_the_hub_is_taken(said, tmp_path, given, main_is):
    model = tmp_path / "cache" / "models--own--model-x"
    make_checkpoint(model / "snapshots" / "2", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    if main_is is not None:
        (model / "snapshots" / "1").mkdir()
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text(main_is)
    code, text = said("--prefuse", given, OUT, "--quiet")
    if main_is in (None, "2"):
        assert code == 0
        assert convert.verify(model / "snapshots" / "2", tmp_path / OUT, gemm=False).equal
        assert said("--prefuse", given, str(model / "snapshots" / "2" / "inside"))[0] == 5
    else:
        assert code == 3
        assert "snapshots are here; give one of them" in text or "elsewhere" in text
        assert not Path(OUT).exists()


COMMANDS = {
    ("prefuse", "a", "b"): "did you mean: convert --prefuse a b",
    ("verify", "a", "b c"): "did you mean: convert --verify a 'b c'",
    (
        "a",
        "b",
    ): "say what to do: --prefuse, --split, --merge, --verify, --digest, --inspect, --families, or --to the other format",
    ("a.png", "b.JPG"): "this converts MoE checkpoints; for pictures, call ImageMagick's convert by its full path, or magick",
    (
        "a",
        "-resize",
        "50%",
        "b",
    ): "this converts MoE checkpoints; for pictures, call ImageMagick's convert by its full path, or "
    "magick; convert --help shows all options",
    ("--prefus", "a", "b"): "unrecognized arguments: --prefus (did you mean --prefuse?); convert --help shows all options",
    ("--prefuse", "a", "b", "--layuot=x"): "unrecognized arguments: --layuot=x (did you mean --layout?); convert --help shows "
    "all options",
    ("--prefuse", "a", "b", "--qqq"): "unrecognized arguments: --qqq; convert --help shows all options",
    ("--prefuse", "--split", "a", "b"): "argument --split: not allowed with argument --prefuse; convert --help shows all "
    "options",
    ("--prefuse", "a", "b", "--layout", "conact"): "no layout is called 'conact' (did you mean concat?); known: concat, "
    "transformers, vllm, cutlass, flashinfer, cutedsl, interleaved-rows, interleaved, glu32, glu64, glu, per-shard, lane, "
    "gmm-ep, fused-moe",
    ("help",): "did you mean: convert --help",
    ("--prefuse", "a b"): "give an input and an output checkpoint; found 1 path: 'a b'",
    ("--prefuse", "a", "my", "model"): "give an input and an output checkpoint; found 3 paths: a my model",
    ("--prefuse",): "give an input and an output checkpoint; found 0 paths",
    ("--prefuse", "", "b"): "a path is empty; if it is a variable of your shell, it is not set",
    ("--inspect", ""): "a path is empty; if it is a variable of your shell, it is not set",
    (
        "--prefuse=a",
        "b",
    ): "argument --prefuse: it takes no value; put a space in the place of = before 'a', or leave it out; convert "
    "--help shows all options",
    ("convert", "prefuse", "a", "b"): "did you mean: convert --prefuse a b",
    (
        "convert",
        "--prefuse",
        "a",
        "b",
    ): "give an input and an output checkpoint; found 3 paths: convert a b; leave out the second word 'convert'",
    (
        "--prefuse",
        "a",
        "b",
        "--memory",
        "8",
        "GB",
    ): "give an input and an output checkpoint; found 3 paths: a b GB; a size is one word: write 'GB' "
    "without a space before it",
    ("--prefuse", "a", "b", "--layout", "vllm", "--layout", "concat"): "argument --layout: it is given twice, and says two "
    "things; give it once; convert --help shows all options",
    (
        "--to",
        "orbax",
        "a",
        "b",
        "--scan",
        "--no-scan",
    ): "argument --no-scan: it is given twice, and says two things; give it once; convert --help shows all options",
    ("--prefuse", "a", "b", "--layout"): "argument --layout: it takes a value: --layout NAME; convert --help shows all options",
    ("--to", "gguf", "a", "b"): "argument --to: 'gguf' is none of hf, orbax; convert --help shows all options",
    ("--prefuse", "a", "b", "--progress", "jsn"): "argument --progress: 'jsn' is none of auto, bar, plain, json, none (did "
    "you mean json?); convert --help shows all options",
    ("--prefuse", "a", "b", "--layout", "per-shard:4"): "no layout is called 'per-shard:4' (did you mean --layout=per-shard "
    "--shards=4?); known: concat, transformers, vllm, cutlass, flashinfer, cutedsl, interleaved-rows, interleaved, "
    "glu32, glu64, "
    "glu, per-shard, lane, gmm-ep, fused-moe",
    ("--help", "nonsense"): "argument --help: no action is called 'nonsense'; convert --help shows all options",
    ("--help", "prefuze"): "argument --help: no action is called 'prefuze' (did you mean --prefuse?); convert --help shows all "
    "options",
    (
        "--families",
        "ernie",
    ): "no family is called 'ernie' (did you mean one of ernie4_5_moe, ernie4_5_moe_vl, ernie4_5_vl_moe, "
    "ernie4_5_vl_moe_text?); convert --families lists the words of config.json's model_type",
    ("--families", "a", "b"): "--families takes the name of one family, or none; found a b",
    ("--layouts", "a"): "--layouts takes no path; found 1 path: a",
    ("--verify", "a", "b", "--report", ""): "--report: '' is no name of a page; end it in .html (--json is for programs)",
    (
        "--verify",
        "a",
        "b",
        "--report",
        "a/model.safetensors",
    ): "--report: 'a/model.safetensors' is no name of a page; end it in .html (--json is for programs)",
    ("--prefuse", "a", "b", "--coordinator", "host0"): "--coordinator: 'host0' is no HOST:PORT, such as host0:1234",
    **{
        tuple(words.split()): f"did you mean: convert {meant}"
        for words, meant in {
            "fuse a b": "--prefuse a b",
            "Pre-fuse a b": "--prefuse a b",
            "unfuse a b": "--split a b",
            "compare a fused": "--verify a fused",
            "info a": "--inspect a",
            "list": "--families",
            "a b prefuse": "--prefuse a b",
            "help verify": "--help verify",
            "to orbax a b": "--to orbax a b",
            "\u2013-prefuse a b": "--prefuse a b",
            "/?": "--help",
        }.items()
    },
    ("prefuse a b",): "did you mean: convert --prefuse a b",
    ("--prefuse a b",): "did you mean: convert --prefuse a b",
    **{
        ("--prefuse", "a", *words.split()): f"give an input and an output checkpoint; found {words.count(' ') + 2} paths: "
        f"{shlex.join(['a', *words.split()])}; {why}"
        for words, why in {
            "b \u2013layout x": "'\u2013layout' begins with a dash that a page has made; type --",
            "b \u2014dry-run": "'\u2014dry-run' begins with a dash that a page has made; type --",
            "b \u201c--dry-run\u201d": "'\u201c--dry-run\u201d' begins with a quote that a page has made; type it anew",
            "b scan_layers=False": "'scan_layers=False' is no option; they begin with --, such as --layout concat",
            "b model_name=x": "'model_name=x' is no option; they begin with --, such as --layout concat",
            "b yes": "a switch takes no value; leave out 'yes'",
            "b True": "a switch takes no value; leave out 'True'",
            "to b": "leave out 'to'",
            "into b": "leave out 'into'",
        }.items()
    },
    ("--inspect", "a", "and", "b"): "--inspect takes one checkpoint; found 3 paths: a and b; leave out 'and'",
    (
        "--prefuse",
        "a",
        "b",
        "--resume=true",
    ): "argument --resume, --no-resume: it takes no value; put a space in the place of = "
    "before 'true', or leave it out; convert --help shows all options",
    ("--prefuse", "a", "b", "--layout", "gate_up_proj"): "no layout is called 'gate_up_proj' (did you mean transformers?); "
    "known: concat, transformers, vllm, cutlass, flashinfer, cutedsl, interleaved-rows, interleaved, glu32, glu64, glu, "
    "per-shard, lane, gmm-ep, fused-moe",
    **{
        ("--prefuse", "a", "b", word): f"unrecognized arguments: {word} ({said}); convert --help shows all options"
        for said, words in {
            "the output is the second path": "--outfile --output_dir --save-path --maxtext-model-path --local-dir",
            "the input is the first path": "--ckpt_path --model_name_or_path --base-model-path --load-dir --checkpoint",
            "the input is never modified; give a second path": "--in-place --inplace --delete-original",
            "types stay as they are; --dequantize computes bfloat16 of quantised weights": "--outtype=f16 --torch_dtype=x "
            "--bf16 --fp8 --quantization=x --load-in-4bit",
            "did you mean --shards?": "--tensor_parallel=4 --tensor-model-parallel-size=4 --target-tensor-parallel-size=4",
            "who loads experts divides them; leave it out (--mesh expert=4 cuts the chunks of an Orbax output so)": "--ep=4 "
            "--ep-size=4 --expert-model-parallel-size=4",
            "did you mean --max-shard-size?": "--split-max-size=5G --out-shard-size=5B --shard-size=1",
            "did you mean --family?": "--model_size=x --model-size=x --model-type=x",
            "did you mean --scan?": "--scan_layers=true",
            "did you mean --to?": "--saver=mcore",
            "did you mean --dry-run?": "--plan --simulate --test --what-if --check-only -n",
            "did you mean --quiet?": "--silent -s",
            "did you mean --progress none?": "--no-progress",
            "did you mean --help?": "-? --usage --help-all",
            "did you mean --jobs?": "--nproc=4 --parallel=4 --max-workers=8",
            "did you mean --memory?": "--mem=8GB --low-cpu-memory --max_memory=8GB",
            "did you mean --overwrite?": "--exist-ok --FORCE",
            "did you mean --digest?": "--sha256",
            "nothing is replaced without --overwrite; leave it out": "--no-overwrite",
            "nothing is verified without --verify; leave it out": "--no-verify --skip-verify",
            "weights are compared bit for bit; leave it out": "--rtol=1 --atol=1 --tolerance=1",
            "tensors are always streamed, within --memory; leave it out": "--lazy --no-lazy --lazy-unpickle "
            "--lazy_load_tensors=1",
            "tokenizer and config come along; leave it out": "--copy-tokenizer --tokenizer=x --vocab-only",
            "no code of a model is run; leave it out": "--trust-remote-code",
            "nothing is downloaded here; hf download does": "--hf-token=x --cache-dir=x --repo-type=x --include=x --revision=x",
            "nothing is uploaded here; hf upload does": "--push-to-hub --private",
            "conversions use no GPU or TPU; --verify takes what JAX finds (JAX_PLATFORMS)": "--cpu --num-gpus=8 "
            "--simulated_cpu_devices_count=16",
            "the input and the output are two words": "->",
        }.items()
        for word in words.split()
    },
    ("--prefuse", "a", "b", "--no-quiet"): "unrecognized arguments: --no-quiet; convert --help shows all options",
    **{
        ("--prefuse", "a", "b", f"--{name}", value): f"argument --{name}: {why}; convert --help shows all options"
        for name, value, why in (
            ("jobs", "0", "'0' is not a positive whole number"),
            ("jobs", "many", "'many' is not a positive whole number"),
            ("shards", "1e3", "'1e3' is not a positive whole number"),
            ("align", "tpu", "'tpu' is not a positive whole number"),
            ("memory", "8,5GB", "'8,5GB' is not a size such as 512MiB or 5GB"),
            ("memory", "0.5", "'0.5' is no size above zero"),
            ("memory", "9" * 5000, f"'{'9' * 59}... is not a size such as 512MiB or 5GB"),
            ("max-shard-size", "50%", "'50%' is not a size such as 512MiB or 5GB"),
            ("scan-axis", "2", "'2' is neither 0 nor 1"),
            ("mesh", "4", "'4' is not a mesh such as expert=4,model=2"),
            ("process-id", "-1", "'-1' is not a whole number from 0"),
        )
    },
    **{
        ("--prefuse", "a", "b", word): f"unrecognized arguments: {word} ({said}); convert --help shows all options"
        for word, said in {
            "-o": "the output is the second path",
            "--output=b": "the output is the second path",
            "--fuse": "did you mean --prefuse?",
            "-f": "did you mean --overwrite?",
            "-q": "did you mean --quiet?",
            "-v": "--dry-run shows the plan, --debug tracebacks",
            "--num-workers=2": "did you mean --jobs?",
            "--tensor-parallel-size=4": "did you mean --shards?",
            "--Layout=concat": "did you mean --layout?",
            "--dryrun": "did you mean --dry-run?",
            "--max_shard_size=5GB": "did you mean --max-shard-size?",
            "--gpu": "conversions use no GPU or TPU; --verify takes what JAX finds (JAX_PLATFORMS)",
            "--token=x": "nothing is downloaded here; hf download does",
            "-y": "nothing is asked; --overwrite replaces an output",
            "--workers=2": "did you mean --jobs?",
            "--tp=4": "did you mean --shards?",
            "--dtype=bf16": "types stay as they are; --dequantize computes bfloat16 of quantised weights",
        }.items()
    },
    (
        "--verify",
        "a",
        "b",
        "--layers",
        "5-3",
    ): "argument --layers: '5-3' ends before it begins; did you mean 3-5?; convert --help shows all options",
}
"""A command -> what is said to it; its exit code is 2."""


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_that_is_none(said, words):
    assert said(*words) == (2, f"convert: {COMMANDS[words]}")


def test_no_words_at_all_show_examples(monkeypatch, capsys):
    assert main([]) == 2
    text = capsys.readouterr().err
    assert text.startswith("convert: say what to do; convert --help shows all\n\nexamples:\n  convert --inspect ckpt ")
    assert len(text.splitlines()) < 17
    assert main(["--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["action"], found["exit_code"], found["error"]) == ("none", 2, "say what to do; convert --help shows all")


def test_a_place_where_nobody_may_look_asks_for_the_right(said, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    why = "Permission denied; ask its owner for the right, or take another place"
    assert said("--inspect", "closed/in") == (6, f"convert: closed/in: {why}")


def test_a_family_that_is_none_is_not_to_be_said_again(said, tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    assert said("--prefuse", "in", OUT, "--family", "qwen3") == (
        4,
        "convert: in: 'qwen3' is no known MoE family (nearest: qwen3_moe); --family takes one that convert --families lists",
    )


def test_help_with_one_dash_is_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["-help"])
    assert capsys.readouterr().out.startswith("usage: convert ACTION [CKPT ...] [options]")


def test_a_name_that_is_too_long_is_no_input(said):
    name = "n" * 300
    assert said("--prefuse", name, OUT) == (
        3,
        f"convert: {name}: File name too long; give the directory that holds the checkpoint",
    )


@pytest.mark.parametrize(
    "text", ["per-shard:maxtext", "per-shard:0", "per-shard:²", "per-shard:4:0", "per-shard:" + "9" * 5000, "x"]
)
def test_a_layout_that_is_none_is_no_bug_of_ours(said, tmp_path, text):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    code, message = said("--split", "in", OUT, "--source-layout", text, "--quiet")
    assert code == (2 if text == "x" else 4)
    assert message.startswith("convert: no layout is called ")
