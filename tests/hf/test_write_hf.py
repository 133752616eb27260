"""What a split restores besides the tensors: texts byte for byte, and a damaged memory of them is an error."""

import json

import pytest

import convert
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "in", family="mixtral", experts=2, layers=1, shard=20_000)


def test_line_ends_of_the_texts_come_back(source, tmp_path):
    for name in ("config.json", "model.safetensors.index.json"):
        text = (source / name).read_bytes().replace(b"\n", b"\r\n")
        (source / name).write_bytes(text)
    convert.prefuse(source, tmp_path / "fused")
    convert.split(tmp_path / "fused", tmp_path / "again")
    for name in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


def test_an_edited_config_is_kept(source, tmp_path):
    convert.prefuse(source, tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    (tmp_path / "fused" / "config.json").write_text(json.dumps({**config, "rope_theta": 5}))
    convert.split(tmp_path / "fused", tmp_path / "again")
    original = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {**original, "rope_theta": 5}


def test_a_split_without_the_manifest_gives_the_same_tensors(source, tmp_path):
    convert.prefuse(source, tmp_path / "fused")
    (tmp_path / "fused" / "convert_manifest.json").unlink()
    convert.split(tmp_path / "fused", tmp_path / "again")
    assert convert.verify(source, tmp_path / "again", gemm=False).equal


@pytest.mark.parametrize("original", [3, {"headers": 3, "texts": {}}, {}])
def test_a_damaged_memory_is_an_error(source, tmp_path, original):
    convert.prefuse(source, tmp_path / "fused")
    path = tmp_path / "fused" / "convert_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "original": original}))
    with pytest.raises(convert.InputError, match="'original' should hold"):
        convert.split(tmp_path / "fused", tmp_path / "again")


@pytest.mark.parametrize("index", [True, False])
def test_files_without_tensors_come_back_only_where_they_are_read_again(source, tmp_path, index):
    """A manifest may remember such files; an index, which names files by their tensors, cannot."""
    if not index:
        (source / "model.safetensors.index.json").unlink()
        for number, file in enumerate(sorted(source.glob("*.safetensors"))):
            file.rename(source / f"model-{number + 1:05}-of-00009.safetensors")
        held = len(list(source.glob("*.safetensors")))
        for number in range(held, 9):
            (source / f"model-{number + 1:05}-of-00009.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    convert.prefuse(source, tmp_path / "fused")
    if index:
        path = tmp_path / "fused" / "convert_manifest.json"
        found = json.loads(path.read_text())
        found["original"]["headers"]["x.safetensors"] = "{}"
        path.write_text(json.dumps(found))
    convert.split(tmp_path / "fused", tmp_path / "again")
    assert convert.verify(tmp_path / "again").equal
    names = {path.name for path in source.glob("*.safetensors")}
    assert not index or not (tmp_path / "again" / "x.safetensors").exists()
    assert index or {path.name for path in (tmp_path / "again").glob("*.safetensors")} == names
