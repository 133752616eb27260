"""The command: exit codes and messages, what it leaves alone, and the promise that split restores the original files."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.cli import main, verify_main
from convert.commit.publish import check_output, destination
from convert.errors import StorageError, UsageError
from convert.hf.write import HFWriter
from layouts.tables.families import FAMILIES
from layouts.tables.natives import PER_EXPERT, PER_EXPERT_W123
from layouts.tables.targets import TARGETS
from tests.tiny import HF, checkpoint, config, load, same, tensors, times, tree

MIXTRAL = next(family for family in HF if family.native[0] is PER_EXPERT_W123)
QWEN = next(family for family in HF if family.native[0] is PER_EXPERT)
MANIFEST = "convert_manifest.json"


@pytest.fixture(params=[(MIXTRAL, 3), (QWEN, 1)], ids=["mixtral-3-shards", "qwen-1-file"])
def family(request):
    return request.param


@pytest.fixture
def source(family, tmp_path) -> Path:
    return checkpoint(tmp_path / "in", tensors(family[0]), config(family[0]), shards=family[1])


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--quiet"])


@pytest.mark.parametrize("layout", ["concat", "transformers", "vllm", "interleaved"])
def test_split_after_prefuse_restores_every_file(source, family, layout, tmp_path, capsys):
    assert run("--prefuse", source, tmp_path / "fused", "--layout", layout, "--max-shard-size", "2kB") == 0
    assert f"layout {layout}: 2 MoE blocks of 12 experts" in capsys.readouterr().out
    assert same(load(tmp_path / "fused"), tensors(family[0], TARGETS[layout]))
    assert run("--split", tmp_path / "fused", tmp_path / "back") == 0
    back = tree(tmp_path / "back")
    assert back.pop(MANIFEST)
    assert back == tree(source)


def test_laying_out_again_still_remembers_the_original(source, tmp_path):
    assert run("--prefuse", source, tmp_path / "concat") == 0
    assert run("--prefuse", tmp_path / "concat", tmp_path / "v5", "--layout", "transformers") == 0
    assert run("--split", tmp_path / "v5", tmp_path / "back") == 0
    back = tree(tmp_path / "back")
    assert back.pop(MANIFEST)
    assert back == tree(source)


def test_side_files_are_carried_over_and_the_config_is_marked(source, tmp_path):
    assert run("--prefuse", source, tmp_path / "fused") == 0
    before, after = tree(source), tree(tmp_path / "fused")
    for file in ("tokenizer.json", "assets/deep/chat_template.jinja", ".hidden"):
        assert after[file] == before[file]
    written = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert written.pop("moe_layout")["layout"] == "concat"
    assert written == json.loads((source / "config.json").read_text())


def test_the_input_is_only_read(source, tmp_path):
    for path in (source, *source.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    before = tree(source), times(source)
    assert run("--prefuse", source, tmp_path / "fused") == 0
    assert run("--verify", source, tmp_path / "fused", "--no-gemm") == 0
    assert (tree(source), times(source)) == before
    assert os.access(tmp_path / "fused" / "config.json", os.W_OK)
    source.chmod(0o755)


@pytest.mark.parametrize("action", ["--prefuse", "--split"])
def test_a_dry_run_prints_the_plan_and_touches_nothing(source, family, action, tmp_path, capsys):
    if action == "--split":
        assert run("--prefuse", source, tmp_path / "fused") == 0
        source = tmp_path / "fused"
    before = tree(tmp_path), times(tmp_path)
    assert run(action, source, tmp_path / "new" / "out", "--dry-run") == 0
    assert (tree(tmp_path), times(tmp_path)) == before
    printed = capsys.readouterr().out
    assert "2 MoE blocks of 12 experts" in printed
    assert "mlp.experts.{e}.down_proj.weight  'k n'" in printed or "experts.{e}.w2.weight  'k n'" in printed
    assert "lm_head.weight  x1" in printed
    card = " README.md," if action == "--split" else ""
    assert f"side files: .hidden,{card} assets/deep/chat_template.jinja" in printed
    assert "nothing was written" in printed
    assert "memory: at most" in printed


def test_the_families_are_printed(capsys):
    assert run("--families") == 0
    printed = capsys.readouterr().out
    assert all(family.name in printed for family in FAMILIES)
    assert "no gate, so nothing to fuse" in printed


def test_verify_says_equal_or_what_differs(source, tmp_path, capsys):
    assert run("--prefuse", source, tmp_path / "fused") == 0
    assert verify_main([str(source), str(tmp_path / "fused"), "--quiet", "--no-gemm"]) == 0
    file = next((tmp_path / "fused").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert run("--verify", source, tmp_path / "fused", "--no-gemm") == 1
    assert run("--verify", tmp_path / "fused") == 1
    assert "is not what was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "say what to do"),
        (["{in}", "{out}"], 2, "say what to do"),
        (["--to", "hf", "{in}", "{out}"], 2, "{in} is hf already"),
        (["--prefuse", "{in}"], 2, "found 1 path: {in}"),
        (["--prefuse", "{in}", "{out}", "more"], 2, "found 3 paths"),
        (["--prefuse", "{in}", "{out}", "--layout", "zigzag"], 2, "'zigzag'; known: concat, transformers"),
        (["--prefuse", "{in}", "{out}", "--source-layout", "zigzag"], 2, "'zigzag'; known: concat, transformers"),
        (["--split", "{in}", "{out}", "--layout", "concat"], 2, "--layout is for --prefuse"),
        (["--verify"], 2, "--verify takes two checkpoints"),
        (["--prefuse", "{none}", "{out}"], 3, "{none}: no such directory"),
        (["--verify", "{in}", "{none}"], 3, "{none}: no such directory"),
        (["--verify", "{in}"], 3, "{in}: no convert_manifest.json here"),
        (["--split", "{in}", "{out}"], 4, "{in}: all experts are as they were published already; there is nothing to split"),
        (["--prefuse", "{in}", "{out}", "--family", "olmo"], 4, "nearest: olmoe"),
        (["--prefuse", "{in}", "{in}"], 5, "must not contain one another"),
        (["--prefuse", "{in}", "{in}/assets/out"], 5, "must not contain one another"),
        (["--prefuse", "{in}/assets", "{in}"], 5, "must not contain one another"),
        (["--prefuse", "{in}", "{link}/out"], 5, "must not contain one another"),
        (["--prefuse", "{in}", "{there}"], 5, "{there} exists already"),
        (["--prefuse", "{in}", "{dangling}"], 5, "{dangling} is a link"),
        (["--prefuse", "{in}", "{in}.txt/out"], 2, "is no directory, so nothing can be made in it"),
    ],
)
def test_errors_have_their_code_and_one_message(source, tmp_path, capsys, arguments, code, words):
    names = {name: str(tmp_path / name) for name in ("in", "out", "none", "there", "link", "dangling")}
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "in.txt").write_text("")
    before = tree(tmp_path), times(tmp_path)
    assert run(*(argument.format(**names) for argument in arguments)) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("convert: ")
    assert words.format(**names) in printed.err
    assert "Traceback" not in printed.err
    assert not printed.out
    assert (tree(tmp_path), times(tmp_path)) == before


def test_the_same_command_again_finds_its_work_done(source, tmp_path, capsys):
    assert run("--prefuse", source, tmp_path / "fused") == 0
    before = tree(tmp_path), times(tmp_path)
    assert run("--prefuse", source, tmp_path / "fused") == 0
    assert "made by this plan from this input" in capsys.readouterr().out
    assert (tree(tmp_path), times(tmp_path)) == before
    assert run("--prefuse", source, tmp_path / "fused", "--dry-run") == 0
    assert "fused is there, and what can be seen without reading tensors is as planned" in capsys.readouterr().out
    for words in ((), ("--dry-run",)):
        assert run("--prefuse", source, tmp_path / "fused", "--layout", "vllm", *words) == 5
        assert "was not made by this plan: its layout is another one; remove it" in capsys.readouterr().err
        assert run("--prefuse", source, tmp_path / "fused", "--content", *words) == 5
        assert "its manifest has another content digest than --content gives now, or none; remove it" in capsys.readouterr().err
    os.utime(source / "config.json")
    assert run("--prefuse", source, tmp_path / "fused") == 0, "what it says is the same"
    (source / "config.json").write_text((source / "config.json").read_text() + "\n")
    assert run("--prefuse", source, tmp_path / "fused") == 5
    assert "exists already and was made from another input" in capsys.readouterr().err


def test_a_split_that_does_not_know_the_original_files_says_so(source, family, tmp_path, capsys):
    assert run("--prefuse", source, tmp_path / "fused") == 0
    (tmp_path / "fused" / "convert_manifest.json").unlink()
    assert run("--split", tmp_path / "fused", tmp_path / "back") == 0
    assert "does not say from which files it was made" in capsys.readouterr().out
    assert same(load(tmp_path / "back"), tensors(family[0]))


def test_an_input_that_changes_under_the_run_gives_no_output(source, tmp_path, capsys, monkeypatch):
    write = HFWriter.write
    monkeypatch.setattr(HFWriter, "write", lambda *given: (write(*given), os.utime(source / "config.json"))[0])
    assert run("--prefuse", source, tmp_path / "fused") == 3
    assert "has changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()


def test_there_is_nothing_to_do_twice(source, tmp_path, capsys):
    assert run("--prefuse", source, tmp_path / "fused") == 0
    assert run("--prefuse", tmp_path / "fused", tmp_path / "twice") == 4
    assert "in layout 'concat' already; there is nothing to prefuse" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--prefuse", "--split", "a", "b"],
        ["--prefuse", "a", "b", "--jobs", "0"],
        ["--prefuse", "a", "b", "--jobs", "-1"],
        *(["--prefuse", "a", "b", "--memory", size] for size in ("", "x", "0", "-5GB", "inf", "nan", "5XB", "GB")),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "convert --help shows all options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("5GB", 5 * 10**9), ("1.5g", 15 * 10**8), ("4096", 4096), (" 2 kib ", 2048)]
)
def test_sizes_are_read_as_people_write_them(text, size, monkeypatch, capsys):
    def prefuse(*_, max_shard_size, **__):
        raise UsageError(f"read as {max_shard_size}")

    monkeypatch.setattr(convert, "prefuse", prefuse)
    assert run("--prefuse", "a", "b", "--max-shard-size", text) == 2
    assert capsys.readouterr().err == f"convert: read as {size}\n"


def test_a_bug_of_ours_is_called_one_and_shows_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(convert, "prefuse", lambda *_, **__: np.zeros(2)[5])
    assert run("--prefuse", "a", "b") == 70
    assert "this is a bug" in (printed := capsys.readouterr().err)
    assert "Traceback" not in printed
    assert run("--prefuse", "a", "b", "--debug") == 70
    assert "Traceback" in capsys.readouterr().err


def test_progress_goes_to_stderr_and_the_summary_to_stdout(source, tmp_path, capsys):
    assert main(["--prefuse", str(source), str(tmp_path / "fused"), "--progress", "bar"]) == 0
    printed = capsys.readouterr()
    assert "B/s" in printed.err
    assert printed.out.splitlines()[1].startswith(f"wrote  {tmp_path / 'fused'}: ")


def test_what_reads_nothing_takes_a_blink(tmp_path):
    """Measured by what is imported, because time is not to be relied on; `--inspect` then starts no threads for products."""
    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))
    code = f"""
