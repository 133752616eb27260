"""The output is absent or complete: existing outputs, locks, resumption, full disks, the order of system calls."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest

import convert
from convert.cli import main
from convert.commit import journal, publish, stage
from convert.engine import copying, direct
from convert.hf import execute
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source") / "in", family="qwen3_moe", experts=3, layers=2, shard=60_000)


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory) -> dict[str, bytes]:
    convert.prefuse(source, tmp_path_factory.mktemp("wanted") / "out", max_shard_size=60_000)
    return contents(tmp_path_factory.getbasetemp() / "wanted0" / "out")


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def partials(folder: Path) -> list[Path]:
    return list(folder.glob("*.partial-*"))


def prefuse(source: Path, out: Path, *options: str) -> int:
    return main(["--prefuse", str(source), str(out), "--quiet", "--max-shard-size", "60000", *options])


@pytest.mark.parametrize("jobs", ["1", "4"])
def test_the_same_bytes_for_any_number_of_workers(source, wanted, tmp_path, jobs):
    assert prefuse(source, tmp_path / "out", "--jobs", jobs) == 0
    assert contents(tmp_path / "out") == wanted
    assert os.listdir(tmp_path) == ["out"]
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 2


@pytest.mark.parametrize("old", ["directory", "file", "dangling link"])
def test_an_existing_output_is_refused_and_kept(source, tmp_path, capsys, old):
    out = tmp_path / "out"
    {"directory": out.mkdir, "file": out.touch, "dangling link": lambda: out.symlink_to("nowhere")}[old]()
    assert prefuse(source, out) == 5
    said = {"directory": "exists already", "file": "is no directory", "dangling link": "is a link"}
    assert said[old] in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("out", [".", "inside", "..", "../link/inside"])
def test_input_and_output_must_not_contain_one_another(source, tmp_path, capsys, out):
    copy = shutil.copytree(source, tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = contents(tmp_path)
    assert prefuse(copy, copy / out) == 5
    assert "must not contain one another" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_overwrite_keeps_the_old_output_until_the_new_one_is_complete(source, wanted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    seen = []
    shown = stage.publish
    monkeypatch.setattr(stage, "publish", lambda *a, **k: (seen.append(contents(out)), shown(*a, **k)))
    assert prefuse(source, out, "--overwrite") == 0
    assert seen == [{"model.safetensors": b"old"}]
    assert contents(out) == wanted
    assert os.listdir(tmp_path) == ["out"]


def test_a_second_run_is_kept_off_by_a_lock(source, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "_preallocate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    assert prefuse(source, tmp_path / "out") == 6
    monkeypatch.undo()
    (stage,) = partials(tmp_path)
    directory = os.open(stage, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    assert prefuse(source, tmp_path / "out") == 5
    assert "in use by another run" in capsys.readouterr().err
    os.close(directory)
    assert prefuse(source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == wanted


CALLS = ("posix_fallocate", "pwrite", "copy_file_range", "fsync", "rename")


def test_every_call_that_can_meet_a_full_disk_may(source, wanted, disk, monkeypatch, capsys):
    """The n-th system call fails, for every n: exit 6, no output; the same command again ends in the same bytes."""
    monkeypatch.setattr(direct, "LEAST", direct.PAGE)  # so that these small blocks go past the page cache, too
    source = shutil.copytree(source, disk / "in")
    n, failures = 0, 0
    while True:
        out = disk / str(n) / "out"
        out.parent.mkdir()
        with monkeypatch.context() as patch:
            calls = count_calls(patch, fail_at=n)
            code = prefuse(source, out)
        if calls["count"] <= n:
            break
        failures += 1
        assert code == 6, (n, capsys.readouterr().err)
        assert "No space left on device" in capsys.readouterr().err
        if not out.exists():  # the last sync comes after the rename: then the output is there, and complete
            assert prefuse(source, out) == 0
        assert contents(out) == wanted, n
        n += 1
    assert failures > 20


def count_calls(patch, fail_at: int) -> dict[str, int]:
    calls = {"count": 0}

    def wrap(real):
        def call(*arguments, **keywords):
            calls["count"] += 1
            if calls["count"] == fail_at + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **keywords)

        return call

    for name in CALLS:
        patch.setattr(os, name, wrap(getattr(os, name)))
    return calls


def test_finished_tensors_are_not_written_again(source, wanted, tmp_path, monkeypatch):
    real, written = execute.write_tensor, []

    def fail_later(target, *rest):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "full")
        written.append(target.spec.name)
        return real(target, *rest)

    monkeypatch.setattr(copying, "SHORT", 0)  # each tensor by itself
    monkeypatch.setattr(execute, "write_tensor", fail_later)
    assert prefuse(source, tmp_path / "out", "--jobs", "1") == 6
    (stage,) = partials(tmp_path)
    journalled = {}
    for line in (stage / journal.NAME).read_text().splitlines()[1:]:
        journalled |= json.loads(line)
    assert sorted(name for name in journalled if not name.startswith(execute.SOURCE)) == sorted(written)
    again = []
    monkeypatch.setattr(execute, "write_tensor", lambda target, *rest: (again.append(target.spec.name), real(target, *rest))[1])
    report = convert.prefuse(source, tmp_path / "out", max_shard_size=60_000)
    assert report.resumed == 5, "sources, which are journalled, too, are no tensors of the output"
    assert not set(again) & set(written)
    assert contents(tmp_path / "out") == wanted


def test_no_resume_begins_anew(source, wanted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        count_calls(patch, fail_at=20)
        assert prefuse(source, tmp_path / "out") == 6
    (stage,) = partials(tmp_path)
    (stage / "rubbish").write_text("not ours")
    assert prefuse(source, tmp_path / "out", "--no-resume") == 0
    assert contents(tmp_path / "out") == wanted


def test_a_changed_input_is_not_mixed_with_an_old_run(source, tmp_path, monkeypatch):
    copy = shutil.copytree(source, tmp_path / "in")
    with monkeypatch.context() as patch:
        count_calls(patch, fail_at=20)
        assert prefuse(copy, tmp_path / "out") == 6
    os.utime(next(copy.glob("*.safetensors")), (0, 0))
    assert prefuse(copy, tmp_path / "out") == 0
    assert len(partials(tmp_path)) == 1, "the old run's files are the user's to remove"


def test_data_is_durable_before_the_journal_and_all_before_the_rename(source, tmp_path, monkeypatch):
    log = []
    sync, rename, record = os.fsync, os.rename, stage.Stage.record

    def note(descriptor):
        log.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", lambda *a, **k: (log.append("rename"), rename(*a, **k)))
    monkeypatch.setattr(stage.Stage, "record", lambda self, done: (log.append("journal"), record(self, done)))
    assert prefuse(source, tmp_path / "out") == 0
    shards = {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    assert shards <= set(log[: log.index("journal")])
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    assert {file.name for file in (tmp_path / "out").rglob("*") if file.is_file()} <= set(before)
    assert stage.NEW in before[-3:], "the directory is synced before it is shown"
    assert after == [tmp_path.name], "and the rename itself is synced"


def test_a_run_with_other_options_for_the_same_output_is_kept_off_too(source, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(execute, "_preallocate", lambda *_: os.close(-1))
    assert prefuse(source, tmp_path / "out", "--layout", "transformers") == 6
    monkeypatch.undo()
    (other,) = partials(tmp_path)
    directory = os.open(other, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    assert prefuse(source, tmp_path / "out") == 5
    assert "in use by another run that writes" in capsys.readouterr().err
    os.close(directory)
    assert prefuse(source, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("old", ["empty", "safetensors", "index", "orbax"])
def test_overwrite_replaces_a_checkpoint(source, wanted, tmp_path, monkeypatch, old, exchange):
    if not exchange:
        monkeypatch.setattr(publish, "exchange", lambda *_: False)
    out = tmp_path / "out"
    out.mkdir()
    if old != "empty":
        file = {"safetensors": "x.safetensors", "index": "model.safetensors.index.json", "orbax": "0/items/_METADATA"}[old]
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("old")
    assert prefuse(source, out, "--overwrite") == 0
    assert contents(out) == wanted
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("old", ["file", "link", "dangling link", "other directory", "several checkpoints"])
def test_overwrite_replaces_nothing_else(source, tmp_path, capsys, old):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(source, elsewhere)
    if old == "file":
        out.write_text("mine")
    elif old.endswith("link"):
        out.symlink_to("elsewhere" if old == "link" else "nowhere")
    else:
        for name in ["letters/first"] if old == "other directory" else ["0/items/_METADATA", "1/items/_METADATA"]:
            (out / name).parent.mkdir(parents=True)
            (out / name).write_text("mine")
    before = contents(tmp_path)
    assert prefuse(source, out, "--overwrite") == 5
    assert "--overwrite replaces only a checkpoint" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_takes_the_old_outputs_place_meanwhile_is_put_back(source, tmp_path, monkeypatch, capsys, exchange):
    out = tmp_path / "out"
    shutil.copytree(source, out)
    real, calls = publish.exchange, []

    def late(*names):  # between the last look and the rename
        if not calls:
            shutil.rmtree(out)
            out.mkdir()
            (out / "mine").write_text("mine")
        calls.append(names)
        return exchange and real(*names)

    monkeypatch.setattr(publish, "exchange", late)
    assert prefuse(source, out, "--overwrite") == 5
    assert "has changed while this run was working" in capsys.readouterr().err
    assert contents(out) == {"mine": b"mine"}
    (kept,) = partials(tmp_path)
    assert (kept / "new" / "convert_manifest.json").exists()


def test_an_old_output_left_in_the_stage_is_not_taken_for_the_new_one(source, wanted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    monkeypatch.setattr(stage, "discard", lambda *_: None)
    assert prefuse(source, out, "--overwrite") == 0
    monkeypatch.undo()
    assert contents(partials(tmp_path)[0] / "new") == {"model.safetensors": b"old"}, (
        "as if killed between the exchange and the removal"
    )
    assert prefuse(source, out, "--overwrite") == 0
    assert contents(out) == wanted
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_kept(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shown = stage.publish
    monkeypatch.setattr(stage, "publish", lambda *a, **k: (out.mkdir(), (out / "mine").touch(), shown(*a, **k)))
    assert prefuse(source, out) == 5
    assert "has appeared" in capsys.readouterr().err
    assert os.listdir(out) == ["mine"]
