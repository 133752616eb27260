"""Before it starts, a conversion says what it will read and write, how much of that is padding, and how much room there is."""

import json

import numpy as np
import pytest

import convert
import layouts.hf.reader
from convert.answers.envelope import ahead_json
from convert.cli import main
from convert.engine.outlook import Outlook, outlook
from convert.options.values import in_units
from layouts.checkpoint import open_checkpoint
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.bases import base, weights
from tests.adapters.tiny import adapter, whole
from tests.layouts.test_companion_forms import CASES as QUANTISED
from tests.layouts.test_companion_forms import write

MODEL = {"experts": 4, "layers": 2, "embed": 64, "mlp": 40}
BLOCK = MODEL["layers"] * MODEL["experts"] * MODEL["embed"] * 2
"""Bytes of a column of the experts' gate (or up, or a row of down) in all layers, in bfloat16."""
PADDED = {
    "concat": ([], 0),
    "transformers": ([], 0),
    "per-shard": (["--shards", "4"], 2 * 4 * (128 - 10)),
    "lane": (["--shards", "1"], None),
    "gmm-ep": ([], 2 * (128 - 40)),
    "fused-moe": ([], 3 * (256 * 4 - 40)),  # K = 64 becomes 256 as well: four times the columns
}
"""Layout -> what it is asked for with, and columns of zeros for each expert; None where 40 columns do not divide."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("outlook")
    for kind in ("hf", "orbax"):
        make_checkpoint(root / kind, family="qwen3_moe", format=kind, train_state=kind == "orbax", **MODEL)
    convert.prefuse(root / "hf", root / "padded", layout="per-shard", shards=4)
    adapter(root / "adapter", whole("per-expert"))
    return root


def held(path):
    """Bytes of tensors in files of safetensors, counted by hand."""
    heads = {file: int.from_bytes(file.read_bytes()[:8], "little") for file in path.glob("*.safetensors")}
    return sum(file.stat().st_size - 8 - head for file, head in heads.items())


@pytest.mark.parametrize("layout", PADDED)
def test_padding_is_counted_to_the_byte(places, layout, tmp_path, capsys):
    words, columns = PADDED[layout]
    code = main(["--prefuse", str(places / "hf"), str(tmp_path / "out"), "--layout", layout, *words, "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)["result"]
    if columns is None:
        assert code == 4
        return
    assert found["padding_bytes"] == columns * BLOCK
    assert found["write_bytes"] - found["read_bytes"] == found["padding_bytes"]
    assert main(["--prefuse", str(places / "hf"), str(tmp_path / "out"), "--layout", layout, *words]) == 0
    printed = capsys.readouterr()
    beside = sum(convert.plan(places / "hf", tmp_path / "x", prefuse=True).side_files.values())
    assert held(tmp_path / "out") + beside == found["write_bytes"]
    assert ("padding" in printed.err) == bool(columns)
    if columns:
        assert f"; {' '.join([layout, *words])} makes " in printed.err
    assert len(printed.err.splitlines()) == 1


def test_padding_of_an_input_is_not_read(places, tmp_path, capsys):
    assert main(["--split", str(places / "padded"), str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert found["padding_bytes"] == 0
    assert found["read_bytes"] == found["write_bytes"]


CASES = {
    "an adapter": (["--prefuse", "adapter"], False, False),
    "to a tree": (["--to", "orbax", "hf"], False, True),
    "a tree": (["--prefuse", "orbax"], True, True),
    "a tree without state": (["--prefuse", "--drop-optimizer", "orbax"], True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_the_run_says_what_the_dry_run_said(places, case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(places)
    words, *chunked = CASES[case]
    out = str(tmp_path / "out")
    assert main([*words, out, "--dry-run"]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("disk: "))
    assert main([*words, out]) == 0
    told = capsys.readouterr().err.strip()
    assert told.rpartition(", ")[0] == said.replace("disk: ", "convert: ").rpartition(", ")[0]
    assert [part.startswith(("convert: up to", "up to")) for part in told.split(", ")[:2]] == chunked


def test_what_is_merged_is_read_too(tmp_path, capsys):
    base(tmp_path / "base", weights(np.float32))
    adapter(tmp_path / "adapter", whole("per-expert"))
    words = [
        "--merge",
        str(tmp_path / "adapter"),
        str(tmp_path / "out"),
        "--base",
        str(tmp_path / "base"),
        "--dry-run",
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert found["read_bytes"] - found["write_bytes"] == held(tmp_path / "adapter")


def test_what_is_computed_is_read_as_it_is_stored(tmp_path, capsys):
    settings, tensors, _ = QUANTISED["nvfp4 of modelopt"]
    source = write(tmp_path / "in", {f"model.layers.2.mlp.experts.{name}": entry for name, entry in tensors.items()}, settings)
    words = ["--prefuse", str(source), str(tmp_path / "out"), "--dequantize", "bf16"]
    assert main([*words, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert found["read_bytes"] == held(source) + (source / "config.json").stat().st_size
    assert found["write_bytes"] > 3 * found["read_bytes"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith(
        f"convert: {in_units(found['read_bytes'])} to read, {in_units(found['write_bytes'])} to write"
    )
    assert f"verify convert --verify {tmp_path / 'out'}\n" in printed.out


def test_quiet_says_nothing_and_neither_does_what_is_done(places, tmp_path, capsys):
    words = ["--prefuse", str(places / "hf"), str(tmp_path / "out")]
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "nothing to do" in printed.out


def test_nobody_knows_the_room_in_a_store(places):
    plan = convert.plan(places / "hf", places / "new", to="orbax")
    reader = open_checkpoint(places / "hf")
    found = outlook(plan, reader)
    reader.close()
    assert isinstance(found.free, int)
    unknown = Outlook(read=1000, write=2000, padding=0, free=None, out=plan.out)
    assert str(unknown) == "1.0 kB to read, 2.0 kB to write"
    unknown.check()


def test_a_dry_run_reads_headers_once(places, monkeypatch):
    opened = []
    real = layouts.hf.reader.read_shard
    monkeypatch.setattr(layouts.hf.reader, "read_shard", lambda path: opened.append(path) or real(path))
    assert main(["--prefuse", "--dry-run", "--quiet", str(places / "hf"), str(places / "none")]) == 0
    assert len(opened) == len(list((places / "hf").glob("*.safetensors")))


@pytest.mark.parametrize(
    ("moved", "said"),
    [
        (9.9, ""),
        (10, ", 10 s at 1.0 GB/s"),
        (119, ", 119 s"),
        (122, ", 2 min"),
        (7000, ", 117 min"),
        (9000, ", 2 h"),
        (86_400, ", 24 h"),
    ],
)
def test_the_time_is_an_assumption_that_stands_beside_it(tmp_path, moved, said):
    ahead = Outlook(read=int(moved * 0.25e9), write=int(moved * 0.75e9), padding=0, free=None, out=tmp_path)
    assert str(ahead).partition(" to write")[2] == (said and f"{said.partition(' at')[0]} at 1.0 GB/s")
    assert ahead_json(ahead)["seconds"] == round(ahead.seconds)
