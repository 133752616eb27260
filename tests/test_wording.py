"""Errors speak of arguments to who calls the library, and of flags to who gives a command: each of its own, once."""

import pytest

import convert
from convert.cli import main
from convert.errors import UsageError
from convert.options.wording import as_arguments, in_python
from scripts.make_checkpoint import make_checkpoint


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("say so with --family; first", "say so with family=; first"),
        ("do without --family=qwen3_moe", "do without family='qwen3_moe'"),
        ("(--source-layout=per-shard:8)", "(source_layout='per-shard:8')"),
        ("--scan-axis=0 again", "scan_axis=0 again"),
        ("--memory=100MiB is too little: 5 MiB are needed", "memory='100MiB' is too little: 5 MiB are needed"),
        ("or pass --overwrite", "or pass overwrite=True"),
        ("(--dequantize=bf16)", "(dequantize='bf16')"),
        ("--no-gemm, --no-scan and --gemm", "gemm=False, scan=False and gemm=True"),
        ("--layout is not for --merge", "layout= is not for convert.merge"),
        ("--prefuse or --split it; --to is for checkpoints", "convert.prefuse or convert.split it; to= is for checkpoints"),
        ("Give --coordinator, --num-processes", "Give coordinator=, num_processes="),
        ("; --debug shows where", "; __cause__ shows where"),
        ("convert --families lists them", "convert --families lists them"),
        ("convert it with mlx_lm.convert --dequantize first", "convert it with mlx_lm.convert --dequantize first"),
        ("hf download org/name --local-dir name", "hf download org/name --local-dir name"),
        ("/a/--family/b--memory/--base.x: no such", "/a/--family/b--memory/--base.x: no such"),
        ("x--layout y, --layouts, ---layout", "x--layout y, --layouts, ---layout"),
    ],
)
def test_a_flag_becomes_its_argument(flags, arguments):
    assert as_arguments(flags) == arguments
    assert as_arguments(arguments) == arguments


def test_both_are_kept_and_the_inner_call_has_spoken():
    with pytest.raises(UsageError) as caught, in_python(), in_python():
        raise UsageError("pass --overwrite")
    assert (str(caught.value), caught.value.command) == ("pass overwrite=True", "pass --overwrite")


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    root = tmp_path_factory.mktemp("wording")
    make_checkpoint(root / "in", family="qwen3_moe", experts=4, layers=1)
    convert.prefuse(root / "in", root / "out", layout="transformers")
    return root


@pytest.mark.parametrize(
    ("call", "words", "said", "printed"),
    [
        (
            lambda: convert.prefuse("in", "out"),
            ["--prefuse", "in", "out"],
            "choose another output, or pass overwrite=True",
            "choose another output, or pass --overwrite",
        ),
        (
            lambda: convert.plan("in", "new", prefuse=True, shards=2),
            ["--prefuse", "in", "new", "--shards", "2", "--dry-run"],
            "did you mean layout='per-shard'?",
            "did you mean --layout=per-shard?",
        ),
        (
            lambda: convert.verify("in", "out", decode=True),
            ["--verify", "in", "out", "--decode"],
            "decode=True is for one checkpoint",
            "--decode is for one checkpoint",
        ),
        (
            lambda: convert.digest("in", memory=1),
            ["--digest", "in", "--memory", "1"],
            "memory=1 is too little",
            "--memory=1 is too little",
        ),
        (
            lambda: convert.merge("in", "new", base="in"),
            ["--merge", "in", "new", "--base", "in"],
            "convert.merge takes one, and base= the checkpoint",
            "--merge takes one, and --base the checkpoint",
        ),
    ],
)
def test_each_hears_its_own_words(there, call, words, said, printed, monkeypatch, capsys):
    monkeypatch.chdir(there)
    with pytest.raises(convert.ConvertError) as caught:
        call()
    assert said in str(caught.value)
    assert main([*words, "--quiet"]) == caught.value.exit_code
    assert capsys.readouterr().err == f"convert: {caught.value.command}\n"
    assert printed in caught.value.command
