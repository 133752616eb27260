"""Safetensors in a store, out: the bytes of a disk, in parts, complete or absent, taken up again; against a local S3."""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

import convert
from convert.cli import main
from convert.commit.files import Folder
from convert.commit.inventory import read_in_pieces
from convert.commit.processes import ALONE
from convert.commit.store import StoreFolder
from convert.hf import objects as hf_objects
from convert.options import Choices, Running
from convert.run import open_and_plan, writer_of
from layouts.disk import places, upload
from layouts.disk.files import LIMITS, read_bytes
from layouts.errors import InputError
from layouts.side_files import ORIGINALS
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.tiny import adapter, whole
from tests.commit.test_processes import together
from tests.commit.test_remote import BUCKET, client, downloaded, environment, objects, server  # noqa: F401
from tests.orbax.test_computed import save as mixtral

ROOT = Path(__file__).parents[2]
SMALL = {"family": "qwen3_moe", "experts": 2, "embed": 16, "mlp": 16, "layers": 1}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("objects") / "in", **SMALL)


@pytest.fixture
def out(request):
    """A place that no other test uses."""
    return f"s3://{BUCKET}/objects/{abs(hash(request.node.name))}"


@pytest.fixture
def parts(monkeypatch):
    """Parts of 1 kB, which S3 would refuse."""
    monkeypatch.setattr(upload, "PART", 1024)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


def below(place):
    return place.removeprefix(f"s3://{BUCKET}/")


def unfinished(place):
    return client().list_multipart_uploads(Bucket=BUCKET, Prefix=below(place)).get("Uploads", [])


def files(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("limit", ["5GB", pytest.param("6kB", marks=pytest.mark.slow)])
def test_the_objects_are_the_files_of_a_disk(local, out, parts, tmp_path, limit, monkeypatch):
    put, order = places.RemotePath.write_bytes, []
    monkeypatch.setattr(places.RemotePath, "write_bytes", lambda path, data: (order.append(path.name), put(path, data)))
    convert.prefuse(local, out, max_shard_size=limit)
    convert.prefuse(local, tmp_path / "disk", max_shard_size=limit)
    index = ["model.safetensors.index.json"] * (limit == "6kB")
    assert order[-3 - len(index) :] == ["config.json", *index, "convert_manifest.json", "commit_success.txt"]
    there = files(downloaded(f"{below(out)}/", tmp_path / "there"))
    assert there.pop("commit_success.txt")
    assert there == files(tmp_path / "disk")
    assert not unfinished(out)
    assert convert.prefuse(local, out, max_shard_size=limit).proof
    with pytest.raises(convert.OutputError, match=r"max.shard.size"):
        convert.prefuse(local, out, max_shard_size=7000)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["5GB", "6kB"])
def test_there_and_back(local, out, parts, tmp_path, limit):
    convert.prefuse(local, out, max_shard_size=limit)
    assert convert.verify(out).equal
    assert convert.verify(local, out, gemm=False).equal
    convert.split(out, f"{out}-back")
    convert.split(out, tmp_path / "back")
    back = files(downloaded(f"{below(out)}-back/", tmp_path / "stored"))
    for found in (back, files(tmp_path / "back")):
        assert {name: found[name] for name in files(local)} == files(local)
        assert found.keys() - files(local).keys() <= {"convert_manifest.json", "commit_success.txt"}


@pytest.mark.slow
def test_a_tree_becomes_objects(local, out, parts, tmp_path):
    convert.reformat(local, tmp_path / "tree", to="orbax")
    convert.reformat(tmp_path / "tree", out, to="hf")
    there = files(downloaded(f"{below(out)}/", tmp_path / "there"))
    assert {name: there[name] for name in files(local)} == files(local)


