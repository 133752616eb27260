"""Progress adds up to what was announced, and that is what the plan writes: padded, compressed, kept, or looked at again."""

import io
import json
import re
from pathlib import Path

import jsonschema
import pytest

import convert
from convert import progress
from convert.cli import main
from convert.orbax import copy
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.tiny import adapter, whole


class Watched:
    """A progress that wants to know how much there will be."""

    def __init__(self):
        self.totals, self.steps = [], []

    def phase(self, name, total):
        if not name:  # one with a name is of a verification, or of a digest
            assert not self.steps, "before any byte is done"
            self.totals.append(total)

    def at(self, what):
        """Nothing to do."""

    def __call__(self, done):
        self.steps.append(done)


WAYS = {
    "fused": ("hf", {}),
    "padded": ("hf", {"layout": "per-shard", "shards": 4}),
    "padded on both sides": ("hf", {"layout": "fused-moe"}),
    "to a tree": ("hf", {"to": "orbax"}),
    "to a padded tree": ("hf", {"to": "orbax", "layout": "per-shard", "shards": 4, "align": "maxtext"}),
    "kept chunks": ("orbax", {"keep_chunks": True}),
    "chunks made anew": ("orbax", {"keep_chunks": False}),
    "padded chunks": ("orbax", {"layout": "gmm-ep"}),
    "hashed before": ("hf", {"content": True, "layout": "per-shard", "shards": 4}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("progress")
    return {kind: make_checkpoint(root / kind, family="qwen3_moe", format=kind) for kind in ("hf", "orbax")}


@pytest.mark.parametrize("way", WAYS)
def test_progress_adds_up_to_what_is_written(sources, tmp_path, way):
    kind, words = WAYS[way]
    watched, again = Watched(), Watched()
    report = convert.prefuse(sources[kind], tmp_path / "out", progress=watched, **words)
    assert watched.totals == [sum(watched.steps)]
    assert sum(watched.steps) >= report.plan.nbytes > 0
    if "content" not in words:
        assert sum(watched.steps) == report.plan.nbytes
        convert.prefuse(sources[kind], tmp_path / "out", progress=again, **words)
        assert again.totals == [sum(again.steps)] == watched.totals, "it has been made, and is read again"


def test_kept_chunks_are_counted_while_they_are_hashed(sources, tmp_path, monkeypatch):
    """Not at the end: a bar that is at zero until all is done says nothing."""
    journalled = []
    real = copy.Stage.record
    monkeypatch.setattr(copy.Stage, "record", lambda stage, fresh: (journalled.append(len(watched.steps)), real(stage, fresh)))
    watched = Watched()
    convert.prefuse(sources["orbax"], tmp_path / "out", keep_chunks=True, progress=watched)
    assert journalled[0] > 1


def test_so_it_does_for_adapters(tmp_path):
    adapter(tmp_path / "in", whole("per-expert"))
    watched, again = Watched(), Watched()
    report = convert.prefuse(tmp_path / "in", tmp_path / "out", progress=watched)
    convert.prefuse(tmp_path / "in", tmp_path / "out", progress=again)
    assert watched.totals == again.totals == [report.plan.nbytes]
    assert sum(watched.steps) == sum(again.steps) == report.plan.nbytes > 0


def test_the_bar_of_the_command_ends_full(sources, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, **words):
            self.total, self.n = words["total"], 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, done):
            self.n += done

        def close(self):
            return None

        def set_description(self, *_, **__):
            return None

        def refresh(self):
            return None

        def write(self, *_, **__):
            return None

    monkeypatch.setattr("tqdm.tqdm", Bar)
    assert main(["--prefuse", str(sources["orbax"]), str(tmp_path / "kept"), "--keep-chunks", "--progress", "bar"]) == 0
    assert main(["--prefuse", str(sources["hf"]), str(tmp_path / "padded"), "--layout", "gmm-ep", "--progress", "bar"]) == 0
    told = [bar for bar in bars if bar.total is not None]  # the first of each command knows nothing yet
    assert all(bar.n == bar.total > 0 for bar in told)
    assert len(told) == 2


class Clock:
    """A clock that is a second later whenever it is looked at."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


def shown(monkeypatch, **words) -> list[str]:
    """What is printed of 100 steps in 3 phases, 1 s or 2 each."""
    monkeypatch.setattr(progress, "time", Clock())
    screen = io.StringIO()
    lines = progress.Lines("reading", 400, file=screen, **words)
    for _ in range(100):
        lines(4)
    lines.phase("hashing", None)
    lines.at("layer 3/48")
    for _ in range(40):
        lines(1)
    lines.phase("GEMMs", 10)
    lines(10)
    lines.close()
    return screen.getvalue().splitlines()


def test_a_log_has_a_plain_line_every_30_seconds(monkeypatch):
    lines = shown(monkeypatch)
    assert lines[0] == "convert: reading: 120 B of 400 B, 4 B/s, 70 s left"
    assert len(lines) == 4
    assert lines[3].startswith("convert: hashing: layer 3/48: ")


def test_programs_have_a_line_of_json_each_second_and_the_last_number(monkeypatch):
    lines = [json.loads(line) for line in shown(monkeypatch, json=True)]
    schema = json.loads((Path(progress.__file__).parent / "answers" / "output.schema.json").read_text())
    form = jsonschema.Draft202012Validator(schema["$defs"]["progress"])
    assert not [error for line in lines for error in form.iter_errors(line)]
    last = {line["phase"]: line["done"] for line in lines}
    assert last == {"reading": 400, "hashing": 40, "GEMMs": 10}


@pytest.mark.parametrize("kind", ["auto", "plain", "json", "none", "bar"])
def test_off_a_terminal_there_is_no_bar_unless_it_is_asked_for(sources, tmp_path, kind, capsys):
    assert main(["--prefuse", str(sources["hf"]), str(tmp_path / "out"), "--progress", kind]) == 0
    err = capsys.readouterr().err
    assert ("\r" in err) == (kind == "bar")
    if kind == "json":
        ends = [json.loads(line) for line in err.splitlines()]
        assert ends[-1]["done"] == ends[-1]["total"] > 0
    elif kind == "none":
        assert err == ""
    else:
        (line,) = re.findall(r"^.*?(convert: .*)$", err, re.M)
        assert re.fullmatch(r"convert: \S+ kB to read, \S+ kB to write, \S+ [MGT]B free", line)
        assert kind == "bar" or err == f"{line}\n"
