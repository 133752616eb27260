"""A record, a tree or a side file that asks for a path elsewhere, or for one that is taken, is refused; nothing is written."""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
from convert.cli import main
from scripts.make_checkpoint import make_checkpoint

E, K, N = 4, 16, 8


def tree_of():
    def noise(*shape):
        return np.random.default_rng(0).integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)

    return {
        "params": {
            "decoder": {"layers_0": {"moe_block": {"wi_0": noise(E, K, N), "wi_1": noise(E, K, N), "wo": noise(E, N, K)}}}
        }
    }


def save(path: Path, tree, *, ocdbt: bool) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


def inodes(path: Path) -> dict[str, tuple]:
    """Everything below a directory, by name: kind, size, inode and times."""
    found = {}
    for entry in [path, *path.rglob("*")]:
        status = entry.lstat()
        found[str(entry)] = (status.st_mode, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["database", "directories"])
def made(request, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("names")
    save(root / "in", tree_of(), ocdbt=request.param)
    convert.prefuse(root / "in", root / "fused")
    return root


@pytest.fixture
def fused(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "fused"


def with_key(fused: Path, key: str) -> None:
    """Put a key into the record's native layout."""
    file = fused / "_METADATA"
    metadata = json.loads(file.read_text())
    metadata["custom_metadata"]["moe_layout"]["wi"]["native"][0]["key"] = key
    file.write_text(json.dumps(metadata))
    (fused / "convert_manifest.json").unlink()  # or the two would be found to disagree before


@pytest.fixture
def canaries(tmp_path) -> Path:
    """What an attacker would like to have removed: directories called like what he lets be rendered."""
    place = tmp_path / "elsewhere"
    for name in ("a", "b", "x.a", "x.b", "victim/a", "victim/b"):
        (place / name).mkdir(parents=True)
        (place / name / "file").write_text("mine")
    return place


KEYS = (
    "{there}/{{g:a,b}}",
    "{there}/x.{{g:a,b}}",
    "../../../../elsewhere/x.{{g:a,b}}",
    "../../elsewhere/{{g:a,b}}",
    "ok/../../../elsewhere/{{g:a,b}}",
    "ok/{{g:../../../elsewhere/a,../../../elsewhere/b}}",
    "./{{g:a,b}}",
    "ok//{{g:a,b}}",
    "{{g:a,b}}\u0000",
    "\u001b[2J{{g:a,b}}",
    "\ud800{{g:a,b}}",
)


@pytest.mark.parametrize("options", [(), ("--keep-chunks",), ("--dry-run",), ("--dry-run", "--keep-chunks")], ids=" ".join)
@pytest.mark.parametrize("key", KEYS)
def test_a_record_cannot_lead_out(fused, canaries, tmp_path, capsys, key, options):
    with_key(fused, key.format(there=canaries))
    before = inodes(tmp_path)
    assert main(["--split", str(fused), str(tmp_path / "out"), *options]) == 3
    assert inodes(tmp_path) == before
    error = capsys.readouterr().err
    assert ("a NUL" if "\0" in key or "\ud800" in key else "is not safe as the name of a file") in error
    assert "\x1b" not in error
    assert "\0" not in error


@pytest.mark.parametrize(
    "key", ["params.decoder.layers_0.moe_block.wo", "wi/{g:x,x/y}", "params.decoder.layers_0.moe_block.wo/{g:0,1}"]
)
def test_a_record_cannot_ask_for_a_name_that_is_taken(fused, tmp_path, key):
    with_key(fused, key)
    before = inodes(tmp_path)
    assert main(["--split", str(fused), str(tmp_path / "out"), "--quiet"]) in (3, 4)
    assert inodes(tmp_path) == before


@pytest.mark.parametrize("key", ["_METADATA{g:,2}", "d{g:/x,/y}", "{g:_sharding,ocdbt.process_7}"])
def test_a_record_cannot_ask_for_what_is_orbaxs_own(tmp_path, key):
    save(tmp_path / "in", tree_of(), ocdbt=False)
    convert.prefuse(tmp_path / "in", tmp_path / "fused")
    with_key(tmp_path / "fused", key)
    before = inodes(tmp_path)
    assert main(["--split", str(tmp_path / "fused"), str(tmp_path / "out"), "--quiet"]) in (3, 4)
    assert inodes(tmp_path) == before


@pytest.mark.parametrize("key", ["..", "../../elsewhere/a", "/absolute", "a//b", "a/./b", "a\0b", ".", ""])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_leaf_cannot_be_read_from_elsewhere(tmp_path, capsys, key, ocdbt):
    source = save(tmp_path / "in", tree_of(), ocdbt=ocdbt)
    file = source / "_METADATA"
    metadata = json.loads(file.read_text())
    entry = next(iter(metadata["tree_metadata"].values()))
    entry["key_metadata"] = [{"key": key, "key_type": 2}]
    file.write_text(json.dumps(metadata))
    before = inodes(tmp_path)
    assert main(["--prefuse", str(source), str(tmp_path / "out"), "--dry-run"]) == 3
    assert main(["--prefuse", str(source), str(tmp_path / "out"), "--quiet"]) == 3
    assert ("a NUL" if "\0" in key else "_METADATA: the name") in capsys.readouterr().err
    assert inodes(tmp_path) == before


@pytest.mark.parametrize("name", ["0/items/manifest.ocdbt", "0/items/d/file", "0/items/ocdbt.process_0/d/x"])
def test_a_side_file_cannot_take_the_place_of_what_is_written(tmp_path, capsys, name):
    source = make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, layers=1)
    (source / name).parent.mkdir(parents=True, exist_ok=True)
    (source / name).write_text("mine")
    assert main(["--to", "orbax", str(source), str(tmp_path / "out"), "--quiet"]) == 4
    assert "needs its name" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x\0.safetensors", ".."])
def test_an_index_and_a_manifest_cannot_name_files_elsewhere(tmp_path, capsys, name):
    source = make_checkpoint(tmp_path / "in", family="mixtral", experts=2, layers=1, shard=60_000)
    index = source / "model.safetensors.index.json"
    text = index.read_text()
    content = json.loads(text)
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    assert main(["--prefuse", str(source), str(tmp_path / "out"), "--quiet"]) == 3
    index.write_text(text)
    convert.prefuse(source, tmp_path / "fused")
    manifest = tmp_path / "fused" / "convert_manifest.json"
    content = json.loads(manifest.read_text())
    headers = content["original"]["headers"]
    headers[name] = headers.pop(next(iter(headers)))
    manifest.write_text(json.dumps(content))
    before = inodes(tmp_path)
    capsys.readouterr()
    assert main(["--split", str(tmp_path / "fused"), str(tmp_path / "out"), "--quiet"]) == 3
    assert ("a NUL" if "\0" in name else "is not safe as the name of a file") in capsys.readouterr().err
    assert {key: value[:3] for key, value in inodes(tmp_path).items()} == {key: value[:3] for key, value in before.items()}