CHILD = """
import os, signal, sys
from convert.hf import objects
from layouts.disk import upload
objects.PART = upload.PART = 1024
count, send = [int(sys.argv[1])], upload._Parts.send
def sent(self, data):
    send(self, data)
    count[0] -= 1
    if not count[0]:
        os.kill(os.getpid(), signal.SIGKILL)
upload._Parts.send = sent
from convert.cli import main
sys.exit(main([*sys.argv[2:], "--quiet", "--jobs", "1", "--max-shard-size", "6kB"]))
"""


@pytest.mark.slow
def test_a_killed_run_is_no_checkpoint_and_is_taken_up_again(forks, local, out, parts, tmp_path, capsys):
    assert forks.run(CHILD, 12, "--prefuse", local, out).returncode == -signal.SIGKILL
    names = {name.rpartition("/")[2] for name in objects(f"{below(out)}/")}
    assert any(name.endswith(".safetensors") for name in names)
    assert names.isdisjoint({"config.json", "model.safetensors.index.json", "commit_success.txt"})
    assert len(unfinished(out)) == 1
    for words in (["--inspect", out], ["--verify", str(local), out], ["--split", out, str(tmp_path / "no")]):
        assert main([*words, "--quiet"]) == 3
        assert f"{out}: a conversion into it has not finished" in capsys.readouterr().err
    assert main(["--prefuse", str(local), out, "--layout", "transformers", "--quiet"]) == 5, "another plan must not mix with it"
    done = forks.run(CHILD, 0, "--prefuse", local, out)
    assert done.returncode == 0, done.stderr
    assert "finished by an earlier run" in done.stdout
    assert not unfinished(out)
    assert not objects(f"{below(out)}.partial")
    assert convert.verify(out).equal
    assert convert.verify(local, out, gemm=False).equal


