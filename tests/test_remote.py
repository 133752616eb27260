"""Orbax checkpoints in an object store are read like those on a disk: from a local server that speaks S3 (moto)."""

from pathlib import Path

import pytest
import tensorstore as ts

import convert
from convert.cli import main
from layouts import places
from layouts.errors import InputError
from scripts.make_checkpoint import make_checkpoint

moto = pytest.importorskip("moto.server")

BUCKET = "checkpoints"


@pytest.fixture(scope="module")
def server():
    """The address of a server with one empty bucket."""
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


@pytest.fixture(scope="module", params=["scanned", "train_state"])
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
    assert convert.verify(remote, tmp_path / "out").equal
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


def test_what_cannot_be_done_is_said(remote, local, tmp_path, capsys, server):
    assert main(["--prefuse", f"s3://{BUCKET}/nothing", str(tmp_path / "out"), "--quiet"]) == 3
    assert "no such directory" in capsys.readouterr().err
    assert main(["--prefuse", str(local), f"s3://{BUCKET}/out", "--quiet"]) == 2
    assert "write to a disk and copy it there" in capsys.readouterr().err
    with pytest.raises(InputError, match="known stores are gs://, s3://"):
        places.place("ftp://host/file")
    spec = {"driver": "s3", "bucket": BUCKET, "path": "hf/", "endpoint": server, "aws_region": "us-east-1"}
    ts.KvStore.open(spec).result().write("model.safetensors", b"x").result()
    assert main(["--prefuse", f"s3://{BUCKET}/hf", str(tmp_path / "out"), "--quiet"]) == 3
    assert "must lie on a disk" in capsys.readouterr().err
