"""`--verify OUT` alone: nothing in the manifest, in a header or in a record changes unnoticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import convert
from scripts.make_checkpoint import make_checkpoint

CONFIG, MANIFEST = "config.json", "convert_manifest.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sealed")
    make_checkpoint(root / "in", family="qwen3_moe", experts=4, embed=8, mlp=4, layers=1, values="normal")
    convert.prefuse(root / "in", root / "out")
    return root / "out"


@pytest.fixture
def out(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "out")


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found, indent=1))


def told(out: Path) -> tuple[str, ...]:
    verdict = convert.verify(out)
    assert [level.name for level in verdict.levels] == ["files", "digests", "manifest", "content"]
    return verdict.levels[2].differences


def test_what_we_wrote_is_equal(made):
    assert convert.verify(made).equal
    assert "1 headers by theirs" in convert.verify(made).levels[2].covered


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "record": lambda found: found["record"].update(layout="vllm"),
    "layout": lambda found: found.update(layout="vllm"),
    "family": lambda found: found.update(family="mixtral"),
    "input": lambda found: found.update(input="0" * 32),
    "headers": lambda found: found["original"]["headers"].update({"model.safetensors": "{}"}),
    "texts": lambda found: found["original"]["texts"].update({CONFIG: "{}"}),
    "sources": lambda found: found["sources"].clear(),
    "tool": lambda found: found.update(tool="2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_anything_in_the_manifest(out, change):
    edit(out / MANIFEST, CHANGES[change])
    assert f"{MANIFEST} is not what was written" in told(out)


def test_a_manifest_without_its_digest(out):
    edit(out / MANIFEST, lambda found: found.pop("xxh3_128"))
    (line,) = told(out)
    assert line.startswith(f"{MANIFEST} has no digest of itself")


def test_a_missing_record(out):
    edit(out / CONFIG, lambda config: config.pop("moe_layout"))
    assert f"the record of the layout in {CONFIG} is missing" in told(out)


def test_the_header_of_a_shard(out):
    """Another `__metadata__` of the same length, so that no file has another size."""
    path = out / "model.safetensors"
    data = path.read_bytes()
    changed = data.replace(b'"format":"pt"', b'"format":"tf"', 1)
    assert changed != data
    path.write_bytes(changed)
    assert told(out) == ("the header of model.safetensors is not what was written",)