def fails(*words):
    """A command that is refused: its exit code, and its one line."""
    done = subprocess.run(
        [sys.executable, "-m", "convert", *map(str, words), "--quiet"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_store_that_does_not_let_us_is_one_line(local, out, monkeypatch, tmp_path):
    missing = "there is no bucket 'no-such-bucket'; correct its name, AWS_REGION or AWS_ENDPOINT_URL"
    for words, code in (((local, "s3://no-such-bucket/out"), 2), (("s3://no-such-bucket/out", tmp_path / "out"), 3)):
        assert fails("--prefuse", *words) == (code, f"convert: s3://no-such-bucket/out: {missing}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    code, text = fails("--prefuse", local, out)
    assert code == 6
    assert text.startswith(
        "convert: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or make ~/.aws/"
    )
    assert "[" not in text


def test_an_adapter_is_written_to_a_disk(out, tmp_path, capsys):
    given = adapter(tmp_path / "in", whole("per-expert"))
    assert main(["--prefuse", str(given), out, "--quiet"]) == 2
    assert "an adapter is written to a disk" in capsys.readouterr().err


@pytest.mark.parametrize("driver", ["s3", "gcs"])
def test_parts_hold_little_and_follow_one_another(out, parts, monkeypatch, driver):
    """In `gs://` there are no parts: an object is held as a whole, and counted so."""
    there = places.place(out)
    monkeypatch.setitem(there.root.spec, "driver", driver)
    size, parts_of = 10_000, 1024 if driver == "s3" else 10_000
    assert upload.held(there / "x", size) == 2 * parts_of
    assert upload.held(there / "x", 1000) == 2000
    assert upload.held(there / "x", 1024 * 10_000 * 3) == (2 * 1024 * 3 if driver == "s3" else 2 * 1024 * 30_000)
    data = bytes(range(250)) * 40
    with upload.Upload(there / "x", size) as one:
        for start in range(0, size, 3000):
            one.put(memoryview(data[start : start + 3000]), start)
    assert (there / "x").read_bytes() == data
    for then, why in ((5000, "5,000 bytes were written"), (6000, "do not follow")):
        with pytest.raises(ValueError, match=why):
            _broken(there / "y", data, then)
    assert not [name for name in objects(f"{below(out)}/") if name.endswith("/y")]


@pytest.mark.slow
def test_parts_of_originals_that_a_killed_run_has_left_are_removed(out, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_objects, "PART", 1024)
    source = mixtral(tmp_path / "in", "F32")
    left = upload._Parts(places.place(out) / ORIGINALS)
    left.send(b"x" * 1024)
    assert len(unfinished(out)) == 1
    convert.prefuse(source, out, to="orbax", compute="query-scale")
    assert not unfinished(out)
    assert convert.verify(source, out, gemm=False).equal


@pytest.mark.parametrize("driver", ["s3", "gcs"])
def test_originals_are_uploaded_within_the_memory(out, monkeypatch, driver, tmp_path):
    monkeypatch.setattr("convert.orbax.budget.kept_bytes", lambda _: 3 << 30)
    given = mixtral(tmp_path / "in"), places.place(out), "prefuse", Choices(to="orbax", compute="query-scale")
    reader, plan = open_and_plan(*given)
    monkeypatch.setitem(plan.out.root.spec, "driver", driver)
    with closing(reader), pytest.raises(convert.UsageError, match=ORIGINALS) if driver == "gcs" else nullcontext():
        writer_of(plan, reader, Running(memory=6 << 30), ALONE)
    with closing(reader):
        peak = writer_of(plan, reader, Running(memory=7 << 30), ALONE).budget.peak
    assert (6 << 30 < peak <= 7 << 30) if driver == "gcs" else peak < 6 << 30


@pytest.fixture
def pieces(parts, monkeypatch):
    """What is read and written of one object, in pieces of at most 700 bytes and parts of about 1 kB."""
    monkeypatch.setattr("convert.commit.inventory._STEP", 700)
    for module in (places, upload):
        monkeypatch.setattr(module, "PIECE", 700)
    put, send, seen = places.RemotePath.write_bytes, upload._Parts.send, []
    monkeypatch.setattr(places.RemotePath, "write_bytes", lambda path, data: (seen.append(len(data)), put(path, data)))
    monkeypatch.setattr(upload._Parts, "send", lambda own, data: (seen.append(len(data)), send(own, data)))
    return seen


def test_side_files_go_in_parts(out, pieces, tmp_path):
    """From a disk to a store, from there to another place, and back to a disk; what a killed run has left is removed."""
    left = upload._Parts(places.place(out) / "5000")
    left.send(b"x" * 1024)
    with Folder.at(tmp_path / "back", make=True) as back:
        there, again = (StoreFolder(places.place(f"{out}{word}")) for word in ("", "-again"))
        for size in (0, 1, 700, 1024, 1025, 1400, 5000):
            data = bytes(range(250)) * 20
            (tmp_path / "file").write_bytes(data[:size])
            there.copy_in(tmp_path / "file", str(size))
            again.copy_in(there.path / str(size), str(size))
            back.copy_in(again.path / str(size), "copy")
            assert (tmp_path / "back" / "copy").read_bytes() == data[:size]
            assert b"".join(read_in_pieces(again.path / str(size))) == data[:size]
    assert max(pieces) <= 1024 + 700
    assert not unfinished(out)


def test_a_side_file_that_changes_or_fails_leaves_nothing(out, pieces, monkeypatch):
    there = places.place(out)
    (there / "one").write_bytes(b"x" * 5000)
    read = there.pieces

    def changed(path):
        for number, piece in enumerate(read.__func__(path)):
            if number == 2:
                (there / "one").write_bytes(b"y" * 5000)
            yield piece

    monkeypatch.setattr(places.RemotePath, "pieces", changed)
    with pytest.raises(InputError, match="it was written anew while it was read"):
        StoreFolder(there).copy_in(there / "one", "other")
    assert not unfinished(out)
    assert not (there.listed_anew() / "other").is_file()


@pytest.mark.parametrize("to", ["orbax", None])
@pytest.mark.parametrize("driver", ["s3", "gcs"])
def test_side_files_are_uploaded_within_the_memory(local, out, monkeypatch, driver, to, tmp_path):
    source = shutil.copytree(local, tmp_path / "in")
    with (source / "notes.txt").open("wb") as file:
        file.truncate(3 << 30)  # a hole
    reader, plan = open_and_plan(source, places.place(out), "prefuse", Choices(to=to))
    monkeypatch.setitem(plan.out.root.spec, "driver", driver)
    with closing(reader), pytest.raises(convert.UsageError, match="is too little") if driver == "gcs" else nullcontext():
        writer_of(plan, reader, Running(memory=6 << 30, jobs=1), ALONE)
    with closing(reader):
        peak = writer_of(plan, reader, Running(memory=7 << 30, jobs=1), ALONE).budget.peak
    assert (6 << 30 < peak <= 7 << 30) if driver == "gcs" else peak < 1 << 30


def test_of_objects_sizes_are_found_and_limited(out, pieces, monkeypatch):
    """What lists a store says nothing of sizes."""
    there = places.place(out)
    (there / "config.json").write_bytes(b"{}" + b" " * 5000)
    assert upload.held_by_pieces(there, {there / "config.json": 0}) == 2 * (1024 + 700)
    monkeypatch.setitem(there.root.spec, "driver", "gcs")
    assert upload.held_by_pieces(there, {there / "config.json": 0}) == 2 * (700 * 8 + 700)
    assert read_bytes(there / "config.json") == b"{}" + b" " * 5000
    monkeypatch.setitem(LIMITS, "config.json", 5001)
    with pytest.raises(InputError, match="more than 5,001 bytes"):
        read_bytes(there / "config.json")


@pytest.mark.parametrize("end", [1e999, 10**30, 2**63 - 1, -100_000, "4", None])
def test_an_object_whose_header_tells_odd_offsets_is_refused(out, capsys, end):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, end]}}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    client().put_object(Bucket=BUCKET, Key=f"{below(out)}/model.safetensors", Body=data)
    assert main(["--inspect", out]) == 3
    assert "model.safetensors: not a sound safetensors file" in capsys.readouterr().err


