"""Several processes make what one makes; one that fails or dies leaves nothing half visible, and the run can be repeated."""

import fcntl
import json
import signal
import socket
from functools import partial

import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
from convert.cli import main
from convert.commit.processes import share
from scripts.make_checkpoint import make_checkpoint

CHILD = """
import os, signal, sys
import jax
from convert.hf import execute
from convert.orbax import chunks, copy as orbax_copy, write as write_orbax
from convert.cli import main

execute.SYNC = write_orbax.SYNC = orbax_copy.SYNC = 30_000  # many batches
chunks._CRUMB = 4096  # many portions
if os.environ.get("ANEW"):
    write_orbax.keep = lambda plan, reader: None
coordinator, count, index, end, silent = sys.argv[1:6]
if int(count) > 1:
    jax.distributed.initialize(coordinator, int(count), int(index), heartbeat_timeout_seconds=int(silent))
if end:
    from convert.commit.stage import Stage
    record = Stage.record

    def last(self, digests):
        record(self, digests)
        if end == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(28, "No space left on device")

    Stage.record = last
sys.exit(main([*sys.argv[6:], "--quiet", *(["--distributed"] if int(count) > 1 else [])]))
"""
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def run(forks):
    return partial(together, forks)


def together(forks, count, *arguments, ends=(), options=()):
    """Exit codes and what was written to stderr, of `count` processes that run the command together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    children, ends = [], dict(ends)
    silent = 8 if "kill" in ends.values() else 100  # seconds after which JAX gives one up; a busy machine is silent for some
    for index in range(count):
        own = [address, count, index, ends.get(index, ""), silent, *arguments, *dict(options).get(index, ())]
        children.append(forks.start(CHILD, *own))
    ended = [forks.end(*child) for child in children]
    return [child.returncode for child in ended], [child.stderr for child in ended]


NAMED = ("files", "xxh3_128")
"""What a manifest says of files, some of which have random names, and its digest of itself."""


def contents(folder):
    """Every file with its bytes; databases have random names, so of Orbax only what is above them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if "ocdbt" not in str(path) and path.parent.name != "d"]
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    if "convert_manifest.json" in found and list(folder.rglob("manifest.ocdbt")):  # it names these files, too
        manifest = json.loads(found["convert_manifest.json"])
        found["convert_manifest.json"] = json.dumps(
            {key: value for key, value in manifest.items() if key not in NAMED}
        ).encode()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return make_checkpoint(root / "in", family="qwen3_moe", values="identity")


