"""`gs://`, in and out, against a local server with the calls of its API: no account is needed."""

import signal
import threading

import pytest

import convert
from convert.cli import main
from scripts.make_checkpoint import make_checkpoint
from tests.commit.gcs import BUCKET, Server
from tests.tiny import tree


@pytest.fixture(scope="module")
def server():
    found = Server()
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{found.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield found
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture
def local(tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=2)
    return tmp_path / "in"


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_there_and_back(server, local, tmp_path, form):
    there = f"gs://{BUCKET}/runs/{form}"
    convert.prefuse(local, there, to="orbax" if form == "orbax" else None)
    assert f"runs/{form}/commit_success.txt" in server.objects or form == "orbax"
    assert convert.verify(local, there, gemm=False).equal
    assert convert.verify(there).equal
    assert not any(line.endswith(" 0 B") for line in str(convert.inspect(there)).splitlines()), "a store tells no sizes"
    assert convert.digest(there).model == convert.digest(local).model
    convert.split(there, tmp_path / "back", to="hf" if form == "orbax" else None)
    back = tree(tmp_path / "back")
    assert back.pop("convert_manifest.json")
    assert back == tree(local)
    before = dict(server.objects)
    assert not convert.prefuse(local, there, to="orbax" if form == "orbax" else None).written
    assert server.objects == before


def test_a_run_that_stops_is_taken_up_again(server, local, monkeypatch):
    there = f"gs://{BUCKET}/stopped"
    seen = []

    def stop(done: int) -> None:
        seen.append(done)
        if len(seen) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.prefuse(local, there, max_shard_size="200", jobs=1, progress=stop)
    with pytest.raises(convert.InputError):
        convert.inspect(there)
    assert convert.prefuse(local, there, max_shard_size="200").written
    assert convert.verify(local, there, gemm=False).equal


CHILD = "import sys\nfrom convert.cli import main\nsys.exit(main(sys.argv[1:]))"


def killed(server, forks, local, there, form, at):
    """Whether a conversion ended at the write with this number: it left no checkpoint or a whole one, and is taken up again."""
    command = ("--prefuse", local, there, "--to", form, "--quiet", "--jobs", "1")
    server.written = 0
    running = forks.start(CHILD, *command)
    server.kill = running[0], at
    ended = forks.end(*running)
    server.kill = None
    if ended.returncode == 0:
        return False
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert main(["--inspect", there, "--quiet"]) == 3 or convert.verify(local, there, gemm=False).equal, at
    again = forks.run(CHILD, *command)
    assert again.returncode == 0, (at, again.stderr)
    assert convert.verify(there).equal
    assert convert.verify(local, there, gemm=False).equal
    assert [name for name in server.objects if ".partial" in name] == []
    return True


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_killed_run_is_taken_up_again(server, forks, local, form):
    assert killed(server, forks, local, f"gs://{BUCKET}/killed/{form}", form, 6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_killed_at_every_write(server, forks, local, form):
    at = 1
    while killed(server, forks, local, f"gs://{BUCKET}/every/{form}/{at}", form, at):
        at += 1
    assert at > 10, "it writes more objects than that"


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["--prefuse", "{in}", "gs://bucket-2/out"], "there is no bucket 'bucket-2'; correct its name\n", 2),
        (["--prefuse", "gs://B/in", "{in}-out"], "'B' is no name of a bucket; correct it\n", 3),
        (["--prefuse", "{in}", "gs://B/out"], "'B' is no name of a bucket; correct it\n", 2),
        (["--inspect", "gs://bucket-2/in"], "no such directory", 3),
        (["--inspect", "gs://B/in"], "'B' is no name of a bucket; correct it\n", 3),
    ],
)
def test_a_wrong_bucket_is_one_sentence(server, local, words, said, code, capsys):
    assert main([word.replace("{in}", str(local)) for word in words]) == code
    assert said in capsys.readouterr().err