import os, sys
from convert.cli import main

def run(*words, code=0, without=()):
    try:
        assert main(words) == code
    except SystemExit as stopped:
        assert stopped.code == code
    loaded = set(without) & set(sys.modules)
    assert not loaded, (words, loaded)

heavy = ["jax", "orbax", "safetensors", "tensorstore", "ml_dtypes", "einops", "tqdm", "torch", "email", "importlib.metadata"]
run("--help", without=[*heavy, "numpy", "layouts.tables", "convert.planning"])
run("--version", without=[*heavy, "numpy", "layouts.tables", "convert.planning"])
run("--no-such-option", code=2, without=[*heavy, "numpy", "layouts.tables", "convert.planning"])
run("--layouts", without=[*heavy, "numpy", "layouts.matching"])
run("--families", without=[*heavy, "numpy", "layouts.matching"])
run("--inspect", {str(source)!r}, without=heavy)
assert len(os.listdir("/proc/self/task")) == 1 and "OPENBLAS_NUM_THREADS" not in os.environ
"""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "exit codes: 0 done" in done.stdout


def test_the_module_is_the_command(source, tmp_path):
    command = [sys.executable, "-m", "convert", "--split", source, tmp_path / "out", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(convert.__file__).parents[1])
    assert done.returncode == 4
    assert done.stderr.startswith("convert: ")


def test_the_library_raises_and_plans_without_writing(source, tmp_path):
    planned = convert.plan(source, tmp_path / "out", prefuse=True)
    assert planned.nbytes == sum(array.nbytes for array in load(source).values())
    for choice in ({}, {"prefuse": True, "split": True}):
        with pytest.raises(convert.UsageError):
            convert.plan(source, tmp_path / "out", **choice)
    with pytest.raises(convert.InputError):
        convert.prefuse(tmp_path / "none", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_dry_run_fails_where_the_disk_is_too_small(source, tmp_path, capsys, monkeypatch):
    real = os.statvfs(tmp_path)
    full = os.statvfs_result([*real[:2], real.f_blocks, 1, 1, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    assert run("--prefuse", source, tmp_path / "new" / "out", "--dry-run") == 6
    assert f"{tmp_path}: the disk is too small: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_where_nothing_may_be_made_is_said_before_the_work(source, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    assert run("--prefuse", source, tmp_path / "new" / "out", *words) == 6
    why = f"nothing may be made in {tmp_path}; ask its owner for the right, or choose another output"
    assert capsys.readouterr().err == f"convert: {tmp_path / 'new' / 'out'}: {why}\n"


def test_of_several_processes_one_makes_the_output(source, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert destination(tmp_path / "out", makes=False) == tmp_path / "out"
    check_output(source, tmp_path / "old", overwrite=True, makes=False)
    with pytest.raises(StorageError, match="nothing may be made"):
        check_output(source, tmp_path / "old", overwrite=True)
    with pytest.raises(UsageError, match="give the output by its own name"):
        check_output(tmp_path, destination("/", makes=False), overwrite=False)
    with pytest.raises(UsageError, match="begins or ends with a space"):
        destination("s3://bucket/out ")


@pytest.mark.parametrize("there", [True, False])
def test_a_report_is_tried_before_the_work(source, tmp_path, there, capsys, monkeypatch):
    monkeypatch.setattr(convert, "verify", lambda *_, **__: pytest.fail("it has begun"))
    (tmp_path / "page.html").mkdir()
    where = tmp_path / "page.html" if there else tmp_path / "no" / "page.html"
    assert run("--verify", source, source, "--report", where) == 6
    why = "Is a directory" if there else "No such file or directory"
    assert capsys.readouterr().err == (
        f"convert: --report={where} cannot be written: {why}; give a file in a directory that is there\n"
    )


def test_trying_leaves_a_report_as_it_is(source, tmp_path, monkeypatch):
    for name, text in (("old.html", "old"), ("new.html", None)):
        if text:
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(convert, "verify", lambda *_, **__: (_ for _ in ()).throw(convert.InputError("gone")))
        assert run("--verify", source, source, "--report", tmp_path / name) == 3
    assert (tmp_path / "old.html").read_text() == "old"
    assert not (tmp_path / "new.html").exists()
