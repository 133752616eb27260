"""`Nothing to do` is a proof: of the files of the output, and of the content of the input. So is what a run goes on with."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.cli import main
from convert.commit import identity, inventory
from convert.engine import again, copying
from convert.hf import execute
from convert.orbax import copy, fill
from layouts.hf.header import read_shard
from scripts.make_checkpoint import make_checkpoint

MANIFEST = "convert_manifest.json"
WAYS = {
    "prefuse": ("hf", ["--prefuse"]),
    "split": ("hf fused", ["--split"]),
    "to orbax": ("hf", ["--to", "orbax"]),
    "to orbax, fused": ("hf", ["--prefuse", "--to", "orbax"]),
    "to hf": ("orbax", ["--to", "hf"]),
    "orbax, kept": ("orbax", ["--prefuse", "--keep-chunks"]),
    "orbax, anew": ("orbax fused", ["--split"]),
}
GARBAGE = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "empty": "{}",
    "tensors": '{"tensors": [], "files": {}, "input": ""}',
    "an entry": '{"tensors": {"a": 7}, "files": {}, "input": ""}',
    "a shape": '{"tensors": {"a": {"dtype": "F32", "shape": ["x"], "xxh3_128": ""}}, "files": {}, "input": ""}',
    "no digests": '{"tensors": {"a": {"dtype": "F32", "shape": [4], "xxh3_128": {}}}, "files": {}, "input": ""}',
    "a gap": '{"tensors": {"a": {"dtype": "F32", "shape": [4], "xxh3_128": {"0:1": "", "2:4": ""}}}, "files": {}, "input": ""}',
    "a file": '{"tensors": {}, "files": {"a": []}, "input": ""}',
    "a size": '{"tensors": {}, "files": {"a": {"size": "1"}}, "input": ""}',
    "deep": "[" * 100_000,
}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("one") / "in", family="qwen3_moe", experts=3, layers=2, shard=60_000)


def other_than(one: Path, path: Path) -> Path:
    """A copy of equal names, sizes and times, one bit of whose last tensor is another."""
    shutil.copytree(one, path)
    name = sorted(path.glob("*.safetensors"))[-1]
    data = bytearray(name.read_bytes())
    data[-1] ^= 1
    name.write_bytes(data)
    for file in (file for file in one.rglob("*") if file.is_file()):
        shutil.copystat(file, path / file.relative_to(one))
    return path


def run(*arguments) -> int:
    return main([*map(str, arguments), "--quiet"])


def prefuse(source: Path, out: Path, *options: str) -> int:
    return run("--prefuse", source, out, "--max-shard-size", "60000", *options)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def made(kind: str, source: Path, path: Path) -> Path:
    """The input of a way, from a Hugging Face checkpoint."""
    if kind == "hf":
        return source
    target, fused = kind.partition(" ")[::2]
    to = ["--to", "orbax"] if target == "orbax" else []
    assert run(*(["--prefuse"] if fused else []), source, path, *to) == 0
    (path / MANIFEST).unlink()  # its digests alone would tell two inputs apart
    return path


def age(path: Path) -> None:
    for file in path.rglob("*"):
        os.utime(file, (1, 1))


@pytest.mark.parametrize("way", WAYS)
def test_the_same_input_is_told_from_one_that_differs_in_a_bit(one, tmp_path, capsys, way):
    kind, options = WAYS[way]
    first = made(kind, one, tmp_path / "first")
    second = made(kind, other_than(one, tmp_path / "other"), tmp_path / "second")
    age(second)
    out = tmp_path / "out"
    assert run(*options, first, out) == 0
    before = contents(out)
    assert run(*options, second, out) == 5
    error = capsys.readouterr().err
    assert "was made from another input" in error
    assert "differs; remove it, choose another output, or pass --overwrite" in error
    assert run(*options, first, out, "--memory", "300MiB", "--jobs", "1") == 0
    assert "tensors were read again and compared" in capsys.readouterr().out
    assert contents(out) == before
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize(
    "spoil", ["a shard", "a cut shard", "a header", "the index", "the config", "a side file", "one more", "the manifest"]
)
def test_an_output_that_is_not_whole_any_more(one, tmp_path, capsys, spoil):
    source = shutil.copytree(one, tmp_path / "in")
    (source / "README.md").write_text("a model")
    out = tmp_path / "out"
    assert prefuse(source, out) == 0
    shard = sorted(out.glob("*.safetensors"))[1]
    {
        "a shard": shard.unlink,
        "a cut shard": lambda: os.truncate(shard, shard.stat().st_size - 1),
        "a header": lambda: shard.write_bytes(shard.read_bytes().replace(b'"format"', b'"tamrof"')),
        "the index": (out / "model.safetensors.index.json").unlink,
        "the config": lambda: (out / "config.json").write_text("{}"),
        "a side file": lambda: (out / "README.md").write_text("A MODEL"),
        "one more": lambda: (out / "more").touch(),
        "the manifest": lambda: (out / MANIFEST).write_text((out / MANIFEST).read_text().replace('"original"', '"lanigiro"')),
    }[spoil]()
    before = contents(out)
    assert prefuse(source, out) == 5
    assert "is not what was written" in capsys.readouterr().err
    assert contents(out) == before
    assert prefuse(source, out, "--overwrite") == 0
    assert prefuse(source, out) == 0


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_disk_that_fails_says_nothing_against_an_output(one, tmp_path, monkeypatch, capsys, number):
    out, opened = tmp_path / "out", os.open
    assert prefuse(one, out) == 0

    def fails(path, *flags, **more):
        if path == out / "config.json":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *flags, **more)

    monkeypatch.setattr(inventory.os, "open", fails)
    for arguments in (["--prefuse", one, out], ["--verify", out]):
        assert main(["--quiet", *map(str, arguments)]) == 6
        error = capsys.readouterr().err
        assert f"{out / 'config.json'}: {os.strerror(number)}" in error
        assert "remove it" not in error


@pytest.mark.parametrize("spoil", ["manifest.ocdbt", "d", "_METADATA", "a cut file"])
def test_an_orbax_output_that_is_not_whole_any_more(one, tmp_path, capsys, spoil):
    out = tmp_path / "out"
    assert run("--prefuse", "--to", "orbax", one, out) == 0
    item = out / "0" / "items"
    if spoil == "a cut file":
        file = max((file for file in item.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        os.truncate(file, file.stat().st_size - 1)
    elif spoil == "d":
        shutil.rmtree(item / "d")
    else:
        (item / spoil).unlink()
    assert run("--prefuse", "--to", "orbax", one, out) == 5
    assert "is not what was written" in capsys.readouterr().err


def test_a_directory_for_each_array_is_counted(tmp_path, capsys):
    from tests.orbax.test_keep import save

    save(tmp_path / "in", (2, 4, 20, 24), ocdbt=False)
    command = ("--prefuse", tmp_path / "in", tmp_path / "out")
    assert run(*command) == 0
    assert run(*command) == 0
    files = json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]
    (folder,) = (name for name in files if name.endswith(".wi/"))
    assert files[folder]["files"] > 1
    next(file for file in (tmp_path / "out" / folder).rglob("*") if file.is_file() and file.suffix != ".json").unlink()
    assert run(*command) == 5
    assert f"{folder} holds {files[folder]['files'] - 1} files, not {files[folder]['files']}" in capsys.readouterr().err
    assert run("--verify", tmp_path / "out") in (1, 3)


def test_other_options_are_another_output(one, tmp_path, capsys):
    assert prefuse(one, tmp_path / "out") == 0
    assert run("--prefuse", one, tmp_path / "out", "--max-shard-size", "90000") == 5
    assert "was made with other options (--max-shard-size)" in capsys.readouterr().err


def test_side_files_of_another_input(one, tmp_path, capsys):
    source = shutil.copytree(one, tmp_path / "in")
    (source / "tokenizer.json").write_text("{1}")
    assert prefuse(source, tmp_path / "out") == 0
    (source / "tokenizer.json").write_text("{2}")
    assert prefuse(source, tmp_path / "out") == 5
    assert "was made from another input: tokenizer.json differs" in capsys.readouterr().err


def test_the_first_difference_ends_it(one, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert prefuse(one, out) == 0
    found = json.loads((out / MANIFEST).read_text())
    for entry in found["tensors"].values():
        entry["xxh3_128"] = "0" * 32
    (out / MANIFEST).write_text(json.dumps(found))
    real, read = again._digest, []
    monkeypatch.setattr(again, "_digest", lambda target, *rest: (read.append(target), real(target, *rest))[1])
    assert prefuse(one, out, "--jobs", "1") == 5
    assert 0 < len(read) < len(found["tensors"])


def stop_half_way(monkeypatch) -> None:
    """A disk that is full once some tensors are finished."""
    real, written = execute.write_tensor, []

    def fail_later(target, *rest):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "full")
        written.append(target)
        return real(target, *rest)

    monkeypatch.setattr(copying, "SHORT", 0)  # each tensor by itself
    monkeypatch.setattr(execute, "write_tensor", fail_later)


@pytest.mark.parametrize("forged", [False, True], ids=["as cp -p", "ctime, too"])
def test_what_another_input_left_is_not_gone_on_with(one, tmp_path, monkeypatch, capsys, forged):
    """In the same place, with the same names, sizes and times."""
    if forged:
        real = identity.state_of
        for module in (identity, convert.run):
            monkeypatch.setattr(module, "state_of", lambda path, but: real(path, but)._replace(system=""))
    source = shutil.copytree(one, tmp_path / "in")
    with monkeypatch.context() as patch:
        stop_half_way(patch)
        assert prefuse(source, tmp_path / "out", "--jobs", "1") == 6
    (left,) = tmp_path.glob("out.partial-*")
    second = other_than(source, tmp_path / "second")
    shutil.rmtree(source)
    shutil.move(second, source)
    assert prefuse(source, tmp_path / "out") == 0
    assert "finished by an earlier run" not in capsys.readouterr().out
    assert left.exists()
    assert prefuse(source, tmp_path / "wanted") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_orbax_does_not_go_on_with_what_another_input_left(one, tmp_path, monkeypatch, capsys):
    first = made("orbax", one, tmp_path / "first")
    second = made("orbax", other_than(one, tmp_path / "other"), tmp_path / "second")
    source = shutil.copytree(first, tmp_path / "in")
    for module, name in ((copy, "_step"), (fill.Filler, "_digest")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            run("--split", source, tmp_path / "out") if name == "_digest" else run("--prefuse", source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.rmtree(source)
    shutil.copytree(second, source)
    age(source)
    assert run("--prefuse", source, tmp_path / "out") == 0
    assert "finished by an earlier run" not in capsys.readouterr().out
    assert convert.verify(source, tmp_path / "out", gemm=False).equal


def test_a_hard_link_to_the_input_spoils_no_run(one, tmp_path, monkeypatch):
    source = shutil.copytree(one, tmp_path / "in")
    real = execute.write_tensor

    def link(target, *rest):
        if not (tmp_path / "link").exists():
            os.link(source / "config.json", tmp_path / "link")
        return real(target, *rest)

    monkeypatch.setattr(copying, "SHORT", 0)
    monkeypatch.setattr(execute, "write_tensor", link)
    assert prefuse(source, tmp_path / "out", "--jobs", "1") == 0


def test_samples_reach_all_through_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_PIECE", 8)
    seen = set()
    path = tmp_path / "data"
    for changed in (None, 0, 999, 66 * 4):  # the first, the last, and the beginning of the fifth piece
        data = np.zeros(1000, np.uint8)
        if changed is not None:
            data[changed] = 1
        path.write_bytes(data)
        os.utime(path, (1, 1))
        seen.add(identity.state_of(tmp_path).content)
    assert len(seen) == 4


@pytest.mark.parametrize("name", GARBAGE)
def test_a_manifest_is_read_as_if_anybody_had_written_it(one, tmp_path, capsys, name):
    out = tmp_path / "out"
    assert prefuse(one, out) == 0
    (out / MANIFEST).write_text(GARBAGE[name])
    assert prefuse(one, out) == 5
    assert "was not made by this plan" in capsys.readouterr().err
    assert run("--verify", out) == 3
    assert MANIFEST in capsys.readouterr().err


def test_a_manifest_opens_no_file_outside(one, tmp_path):
    out = tmp_path / "out"
    assert prefuse(one, out) == 0
    os.mkfifo(tmp_path / "pipe")
    found = json.loads((out / MANIFEST).read_text())
    found["files"]["../pipe"] = {"size": 0, "xxh3_128": ""}
    (out / MANIFEST).write_text(json.dumps(found))
    verdict = convert.verify(out)
    assert [level.differences for level in verdict.levels] == [
        ("../pipe is missing",),
        (),
        ("convert_manifest.json is not what was written",),
        (),
    ]


def test_a_pipe_among_the_files_is_told_and_not_waited_for(one, tmp_path):
    out = tmp_path / "out"
    assert prefuse(one, out) == 0
    (out / "config.json").unlink()
    os.mkfifo(out / "config.json")
    (difference,) = inventory.differences(
        out, MANIFEST, {"config.json": inventory.FileEntry(size=1)} | all_but(out, "config.json")
    )
    assert difference.startswith("config.json has 0 bytes")
    with pytest.raises(convert.InputError, match="no regular file"):
        inventory.entry_of(inventory.read_in_pieces(out / "config.json"))


def all_but(out: Path, name: str) -> dict[str, inventory.FileEntry]:
    files = json.loads((out / MANIFEST).read_text())["files"]
    return {key: inventory.FileEntry.parse(entry) for key, entry in files.items() if key != name}


def test_verify_alone_looks_at_all_files(one, tmp_path, capsys):
    source = shutil.copytree(one, tmp_path / "in")
    (source / "tokenizer.json").write_text("{}")
    (source / "vocab.txt").write_text("a")
    out = tmp_path / "out"
    assert prefuse(source, out) == 0
    assert run("--verify", out) == 0
    assert "files by name and size" in capsys.readouterr().out
    (out / "tokenizer.json").write_text("[]")
    (out / "vocab.txt").unlink()
    (out / "more.txt").touch()
    assert run("--verify", out) == 1
    printed = capsys.readouterr().out
    for line in ("tokenizer.json is not what was written", "vocab.txt is missing", "more.txt is there"):
        assert line in printed


def test_the_manifest_lists_every_file(one, tmp_path):
    out = tmp_path / "out"
    assert prefuse(one, out) == 0
    files = json.loads((out / MANIFEST).read_text())["files"]
    assert {name: entry["size"] for name, entry in files.items()} == {
        name: len(data) for name, data in contents(out).items() if name != MANIFEST
    }
    assert all(("xxh3_128" in entry) != name.endswith(".safetensors") for name, entry in files.items())
    assert sum(read_shard(out / name).begins[0] for name in files if name.endswith(".safetensors"))


def test_side_files_count_in_the_plan_and_in_the_space_check(one, tmp_path, monkeypatch, capsys):
    source = shutil.copytree(one, tmp_path / "in")
    (source / "large.txt").write_bytes(bytes(3_000_000))
    planned = convert.plan(source, tmp_path / "out", prefuse=True)
    assert planned.side_bytes == sum(os.stat(source / name).st_size for name in planned.side_files) > 3_000_000
    assert run("--prefuse", source, tmp_path / "out", "--dry-run") == 0
    assert "3.0 MB)" in capsys.readouterr().out
    real = os.statvfs

    class Small:
        def __init__(self, path):
            self.f_frsize = real(path).f_frsize
            self.f_bavail = (planned.nbytes + 1_000_000) // self.f_frsize

    monkeypatch.setattr(os, "statvfs", Small)
    assert prefuse(source, tmp_path / "out") == 6
    assert "more bytes are needed" in capsys.readouterr().err
