"""Several processes verify together: one verdict, the same as that of one process, whatever there is to find."""

import itertools
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.commit import processes
from convert.commit.processes import Processes
from convert.errors import ConvertError, InputError, StorageError, UsageError
from convert.verifier.content import hashing
from layouts.hf import HFReader
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.tiny import adapter, whole

ROOT = Path(__file__).parents[2]


class Board:
    """What JAX's coordination service does for processes, for threads that play them."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def key_value_dir_get(self, key):
        with self.changed:
            return [(name, value) for name, value in self.values.items() if name.startswith(key)]


def together(monkeypatch, count, *paths, own=None, **options):
    """What each of `count` processes gets, an error or a verdict; `own` are the options of each."""
    monkeypatch.setattr(processes, "_RUNS", itertools.repeat(0))
    monkeypatch.setattr(processes, "_MESSAGE", 100)
    board = Board()

    def verify(index):
        try:
            each = (own or {}).get(index, {})
            return convert.verify(*paths, processes=Processes(index=index, count=count, client=board), **options | each)
        except ConvertError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(verify, range(count)))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One model in three forms, and each with bits turned in the experts and elsewhere."""
    root = tmp_path_factory.mktemp("together")
    make_checkpoint(root / "in", family="qwen3_moe", experts=5, embed=32, mlp=16, layers=3, values="normal", shard=20_000)
    convert.prefuse(root / "in", root / "fused")
    convert.prefuse(root / "in", root / "tree", to="orbax")
    shutil.copytree(root / "fused", root / "damaged")
    for number, file in enumerate(sorted((root / "damaged").glob("*.safetensors"))):
        data = np.memmap(file, np.uint8, "r+")
        data[-3 - 64 * number :: -2000][:4] ^= 1
    return root


PAIRS = [("in", "fused"), ("in", "damaged"), ("in", "tree"), ("damaged", "tree"), ("tree", "tree"), ("fused",), ("damaged",)]