def test_notes_that_are_none_do_not_count(local, out, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        broken.setattr(hf_objects, "_write", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert main(["--prefuse", str(local), out, "--quiet"]) == 6
    (home,) = {name.partition("/run")[0] for name in objects(f"{below(out)}.partial")}
    notes = (b"\xff\xfe", b"[1]", b'[["a", 1]]', b'{"lm_head.weight": 1}', b"[" * 100_000, b"")
    for number, note in enumerate(notes):
        client().put_object(Bucket=BUCKET, Key=f"{home}/journal/{number}.json", Body=note)
    client().put_object(Bucket=BUCKET, Key=f"{home}/run", Body=b"\xff\xfe")
    assert main(["--prefuse", str(local), out, "--quiet"]) == 0
    assert "resumed" not in capsys.readouterr().out
    assert convert.verify(out).equal
    client().put_object(Bucket=BUCKET, Key=f"{below(out)}/commit_success.txt", Body=b"\xff\xfe")
    assert main(["--prefuse", str(local), out, "--quiet"]) == 0


def _broken(path, data, then):
    """An object that is cut, or has a gap."""
    with upload.Upload(path, len(data)) as one:
        one.put(memoryview(data[:2500]), 0)
        one.put(memoryview(data[:2500]), then - 2500)


@pytest.mark.slow
def test_of_two_runs_the_later_one_goes_on(local, out, parts, monkeypatch):
    write = hf_objects._write

    def meanwhile(*given):
        monkeypatch.setattr(hf_objects, "_write", write)
        convert.prefuse(local, out)
        return write(*given)

    monkeypatch.setattr(hf_objects, "_write", meanwhile)
    with pytest.raises(convert.OutputError, match="another run has begun to write it"):
        convert.prefuse(local, out)
    assert convert.verify(out).equal


@pytest.mark.slow
def test_several_processes_write_objects(forks, local, out, parts):
    assert together(forks, 2, "--prefuse", local, out, "--max-shard-size", "2000")[0] == [0, 0]
    assert convert.verify(out).equal
    assert convert.verify(local, out, gemm=False).equal
