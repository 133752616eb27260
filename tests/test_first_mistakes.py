"""What a new user does wrong first gets an answer of its own: what it is, where, what to do. Exact texts."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
from convert.cli import main
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
    ("a/model.safetensors",): "the checkpoint is not here, but below; give {0}/a",
    ("a/model.safetensors", "b/model.safetensors"): "the checkpoint is not here, but below; give one of {0}/a, {0}/b",
    ("models--o--x/snapshots/1/x", "models--o--y/snapshots/1/x"): "a cache of several models; give one of {0}/models--o--x, "
    "{0}/models--o--y",
    ("snapshots/1/x", "snapshots/2/x"): "2 snapshots are here; give one of them: {0}/snapshots/1, {0}/snapshots/2",
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


ADDRESSES = {
    "https://huggingface.co/Qwen/Qwen3-30B-A3B/tree/main": "download it first: hf download Qwen/Qwen3-30B-A3B --local-dir "
    "Qwen3-30B-A3B",
    "hf://a/b": "download it first: hf download a/b --local-dir b",
    "https://huggingface.co/a": "known stores are gs://, s3://",
    "https://example.org/a/b": "known stores are gs://, s3://",
    "gs:/bucket/a": "no such directory; an address begins with gs://",
    "~/ckpt": "no such directory; ~ stands for your home only without quotes",
}
"""What is no path here -> what is said of it."""


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_that_is_no_path(said, address):
    assert said("--prefuse", address, OUT) == (3, f"convert: {address}: {ADDRESSES[address]}")


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
    ("--prefuse", "a b"): "give an input and an output checkpoint; found 1 paths: 'a b'",
    ("--prefuse", "a", "my", "model"): "give an input and an output checkpoint; found 3 paths: a my model",
    ("--prefuse",): "give an input and an output checkpoint; found 0 paths",
    ("--prefuse", "", "b"): "a path is empty; if it is a variable of your shell, it is not set",
    ("--inspect", ""): "a path is empty; if it is a variable of your shell, it is not set",
    (
        "--prefuse=a",
        "b",
    ): "argument --prefuse: it takes no value; put a space in the place of = before 'a'; convert --help shows all options",
    **{
        ("--prefuse", "a", "b", word): f"unrecognized arguments: {word} ({said}); convert --help shows all options"
        for word, said in {
            "-o": "the output is the second path",
            "--output=b": "the output is the second path",
            "--fuse": "did you mean --prefuse?",
            "-f": "did you mean --overwrite?",
            "-q": "did you mean --quiet?",
            "-v": "--dry-run shows the plan, --debug tracebacks",
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


@pytest.mark.parametrize(
    "text", ["per-shard:maxtext", "per-shard:0", "per-shard:²", "per-shard:4:0", "per-shard:" + "9" * 5000, "x"]
)
def test_a_layout_that_is_none_is_no_bug_of_ours(said, tmp_path, text):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    code, message = said("--split", "in", OUT, "--source-layout", text, "--quiet")
    assert code == (2 if text == "x" else 4)
    assert message.startswith("convert: no layout is called ")