@pytest.mark.parametrize("count", [2, 3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", PAIRS, ids=" ".join)
def test_the_verdict_is_that_of_one_process(root, monkeypatch, names, count):
    """Also where there are more of them than pieces of work; all have it, and say it in the same order."""
    paths, words = [root / name for name in names], {"gemm": False} if len(names) == 2 else {}
    alone = convert.verify(*paths, **words)
    assert alone.equal == ("damaged" not in names)
    assert [each.json() for each in together(monkeypatch, count, *paths, **words)] == [alone.json()] * count


@pytest.mark.slow
@pytest.mark.parametrize("names", [("in", "fused"), ("in", "damaged"), ("in", "tree"), ("damaged", "tree")], ids=" ".join)
def test_the_probes_are_divided_by_layers(root, monkeypatch, names):
    paths = [root / name for name in names]
    alone = convert.verify(*paths)
    for words in ({}, {"layers": [0, 2], "experts": [1, 2]}):
        alone = convert.verify(*paths, **words)
        assert [each.json() for each in together(monkeypatch, 2, *paths, **words)] == [alone.json()] * 2


@pytest.mark.parametrize("names", [("in", "fused"), ("in", "damaged"), ("fused",)], ids=" ".join)
def test_digests_and_the_self_test_are_those_of_one_process(root, monkeypatch, names):
    """Each hashes a part of both, and no tensor is hashed twice; all have the same digests."""
    hashed: list[int] = []
    every = hashing.hashed
    monkeypatch.setattr(hashing, "hashed", lambda unit: hashed.append(unit.nbytes) or every(unit))
    paths, words = [root / name for name in names], {"gemm": False} if len(names) == 2 else {}
    words |= {"content": True, "self_test": True}
    alone = convert.verify(*paths, **words)
    assert alone.self_test or "damaged" in names
    assert alone.sides[0].digest
    once = sorted(hashed)
    hashed.clear()
    assert [each.json() for each in together(monkeypatch, 2, *paths, **words)] == [alone.json()] * 2
    assert sorted(hashed) == once


def test_what_one_process_cannot_hash_all_say(root, monkeypatch):
    """The others would wait for it."""
    every = hashing.hashed

    def fails(unit):
        if "lm_head" in unit.array:
            raise InputError("a hole")
        return every(unit)

    monkeypatch.setattr(hashing, "hashed", fails)
    for found in together(monkeypatch, 2, root / "in", root / "fused", gemm=False, content=True):
        level = next(level for level in found.levels if level.name == "content")
        assert (level.state, level.why) == ("not run", "a hole")


def test_adapters_are_for_one_process(tmp_path, monkeypatch):
    given = adapter(tmp_path / "in", whole("per-expert"))
    found = together(monkeypatch, 2, given, given)
    assert [str(each) for each in found] == ["one process compares two adapters; leave out what is said of several"] * 2


def waiting(monkeypatch, work, silent=0.5):
    """What the first of two processes gets from the second one, which is at `work` first."""
    monkeypatch.setattr(processes, "_LOOK", 0.02)
    monkeypatch.setattr(processes, "SILENT", silent)
    board, met = Board(), threading.Event()
    one, other = (Processes(index=index, count=2, client=board) for index in (0, 1))

    def second():
        if work(other.watched(lambda done: None)):
            other.gather("done")
        met.set()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(second)
        try:
            return one.gather("begun")
        except StorageError as error:
            return str(error)
        finally:
            done.result()


def test_a_process_that_lives_and_gets_no_further_is_given_up(monkeypatch):
    assert waiting(monkeypatch, lambda progress: False).startswith("process 1 of 2 has made no progress for 0.5 s; ")


def test_a_process_at_work_is_waited_for(monkeypatch):
    def work(progress):
        for _ in range(60):
            time.sleep(0.04)
            progress(1)
        return True

    assert waiting(monkeypatch, work, silent=2.0) == ["begun", "done"]


def test_each_process_reads_its_part_alone(root, monkeypatch):
    read, seen = HFReader.read, []

    def noted(self, name, *given):
        seen.append((self.path.name, name))
        return read(self, name, *given)

    monkeypatch.setattr(HFReader, "read", noted)
    together(monkeypatch, 3, root / "in", root / "in", gemm=False)
    assert len(seen) == 2 * len({name for _, name in seen})


def test_one_that_fails_stops_the_others(root, monkeypatch):
    monkeypatch.setattr(processes, "_LOOK", 0.05)
    read = HFReader.read

    def failing(self, name, *given):
        if "layers.2" in name:
            raise StorageError("the disk is gone")
        return read(self, name, *given)

    monkeypatch.setattr(HFReader, "read", failing)
    found = together(monkeypatch, 2, root / "in", root / "in", gemm=False)
    assert [type(each) for each in found] == [StorageError] * 2
    assert "process 1 of 2 stopped: the disk is gone" in str(found[0])


def test_all_must_see_the_same(root, monkeypatch):
    monkeypatch.setattr(processes, "_LOOK", 0.05)
    found = together(monkeypatch, 2, root / "in", root / "fused", gemm=False, own={1: {"layers": [1]}})
    assert {type(each) for each in found} <= {UsageError, StorageError}
    assert any("all processes must be given the same options" in str(each) for each in found)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([1] * 6, [2, 2, 2]),
        ([1] * 5, [2, 2, 1]),
        ([9, 1, 1, 1], [1, 0, 3]),
        ([1, 1], [1, 1, 0]),
        ([0, 0], [2, 0, 0]),
        ([], [0, 0, 0]),
    ],
)
def test_a_part_is_a_stretch_of_the_work(sizes, parts):
    found = [list(range(len(sizes)))[Processes(index=index, count=3).stretch(sizes)] for index in range(3)]
    assert list(map(len, found)) == parts
    assert list(itertools.chain.from_iterable(found)) == list(range(len(sizes)))


@pytest.mark.parametrize("words", [["--no-gemm"], pytest.param([], marks=pytest.mark.slow)], ids=" ".join)
def test_the_command_prints_one_verdict(forks, root, words):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    given = ["--verify", str(root / "in"), str(root / "damaged"), *words, "--json", "--quiet", "--coordinator", address]
    code = "import sys; from convert.cli import main; sys.exit(main(sys.argv[1:]))"
    children = [forks.start(code, *given, "--num-processes", 2, "--process-id", i) for i in range(2)]
    ended = [forks.end(*child) for child in children]
    assert [child.returncode for child in ended] == [1, 1], ended
    alone = convert.verify(root / "in", root / "damaged", gemm=not words, content=True, self_test=True)
    assert json.loads(ended[0].stdout)["result"] | {"run": None} == json.loads(alone.json())
    assert [ended[0].stderr, ended[1].stdout, ended[1].stderr] == ["", "", ""]
