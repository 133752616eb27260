"""Progress adds up to what was announced, and that is what the plan writes: padded, compressed, kept, or looked at again."""

import pytest

import convert
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

    monkeypatch.setattr("tqdm.tqdm", Bar)
    assert main(["--prefuse", str(sources["orbax"]), str(tmp_path / "kept"), "--keep-chunks"]) == 0
    assert main(["--prefuse", str(sources["hf"]), str(tmp_path / "padded"), "--layout", "gmm-ep"]) == 0
    told = [bar for bar in bars if bar.total is not None]  # the first of each command knows nothing yet
    assert all(bar.n == bar.total > 0 for bar in told)
    assert len(told) == 2