@pytest.fixture(scope="module")
def tree(run, source):
    path = source.with_name("tree")
    assert run(1, "--to", "orbax", source, path)[0] == [0]
    return path


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=SLOW)])
def test_safetensors_by_several_processes(run, source, tmp_path, count):
    arguments = ("--max-shard-size", "60kB")
    assert main(["--prefuse", str(source), str(tmp_path / "alone"), "--quiet", *arguments]) == 0
    assert run(count, "--prefuse", source, tmp_path / "out", *arguments) == ([0] * count, [""] * count)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert run(count, "--split", tmp_path / "out", tmp_path / "back")[0] == [0] * count
    back = {name: data for name, data in contents(tmp_path / "back").items() if name != "convert_manifest.json"}
    assert back == contents(source)
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize(
    ("count", "kind"), [(2, "source"), pytest.param(4, "source", marks=SLOW), pytest.param(3, "tree", marks=SLOW)]
)
def test_orbax_by_several_processes(run, source, tree, tmp_path, count, kind):
    """Arrays in portions; from a tree, the files of a database are copied and renamed."""
    arguments = ("--prefuse", {"source": source, "tree": tree}[kind])
    to = ("--to", "orbax") if kind == "source" else ()
    assert run(1, *arguments, tmp_path / "alone", *to)[0] == [0]
    assert run(count, *arguments, tmp_path / "out", *to) == ([0] * count, [""] * count)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    manifest = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
    wi = manifest["tensors"]["params.params.decoder.layers.moe_block.wi"]
    assert list(wi["xxh3_128"]) == [f"{e}:{e + 1}" for e in range(12)]
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(source, tmp_path / "out", gemm=False).equal
    levels = convert.verify(source, tmp_path / "out", gemm=False).levels
    assert [level.name for level in levels] == ["exact", "others", "files", "recorded"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tree with a directory for each array, chunks of four experts."""
    path = tmp_path_factory.mktemp("folders") / "in"
    rng = np.random.default_rng(0)
    shapes = {"wi_0": (64, 2, 32, 24), "wi_1": (64, 2, 32, 24), "wo": (64, 2, 24, 32)}
    moe = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tree = {"params": {"params": {"decoder": {"layers": {"moe_block": moe}}}}}
    chunked = ocp.tree.from_flat_dict({key: ocp.SaveArgs(chunk_byte_size=25_000) for key in ocp.tree.to_flat_dict(tree)})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=chunked))
    return path


@SLOW
@pytest.mark.parametrize("count", [1, 2])
def test_directories_of_chunks_by_several_processes(run, folders, tmp_path, count):
    """Each chunk is a file that is copied under its new name; a run that failed leaves what is done to the next."""
    assert run(count, "--prefuse", folders, tmp_path / "out", ends={0: "fail"})[0] == [6] * count
    assert run(count, "--prefuse", folders, tmp_path / "out") == ([0] * count, [""] * count)
    wi = tmp_path / "out" / "params.params.decoder.layers.moe_block.wi"
    steps = 24 // json.loads((wi / ".zarray").read_text())["chunks"][-1]
    for half in (0, 1):
        for file in folders.glob(f"*.wi_{half}/[0-9]*"):
            at = [*map(int, file.name.split("."))]
            at[-1] += half * steps
            assert (wi / ".".join(map(str, at))).read_bytes() == file.read_bytes()
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(folders, tmp_path / "out", gemm=False).equal


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=SLOW)])
def test_portions_of_arrays_that_are_directories(run, folders, tmp_path, count, monkeypatch):
    monkeypatch.setenv("ANEW", "1")
    assert run(count, "--prefuse", folders, tmp_path / "out", ends={0: "fail"})[0] == [6] * count
    (home,) = tmp_path.glob("out.partial-*")
    (left,) = [path for path in (home / "new").rglob("*.wi") if path.is_dir()]
    (left / "0.0.0.0.__lock").write_text("")
    assert run(count, "--prefuse", folders, tmp_path / "out") == ([0] * count, [""] * count)
    digests = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())["tensors"]
    assert len(digests["params.params.decoder.layers.moe_block.wi"]["xxh3_128"]) == 4
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(folders, tmp_path / "out", gemm=False).equal
    assert not list(tmp_path.rglob("*.__lock"))


def test_a_flipped_bit_is_found_in_its_portion(run, tree, tmp_path):
    assert run(1, "--prefuse", tree, tmp_path / "out")[0] == [0]
    path = tmp_path / "out" / "convert_manifest.json"
    text = path.read_text()
    digest = json.loads(text)["tensors"]["params.params.decoder.layers.moe_block.wi"]["xxh3_128"]["7:8"]
    path.write_text(text.replace(digest, "0" * 32))
    (line,) = next(level for level in convert.verify(tmp_path / "out").levels if level.name == "digests").differences
    assert line.startswith("params.params.decoder.layers.moe_block.wi[7:8] (in ")


HF, ORBAX = (), ("--to", "orbax")
ENDS = [(0, ORBAX), (1, HF), pytest.param(0, HF, marks=SLOW), pytest.param(1, ORBAX, marks=SLOW)]


@pytest.mark.parametrize(("failing", "to"), [ENDS[0], pytest.param(1, HF, marks=SLOW), *ENDS[2:]])
def test_one_fails_and_all_stop_and_the_next_run_goes_on(run, source, tmp_path, to, failing):
    arguments = ("--prefuse", source, tmp_path / "out", *(to or ("--max-shard-size", "60kB")))
    codes, texts = run(2, *arguments, ends={failing: "fail"})
    assert codes == [6, 6]
    assert "No space left on device" in texts[failing]
    assert f"process {failing} of 2 stopped: No space left on device" in texts[1 - failing]
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out.partial-*"))) == 1
    assert run(3, *arguments)[0] == [0, 0, 0]
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(source, tmp_path / "out", gemm=False).equal
    assert not list(tmp_path.glob("*.partial-*"))


@pytest.mark.parametrize(("killed", "to"), [pytest.param(0, ORBAX, marks=SLOW), *ENDS[1:]])
def test_one_is_killed_and_the_next_run_goes_on(run, source, tmp_path, to, killed):
    """JAX notices that it is gone and ends the other one."""
    arguments = ("--prefuse", source, tmp_path / "out", *(to or ("--max-shard-size", "60kB")))
    codes, _ = run(2, *arguments, ends={killed: "kill"})
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] != 0
    assert not (tmp_path / "out").exists()
    assert run(2, *arguments)[0] == [0, 0]
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(source, tmp_path / "out", gemm=False).equal


def test_different_options_are_refused(run, source, tmp_path):
    codes, texts = run(2, "--prefuse", source, tmp_path / "out", options={1: ("--layout", "interleaved")})
    assert set(codes) in ({2}, {2, 6})  # who is told before it sees for itself has 6
    assert any("all processes must be given the same options" in text for text in texts)
    assert not (tmp_path / "out").exists()


def test_helpers_of_an_earlier_run_that_still_write_are_noticed(run, source, tmp_path):
    assert run(2, "--prefuse", source, tmp_path / "out", ends={0: "fail"})[0] == [6, 6]
    (home,) = tmp_path.glob("out.partial-*")
    with (home / ".convert_journal-1").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(convert.OutputError, match="process 1 of an earlier run still writes into"):
            convert.prefuse(source, tmp_path / "out")
    convert.prefuse(source, tmp_path / "out")


def test_without_a_cluster_it_says_what_to_give(source, tmp_path, capsys):
    assert main(["--prefuse", str(source), str(tmp_path / "out"), "--num-processes", "2"]) == 2
    assert "--coordinator HOST:PORT" in capsys.readouterr().err
    assert main(["--verify", str(source), str(source), "--distributed"]) == 2


def test_work_is_divided_evenly():
    sizes = np.random.default_rng(0).integers(1, 100, 500).tolist()
    shares = share(sizes, 16)
    assert sorted(number for own in shares for number in own) == list(range(500))
    totals = [sum(sizes[number] for number in own) for own in shares]
    assert max(totals) - min(totals) <= 2
    assert share([5], 3) == [[0], [], []]


@pytest.mark.parametrize("to", [HF, ORBAX])
def test_the_plan_divides_a_terabyte_over_sixteen_hosts(tmp_path, capsys, to, monkeypatch):
    monkeypatch.setattr("convert.engine.outlook._free", lambda _: None)  # the disk here is smaller
    sizes = {"experts": 256, "embed": 7168, "mlp": 2048, "layers": 58, "vocab": 129_280, "shard": 5 * 10**9}
    make_checkpoint(tmp_path / "in", family="qwen3_moe", values="holes", **sizes)
    total = sum(path.stat().st_size for path in (tmp_path / "in").glob("*.safetensors"))
    assert total > 1.3e12
    arguments = ["--prefuse", str(tmp_path / "in"), str(tmp_path / "out"), *to]
    assert main([*arguments, "--dry-run", "--num-processes", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()[-16:]
    shares = [float(line.split()[2]) for line in lines]
    assert all(line.split()[3] == "GB" for line in lines)
    assert abs(sum(shares) * 1e9 / total - 1) < 0.01
    assert max(shares) < 1.1 * total / 16e9
