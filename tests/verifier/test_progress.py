"""Whoever waits for a verification sees what it is at, how much of it is left, and that it is alive."""

import io
import threading
from pathlib import Path

import pytest

import convert
from convert import progress
from convert.cli import main
from convert.commit.processes import Processes
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.tiny import adapter, whole

OTHERS, HELD = "bits of other tensors", "digests of what is held"
REPORT = {"content": True, "self_test": True}


class Watcher:
    """A caller who tells phases apart: their names and totals, what is done of each, and where it was."""

    def __init__(self):
        self.phases, self.done, self.places = [], [], []

    def __call__(self, done):
        self.done[-1] += done

    def phase(self, name, total):
        self.phases.append((name, total))
        self.done.append(0)
        self.places.append([])

    def at(self, what):
        if what not in self.places[-1]:
            self.places[-1].append(what)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("progress")
    make_checkpoint(root / "in", family="qwen3_moe", experts=4, embed=16, mlp=8, layers=3, values="normal")
    convert.prefuse(root / "in", root / "padded", layout="per-shard", shards=2, align=3)
    convert.prefuse(root / "in", root / "whole", content=True)
    convert.prefuse(root / "in", root / "tree", to="orbax")
    convert.reformat(root / "in", root / "apart", to="orbax")
    convert.prefuse(root / "apart", root / "kept")
    return root


@pytest.mark.parametrize(
    ("names", "words", "phases"),
    [
        (("in", "padded"), {"gemm": False}, ["bits of experts", OTHERS, "files"]),
        (("padded", "in"), {"gemm": False, "layers": [1], "experts": [0, 2]}, ["bits of experts", OTHERS, "files"]),
        (("in", "tree"), {"gemm": False}, ["bits of experts", OTHERS, "files"]),
        (("in", "in"), REPORT | {"gemm": False}, ["bits of experts", OTHERS, "files", HELD, "self-test"]),
        pytest.param(("tree", "padded"), {}, ["bits of experts", OTHERS, "GEMMs", "files"], marks=pytest.mark.slow),
        (("padded",), {}, ["files", "digests"]),
        (("whole",), REPORT, ["files", "digests", HELD]),
        (("tree",), {}, ["files", "digests"]),
        (("kept",), {"decode": True}, ["files", "digests", "decoding"]),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_each_phase_has_a_total_of_its_own_which_is_reached(root, names, words, phases):
    watcher = Watcher()
    assert convert.verify(*(root / name for name in names), progress=watcher, **words).equal
    assert [name for name, _ in watcher.phases] == phases
    for (name, total), done, places in zip(watcher.phases, watcher.done, watcher.places, strict=True):
        chunks = names == ("kept",) and name == "digests"  # the database that they lie in is somewhat larger
        assert name in ("files", "self-test") or (total > done > 0 if chunks else total == done > 0)
        wanted = [f"layer {number}/{1 if 'layers' in words else 3}" for number in ((1,) if "layers" in words else (1, 2, 3))]
        assert places == (wanted if name in ("bits of experts", "GEMMs") else [])


def test_adapters_are_one_phase(tmp_path):
    watcher, given = Watcher(), adapter(tmp_path / "in", whole("per-expert"))
    assert convert.verify(given, given, progress=watcher).equal
    assert [name for name, _ in watcher.phases] == ["delta W of experts"]
    assert watcher.done == [watcher.phases[0][1]] > [0]


def test_a_caller_who_only_counts_is_told_bytes(root):
    done = []
    assert convert.verify(root / "in", root / "padded", gemm=False, progress=done.append).equal
    compared = convert.verify(root / "padded", root / "in", gemm=False).levels
    assert sum(done) == sum(level.compared for level in compared[:2])


def test_what_watches_for_other_processes_hands_phases_on():
    watcher = Watcher()
    silent = dict.fromkeys(("key_value_dir_get", "key_value_set"), lambda *_, **__: [])
    watched = Processes(count=2, client=type("Board", (), silent)()).watched(watcher)
    progress.begin(watched, "bits", 10)
    progress.say(watched, "layer 1/2")
    watched(4)
    assert (watcher.phases, watcher.done, watcher.places) == ([("bits", 10)], [4], [["layer 1/2"]])


def test_a_bar_moves_while_a_step_says_nothing(monkeypatch):
    """It is drawn by a thread of its own; the step below ends once that has happened three times."""
    monkeypatch.setattr(progress, "_BEAT", 0.01)
    drawn = threading.Semaphore(0)

    class Screen(io.StringIO):
        def write(self, text):
            drawn.release()
            return super().write(text)

    screen = Screen()
    with progress.bars(file=screen) as bars:
        bars.phase("GEMMs", 100)
        bars.at("layer 3/48")
        while drawn.acquire(blocking=False):
            pass
        assert all(drawn.acquire(timeout=60) for _ in range(3))
        bars(50)
    assert "GEMMs: layer 3/48:   0%" in screen.getvalue()
    assert not any("beat" in thread.name for thread in threading.enumerate())


def test_the_command_shows_each_phase_and_quiet_shows_none(root, capsys):
    assert main(["--verify", str(root / "in"), str(root / "padded"), "--no-gemm", "--progress", "bar"]) == 0
    shown = capsys.readouterr().err
    assert all(word in shown for word in ("opening", "bits of experts", OTHERS, "files", "B/s"))
    assert main(["--verify", str(root / "in"), str(root / "padded"), "--no-gemm", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
