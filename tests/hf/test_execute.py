"""What the engine promises besides the output: it resumes only what is there, proves its sources, and trusts no manifest."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.engine import budget
from convert.engine.budget import make_budget
from convert.engine.direct import Output
from convert.errors import InputError, UsageError
from convert.hf import execute
from convert.hf.shards import File
from convert.planning.planner import make_plan
from layouts.tables.families import FAMILIES
from scripts.benchmark_many import make
from scripts.make_checkpoint import make_checkpoint
from tests import tiny
from tests.commit.test_commit import contents, count_calls, partials, prefuse

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "in", family="qwen3_moe", experts=3, layers=2, shard=60_000)


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("wanted") / "out"
    convert.prefuse(source, out, max_shard_size=60_000)
    return contents(out)


def interrupted(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stage of a run that failed after all its tensors."""
    with monkeypatch.context() as patch:
        patch.setattr("convert.hf.write.HFWriter._write_beside", lambda *_: os.close(-1))
        assert prefuse(source, folder / "out") == 6
    (stage,) = partials(folder)
    return stage


def test_a_file_lost_from_the_stage_is_written_again(source, wanted, tmp_path, monkeypatch):
    stage = interrupted(source, tmp_path, monkeypatch)
    lost, cut = sorted((stage / "new").glob("*.safetensors"))[:2]
    lost.unlink()
    os.truncate(cut, 10)
    assert prefuse(source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == wanted


def test_a_journal_cut_short_keeps_its_whole_lines(source, wanted, tmp_path, monkeypatch):
    journal = interrupted(source, tmp_path, monkeypatch) / ".convert_journal"
    first = journal.read_bytes().splitlines(keepends=True)[0]
    journal.write_bytes(first + b'{"model.norm.weight": "0')
    assert prefuse(source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == wanted


def test_a_stage_without_a_journal_is_neither_believed_nor_emptied(source, tmp_path, monkeypatch, capsys):
    stage = interrupted(source, tmp_path, monkeypatch)
    (stage / ".convert_journal").unlink()
    before = contents(tmp_path)
    assert prefuse(source, tmp_path / "out") == 5
    assert "was not made by this tool" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_every_source_has_its_digest(source, wanted):
    sources = json.loads(wanted["convert_manifest.json"])["sources"]
    expected = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    assert sources == {n: xxhash.xxh3_128_hexdigest(expected[n].tobytes()) for n in sorted(expected)}


def test_sources_and_targets_larger_than_a_slab(tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "in", family="mixtral", experts=2, layers=1, embed=96, mlp=80)
    convert.prefuse(source, tmp_path / "wanted")
    monkeypatch.setattr("convert.engine.blocks.SLAB", 1000)
    monkeypatch.setattr(budget, "SLAB", 1000)
    monkeypatch.setattr("convert.engine.copying.SLAB", 1000)
    monkeypatch.setattr(budget, "STRIP", 700)
    convert.prefuse(source, tmp_path / "out", jobs=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
    convert.split(tmp_path / "out", tmp_path / "again", jobs=3)
    assert contents(source).items() <= contents(tmp_path / "again").items()


def test_tensors_without_dimensions_or_elements(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "in"))
    shards = {file: load_file(file) for file in copy.glob("*.safetensors")}
    (copy / "model.safetensors.index.json").unlink()
    next(iter(shards.values())).update(
        {"a.scalar": np.array(7, "i8"), "an.empty": np.empty((0, 3), "f4"), "b.empty": np.empty((3, 0), "u1")}
    )
    for file, tensors in shards.items():
        save_file(tensors, file)
    assert prefuse(copy, tmp_path / "out") == 0
    assert main(["--split", str(tmp_path / "out"), str(tmp_path / "again"), "--quiet"]) == 0
    assert contents(copy).items() <= contents(tmp_path / "again").items()
    assert not (tmp_path / "again" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("limit", [30_000, 100_000, 10**9])
def test_shards_keep_to_the_limit(source, tmp_path, limit):
    convert.prefuse(source, tmp_path / "out", max_shard_size=limit)
    files = list((tmp_path / "out").glob("*.safetensors"))
    for file in files:
        tensors = load_file(file)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
    assert (len(files) == 1) == (limit == 10**9)


def _no_gap(header: str) -> str:
    entries = json.loads(header)
    first = min((e["data_offsets"], n) for n, e in entries.items() if n != "__metadata__")[1]
    entries[first]["data_offsets"][1] -= 2
    return json.dumps(entries)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda headers: {name: _no_gap(header) for name, header in headers.items()},
        lambda headers: {**headers, "more.safetensors": next(iter(headers.values()))},
        lambda headers: dict.fromkeys(headers, "[]"),
        lambda headers: dict.fromkeys(headers, "{"),
        lambda headers: dict(list(headers.items())[1:]),
    ],
    ids=["offsets", "twice", "no object", "no json", "one lost"],
)
def test_a_manifest_is_not_trusted_with_offsets(source, tmp_path, spoil):
    fused = tmp_path / "deep" / "fused"
    convert.prefuse(source, fused)
    manifest = json.loads((fused / "convert_manifest.json").read_text())
    manifest["original"]["headers"] = spoil(manifest["original"]["headers"])
    (fused / "convert_manifest.json").write_text(json.dumps(manifest))
    convert.split(fused, tmp_path / "deep" / "again")
    assert convert.verify(source, tmp_path / "deep" / "again", gemm=False).equal
    assert sorted(os.listdir(tmp_path)) == ["deep"]


def test_a_manifest_is_not_trusted_with_paths(source, tmp_path):
    fused = tmp_path / "deep" / "fused"
    convert.prefuse(source, fused)
    manifest = json.loads((fused / "convert_manifest.json").read_text())
    headers = manifest["original"]["headers"]
    manifest["original"]["headers"] = {f"../{name}": header for name, header in headers.items()}
    (fused / "convert_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is not safe as the name of a file"):
        convert.split(fused, tmp_path / "deep" / "again")
    assert sorted(os.listdir(tmp_path)) == ["deep"]
    assert os.listdir(tmp_path / "deep") == ["fused"]


@pytest.mark.parametrize("original", [{}, [], 3, {"headers": {"a": 1}, "texts": {}}])
def test_a_broken_manifest_is_an_input_error(source, tmp_path, original):
    convert.prefuse(source, tmp_path / "fused")
    path = tmp_path / "fused" / "convert_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "original": original}))
    with pytest.raises(InputError, match="original"):
        convert.split(tmp_path / "fused", tmp_path / "again")


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(source, wanted, tmp_path, monkeypatch, capsys):
    real = os.statvfs
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: os.statvfs_result((*real(path)[:4], 3, *real(path)[5:])))
        patch.setattr(os, "posix_fallocate", None)
        assert prefuse(source, tmp_path / "out") == 6
    assert "more bytes are needed" in capsys.readouterr().err
    assert prefuse(source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == wanted


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
@pytest.mark.parametrize("jobs", ["1", "4"])
def test_a_full_tmpfs(tmp_path, jobs):
    source = make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=8, layers=6)
    before = contents(source)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (disk / "ballast").write_bytes(bytes((4 << 20) - sum(map(len, before.values())) // 2))
        command = ["--prefuse", str(source), str(disk / "out"), "--quiet", "--jobs", jobs]
        assert main(command) == 6
        assert not (disk / "out").exists()
        (disk / "ballast").unlink()
        assert main(command) == 0
        convert.prefuse(source, tmp_path / "wanted")
        assert contents(disk / "out") == contents(tmp_path / "wanted")
        assert contents(source) == before
    finally:
        subprocess.run(["umount", disk], check=True)


SIGNALLED = """
import itertools, os, sys, time
from convert.cli import main
from convert.engine.direct import Output
calls, put = itertools.count(), Output.put
def signalled(*arguments):
    next(calls) or os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(0.05)  # the signal is met before the work is done
    put(*arguments)
Output.put = signalled
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_run_to_go_on_with(forks, source, wanted, tmp_path, number):
    arguments = ["--prefuse", str(source), str(tmp_path / "out"), "--max-shard-size", "60000", "--quiet"]
    done = forks.run(SIGNALLED, int(number), *arguments)
    assert "run the same command again" in done.stderr
    assert done.returncode == 128 + number
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert contents(tmp_path / "out") == wanted


def test_too_little_memory_is_refused_and_more_is_kept_to():
    with pytest.raises(UsageError, match="too little"):
        make_budget(64 << 20, 1)
    for memory in (256 << 20, 512 << 20, 2 << 30):
        for tensors in (0, 10_000, 30_000):
            assert make_budget(memory, 64, tensors).peak <= memory


def test_side_files_never_replace_a_shard(source, tmp_path, capsys):
    copy = Path(shutil.copytree(source, tmp_path / "in"))
    (copy / "model.safetensors").write_bytes(b"an old one")
    assert main(["--prefuse", str(copy), str(tmp_path / "out"), "--quiet"]) in (3, 4)
    assert "model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("turns", [True, False])
def test_batches_hold_each_tensor_once_and_keep_their_files_apart(turns, monkeypatch):
    """Small tensors of a file go to a worker together, as far as a batch goes; a large one goes alone."""
    monkeypatch.setattr(execute, "BATCH", 3)
    monkeypatch.setattr(execute, "BATCH_BYTES", 64)
    targets = make_plan(tiny.run(tiny.memory(QWEN), "prefuse"), Path("out"), "split").targets
    names = [target.spec.name for target in targets]
    files = [
        File(name=name, head=b"", offsets={name: at for at, name in enumerate(own)}, size=0)
        for name, own in (("a", names[::2]), ("b", names[1::2]))
    ]
    tasks = execute._tasks(targets, files, turns=turns)
    assert sorted(target.spec.name for task in tasks for target, _ in task.parts) == sorted(names)
    for task in tasks:
        home = next(file for file in files if file.name == task.file)
        assert [offset for _, offset in task.parts] == [home.offsets[target.spec.name] for target, _ in task.parts]
        assert task.nbytes == sum(target.spec.nbytes for target, _ in task.parts)
        assert len(task.parts) == 1 or (len(task.parts) <= 3 and task.nbytes <= 64)
    assert turns or [target.spec.name for task in tasks for target, _ in task.parts] == names


def test_small_neighbours_are_written_at_once_whatever_they_come_from(tmp_path, monkeypatch):
    """304 tensors in eight files, each of experts' tensors that lie far apart in what they are split from."""
    make(tmp_path / "in", 8, 3)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    put, written = Output.put, list[tuple[int, int]]()
    monkeypatch.setattr(Output, "put", lambda self, data, at: written.append((self.descriptor, at)) or put(self, data, at))
    convert.split(tmp_path / "out", tmp_path / "split", jobs=1)
    assert len(written) == 8
    for path in (tmp_path / "in").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "split" / path.name).read_bytes()


def test_no_step_fails_twice(source, wanted, tmp_path, monkeypatch):
    """Failure after failure, each at a later call: what one run leaves, the next takes up."""
    n = 0
    while not (tmp_path / "out").exists():
        with monkeypatch.context() as patch:
            count_calls(patch, fail_at=n)
            assert prefuse(source, tmp_path / "out") in (0, 6)
        n += 3
    assert contents(tmp_path / "out") == wanted
