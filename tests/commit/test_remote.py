"""Checkpoints in a store are read, and Orbax ones written, like those on a disk: a local server speaks S3 (moto)."""

import json
import os
import signal
from functools import cache
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

import convert
from convert.cli import main
from layouts.disk import buckets, places
from layouts.disk.stored import StoredFile
from layouts.errors import InputError
from layouts.orbax import tree
from scripts.make_checkpoint import make_checkpoint

BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def server():
    """The address of a server with one empty bucket."""
    moto = pytest.importorskip("moto.server")  # a second of imports for those who run other tests
    import boto3

    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    address = "http://{}:{}".format(*running.get_host_and_port())
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket=BUCKET)
    yield address
    running.stop()


@pytest.fixture(autouse=True)
def environment(server, monkeypatch):
    words = {
        "AWS_ENDPOINT_URL": server,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }
    for name, value in words.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module", params=["scanned", pytest.param("train_state", marks=pytest.mark.slow)])
def local(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("remote") / request.param
    make_checkpoint(path, family="mixtral", format="orbax", train_state=request.param == "train_state")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def remote(local, environment, server) -> str:
    spec = {"driver": "s3", "bucket": BUCKET, "path": f"runs/{local.name}/", "endpoint": server, "aws_region": "us-east-1"}
    store = ts.KvStore.open(spec).result()
    for file in local.rglob("*"):
        if file.is_file():
            store.write(file.relative_to(local).as_posix(), file.read_bytes()).result()
    return f"s3://{BUCKET}/runs/{local.name}"


def test_a_checkpoint_in_a_store_is_prefused_and_verified(local, remote, tmp_path):
    assert main(["--prefuse", remote, str(tmp_path / "out"), "--quiet"]) == 0
    convert.prefuse(local, tmp_path / "same")
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(remote, tmp_path / "out", gemm=False).equal
    assert convert.verify(tmp_path / "same", tmp_path / "out", gemm=False).equal
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    names = [[name for name, _, _ in places.files_of(tmp_path / each) if "/d/" not in name] for each in ("out", "same")]
    assert {name for name in names[0] if "process" not in name} == {name for name in names[1] if "process" not in name}


def test_the_plan_of_a_checkpoint_in_a_store(remote, tmp_path, capsys):
    assert main(["--prefuse", remote, str(tmp_path / "out"), "--dry-run"]) == 0
    assert f"prefuse  {remote} (maxtext)" in capsys.readouterr().out


def test_a_path_reads_like_a_directory(local, remote):
    there = places.place(remote)
    assert [path.name for path in there.iterdir()] == sorted(path.name for path in local.iterdir())
    assert sorted(path.name for path in there.glob("token*")) == ["tokenizer.json"]
    assert there.is_dir()
    assert not there.is_file()
    assert not (there / "nothing").exists()
    assert str(there / "a" / "b") == f"{remote}/a/b"
    assert [name for name, _, _ in places.files_of(there)] == sorted(name for name, _, _ in places.files_of(local))
    with pytest.raises(FileNotFoundError, match="no such object"):
        (there / "nothing").read_text()


def test_what_cannot_be_done_is_said(remote, local, tmp_path, capsys):
    assert main(["--prefuse", f"s3://{BUCKET}/nothing", str(tmp_path / "out"), "--quiet"]) == 3
    assert "no such directory" in capsys.readouterr().err
    assert main(["--prefuse", str(local), f"s3://{BUCKET}/out-2", "--overwrite", "--quiet"]) == 2
    assert "nothing can be replaced at once" in capsys.readouterr().err
    assert main(["--prefuse", str(local), f"s3://{BUCKET}", "--quiet"]) == 2
    assert "give the place of a new checkpoint in a bucket" in capsys.readouterr().err
    assert main(["--prefuse", remote, f"{remote}/out", "--quiet"]) == 5
    assert "must not contain one another" in capsys.readouterr().err
    with pytest.raises(InputError, match="the stores that are known are gs:// and s3://"):
        places.place("az://host/file")


CHILD = """
import os, signal, sys
from convert.hf import execute
from convert.orbax import write as write_orbax
from convert.commit.store import StoreStage
execute.SYNC = write_orbax.SYNC = 30_000  # many batches
record, notes = StoreStage.record, []
def last(self, digests):
    record(self, digests)
    notes.append(1)
    if len(notes) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "kill":
    StoreStage.record = last
from convert.cli import main
sys.exit(main([*sys.argv[2:], "--quiet"]))
"""


def client():
    return client_of(os.environ["AWS_ENDPOINT_URL"])


@cache  # making one takes longer than most requests
def client_of(address):
    import boto3

    return boto3.client("s3", endpoint_url=address)


def objects(prefix):
    """The names of all objects."""
    return [entry["Key"] for entry in client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]


def downloaded(prefix, path) -> Path:
    for key in objects(prefix):
        file = path / key.removeprefix(prefix)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(client().get_object(Bucket=BUCKET, Key=key)["Body"].read())
    return path


def restored(item):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(item)


@pytest.fixture
def fresh(request):
    """A prefix that no other test uses."""
    return f"out/{abs(hash(request.node.name))}"


def test_an_orbax_checkpoint_is_written_to_a_store(local, remote, fresh, tmp_path):
    """From a disk and from a store: the same as on a disk, and Orbax restores what is downloaded."""
    convert.prefuse(local, tmp_path / "same")
    for number, source in enumerate((local, remote)):
        out = f"s3://{BUCKET}/{fresh}-{number}"
        assert main(["--prefuse", str(source), out, "--quiet"]) == 0
        assert convert.verify(out).equal
        assert convert.verify(source, out, gemm=False).equal
        assert convert.verify(tmp_path / "same", out, gemm=False).equal
        there = downloaded(f"{fresh}-{number}/", tmp_path / str(number))
        step = next(path for path in there.iterdir() if path.is_dir())
        one, other = restored(step / "items"), restored(tmp_path / "same" / step.name / "items")
        flat, same = (ocp.tree.to_flat_dict(tree) for tree in (one, other))
        assert flat.keys() == same.keys()
        assert all(np.asarray(flat[key]).tobytes() == np.asarray(same[key]).tobytes() for key in flat)
        assert (there / "tokenizer.json").read_text() == "{}"
        for marker in (there, step, step / "items"):
            assert (marker / "commit_success.txt").is_file()
    assert not objects(f"{fresh}-0.partial")


def test_from_hugging_face_to_a_store_and_back(server, fresh, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "in", family="qwen3_moe")
    out, put, order = f"s3://{BUCKET}/{fresh}", places.RemotePath.write_bytes, []
    monkeypatch.setattr(places.RemotePath, "write_bytes", lambda path, data: (order.append(str(path)), put(path, data)))
    assert convert.prefuse(tmp_path / "in", out, to="orbax").written
    steps = ("/0/items/_METADATA", "/0/items/commit_success.txt", "/0/commit_success.txt", "/commit_success.txt")
    assert order[-4:] == [f"{out}{name}" for name in steps]
    assert not convert.prefuse(tmp_path / "in", out, to="orbax").written, "the same again finds its work done"
    assert convert.verify(tmp_path / "in", out, gemm=False).equal
    convert.split(out, tmp_path / "again", to="hf")
    for file in (tmp_path / "in").glob("*.safetensors"):
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(convert.OutputError, match="exists already and was not made by this plan"):
        convert.reformat(tmp_path / "in", out, to="orbax")


def test_a_killed_run_leaves_no_checkpoint_and_is_taken_up_again(server, forks, fresh, tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe")
    command = ("--prefuse", "--to", "orbax", tmp_path / "in", f"s3://{BUCKET}/{fresh}")
    assert forks.run(CHILD, "kill", *command).returncode == -signal.SIGKILL
    written = objects(f"{fresh}/")
    assert written
    assert not any(name.endswith(("_METADATA", "commit_success.txt")) for name in written)
    assert main(["--verify", str(tmp_path / "in"), f"s3://{BUCKET}/{fresh}", "--quiet"]) == 3
    other = forks.run(CHILD, "", "--to", "orbax", tmp_path / "in", f"s3://{BUCKET}/{fresh}")
    assert other.returncode == 5, "another plan must not mix with it"
    again = forks.run(CHILD, "", *command)
    assert again.returncode == 0, again.stderr
    assert "finished by an earlier run" in again.stdout
    assert convert.verify(tmp_path / "in", f"s3://{BUCKET}/{fresh}", gemm=False).equal
    assert convert.verify(f"s3://{BUCKET}/{fresh}").equal
    assert f"{fresh}/commit_success.txt" in objects(f"{fresh}/")
    assert not objects(f"{fresh}.partial")


def test_a_run_that_ended_while_it_published_is_taken_up_again(server, fresh, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "in", family="qwen3_moe")
    out, put = f"s3://{BUCKET}/{fresh}", places.RemotePath.write_bytes

    def end(path, data):
        if str(path) == f"{out}/commit_success.txt":
            raise OSError(5, "gone")
        assert path.name != "manifest.ocdbt"
        put(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(places.RemotePath, "write_bytes", end)
        with pytest.raises(convert.StorageError, match="is no checkpoint; run the same command again"):
            convert.prefuse(tmp_path / "in", out, to="orbax")
    seen = []

    def look(path, data):
        seen.extend(name for name in objects(f"{fresh}/") if path.name == "run" and name.endswith(("/_METADATA", ".txt")))
        put(path, data)

    monkeypatch.setattr(places.RemotePath, "write_bytes", look)
    assert convert.prefuse(tmp_path / "in", out, to="orbax").resumed
    assert not seen, "before anything is written again, it is no checkpoint any more"
    assert convert.verify(out).equal
    assert not objects(f"{fresh}.partial")


def test_what_orbax_has_not_finished_in_gcs_is_no_input():
    def item(*files):
        root = buckets.Root(text="gs://bucket/7", spec={}, store=None, files=set(files))
        return places.RemotePath(root, "items")

    tree.check_finished(item("items/_METADATA", "commit_success.txt"))
    tree.check_finished(item("items/_METADATA", "items/commit_success.txt"))
    with pytest.raises(InputError, match="has not finished"):
        tree.check_finished(item("items/_METADATA"))


def test_of_two_runs_the_later_one_goes_on(server, fresh, tmp_path, monkeypatch):
    """There are no locks in a store: who began last writes, and who sees that stops."""
    from convert.commit import store

    make_checkpoint(tmp_path / "in", family="qwen3_moe")
    out, record = f"s3://{BUCKET}/{fresh}", store.StoreStage.record

    def meanwhile(self, digests):
        monkeypatch.setattr(store.StoreStage, "record", record)
        convert.prefuse(tmp_path / "in", out, to="orbax")
        record(self, digests)

    monkeypatch.setattr(store.StoreStage, "record", meanwhile)
    with pytest.raises(convert.OutputError, match="another run has begun to write it"):
        convert.prefuse(tmp_path / "in", out, to="orbax")
    assert convert.verify(tmp_path / "in", out, gemm=False).equal
    assert convert.verify(out).equal


@pytest.mark.slow
def test_several_processes_write_to_a_store(server, forks, fresh, tmp_path):
    from tests.commit.test_processes import together

    make_checkpoint(tmp_path / "in", family="qwen3_moe", values="identity")
    arguments = ("--prefuse", "--to", "orbax", tmp_path / "in", f"s3://{BUCKET}/{fresh}")
    assert together(forks, 2, *arguments)[0] == [0, 0]
    assert convert.verify(f"s3://{BUCKET}/{fresh}").equal
    assert convert.verify(tmp_path / "in", f"s3://{BUCKET}/{fresh}", gemm=False).equal
    manifest = json.loads(client().get_object(Bucket=BUCKET, Key=f"{fresh}/convert_manifest.json")["Body"].read())
    assert len(manifest["tensors"]["params.params.decoder.layers.moe_block.wi"]["xxh3_128"]) == 12


@pytest.fixture
def shards(server, fresh, tmp_path):
    """A checkpoint of Hugging Face, on a disk and in a store."""
    local = make_checkpoint(tmp_path / "hf", family="qwen3_moe")
    for file in filter(Path.is_file, local.rglob("*")):
        client().put_object(Bucket=BUCKET, Key=f"{fresh}/{file.relative_to(local).as_posix()}", Body=file.read_bytes())
    return local, f"s3://{BUCKET}/{fresh}"


STORED = [["--prefuse", "--layout", "interleaved"], ["--to", "orbax"]]


@pytest.mark.parametrize("words", [["--prefuse"], *(pytest.param(w, marks=pytest.mark.slow) for w in STORED)], ids=" ".join)
def test_safetensors_are_read_from_a_store_as_from_a_disk(shards, words, tmp_path, capsys):
    local, remote = shards
    for source, out in ((local, "same"), (remote, "out")):
        assert main([*words, str(source), str(tmp_path / out), "--quiet"]) == 0, capsys.readouterr().err
    assert convert.digest(tmp_path / "out").model == convert.digest(remote).model
    assert convert.verify(remote, tmp_path / "out").equal
    back = ["--split"] if "--prefuse" in words else ["--to", "hf"]
    assert main([*back, str(tmp_path / "out"), str(tmp_path / "again"), "--quiet"]) == 0
    for file in filter(Path.is_file, local.rglob("*")):
        assert (tmp_path / "again" / file.relative_to(local)).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda data: data[:-3], "its header says that it has"),
        (lambda data: data + b"more", "its header says that it has"),
        (lambda data: data[:5], "not a sound safetensors file"),
        (lambda data: b"\xff" * 8 + data[8:], "its header has"),
        (lambda data: data[:8] + b"[" + data[9:], "not a sound safetensors file"),
    ],
    ids=["cut", "longer", "no header", "a huge header", "no JSON"],
)
def test_a_damaged_object_is_named(shards, change, text, tmp_path, capsys):
    local, remote = shards
    file = min(local.glob("*.safetensors"))
    bucket, _, prefix = remote.removeprefix("s3://").partition("/")
    client().put_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Body=change(file.read_bytes()))
    assert main(["--prefuse", remote, str(tmp_path / "out"), "--quiet"]) == 3
    error = capsys.readouterr().err
    assert text in error
    assert f"{remote}/{file.name}" in error
    assert len(error) < 400


def test_an_object_that_is_written_anew_is_not_mixed(shards, tmp_path):
    local, remote = shards
    file = min(local.glob("*.safetensors"))
    bucket, _, prefix = remote.removeprefix("s3://").partition("/")
    opened = StoredFile.open(places.place(remote) / file.name)
    client().put_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Body=file.read_bytes()[::-1])
    with pytest.raises(InputError, match="written anew"):
        opened.read(memoryview(bytearray(9)), 0)
