"""The reader of Hugging Face checkpoints: what is not sound is refused, with a message that says what and where."""

import json
from pathlib import Path

import numpy as np
import pytest

from convert.cli import main
from layouts.checkpoint import open_checkpoint
from layouts.errors import InputError
from layouts.hf.header import read_shard
from layouts.tables.natives import PER_EXPERT
from layouts.tensors import DTYPES, itemsize
from tests.tiny import HF, checkpoint, config, load, same, tensors

QWEN = next(family for family in HF if family.native[0] is PER_EXPERT)
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
GATE = "model.layers.1.mlp.experts.0.gate_proj.weight"


@pytest.fixture
def source(tmp_path) -> Path:
    return checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))


@pytest.fixture
def refused(source, capsys):
    """Convert, and give the message of the refusal; nothing may have been written."""

    def run(code: int = 3) -> str:
        out = source.parent / "out"
        assert main(["--prefuse", str(source), str(out), "--quiet"]) == code
        assert sorted(p.name for p in source.parent.iterdir()) == ["in"]
        message = capsys.readouterr().err
        assert message.startswith("convert: ")
        assert str(source) in message
        return message

    return run


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """Write a safetensors file as it is told to, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DUPLICATE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        (DUPLICATE, bytes(4), None, "'a' stands twice"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), None, "not a sound safetensors file"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20), None, "not a sound safetensors file"),
        ({"a": entry(0, 8, [3])}, bytes(8), None, "not a sound safetensors file"),
        ({"a": entry(0, 4, [1])}, bytes(8), None, "not a sound safetensors file"),
        ({"a": entry(0, 4, [2**40, 2**40])}, bytes(4), None, "not a sound safetensors file"),
        ({"a": entry(0, 4, [1], "F99")}, bytes(4), None, "F99"),
        ({"a": entry(0, 1, [2], "F4")}, bytes(1), None, "a has element type F4"),
        ({}, b"", 1 << 62, "header too large"),
        ({}, b"", 500, "not a sound safetensors file"),
        (b"not json", b"", None, "not a sound safetensors file"),
        (b"\xff\xfe{}", b"", None, "not a sound safetensors file"),
        ([], b"", None, "not a sound safetensors file"),
        ({"a": ["F32", [1], [0, 4]]}, bytes(4), None, "a is told in another way"),
        ({"a": entry(0, 4, [1]) | {"dtype": {"F32": None}}}, bytes(4), None, "a is told in another way"),
    ],
)
def test_an_unsound_file_is_refused(source, refused, header, data, length, words):
    raw(source / FIRST, header, data, length)
    message = refused()
    assert str(source / FIRST) in message
    assert words in message


def test_a_truncated_file_is_refused_at_every_length(source):
    whole = (source / FIRST).read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        (source / FIRST).write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"{FIRST}.*Download or copy it again"):
            read_shard(source / FIRST)


@pytest.mark.parametrize("size", [0x0280, 0x0480])
def test_a_cut_file_whose_length_reads_as_the_head_of_a_pickle_is_called_cut(source, refused, size):
    header = json.dumps({"a": entry(0, 8, [2])}).encode().ljust(size)
    raw(source / FIRST, header, bytes(4), None)
    assert "Download or copy it again" in refused()


def test_a_git_lfs_pointer_is_called_by_its_name(source, refused):
    (source / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "git lfs pull" in refused()


def test_a_directory_in_place_of_a_file_is_refused(source, refused):
    (source / INDEX).unlink()
    (source / FIRST).unlink()
    (source / FIRST).mkdir()
    assert f"{FIRST}: no file, but called like one of the model" in refused()


def test_an_index_of_nothing_holds_no_experts(source, refused):
    for file in source.glob("*.safetensors"):
        file.unlink()
    (source / INDEX).write_text('{"weight_map": {}}')
    assert "no expert weights found" in refused(4)


def edit_index(source: Path, **changes: str | None) -> None:
    index = json.loads((source / INDEX).read_text())
    index["weight_map"] = {n: s for n, s in (index["weight_map"] | changes).items() if s is not None}
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ghost": FIRST}, f"puts ghost into {FIRST}"),
        ({GATE: SECOND}, f"puts {GATE} into {SECOND}, but it is in {FIRST}"),
        ({GATE: None}, f"{GATE} is in {FIRST}, but not in the index"),
        (
            {"ghost": "model-00009-of-00003.safetensors"},
            "shards that it names are missing, the first is 'model-00009-of-00003.safetensors'",
        ),
        ({"ghost": "../in/" + FIRST}, f"the name '../in/{FIRST}'"),
        ({"ghost": "/etc/passwd"}, "the name '/etc/passwd'"),
        ({"ghost": ".."}, "the name '..'"),
        ({"ghost": ""}, "the name ''"),
    ],
)
def test_an_index_that_disagrees_with_the_shards_is_refused(source, refused, change, words):
    assert json.loads((source / INDEX).read_text())["weight_map"][GATE] == FIRST
    edit_index(source, **change)
    assert words in refused()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (INDEX, "{", "cannot be read as JSON"),
        (INDEX, "[]", "expected a JSON object, found list"),
        (INDEX, "{}", "weight_map"),
        (INDEX, '{"weight_map": ["a"]}', "weight_map"),
        (INDEX, '{"weight_map": {"a": 5}}', "weight_map"),
        (INDEX, '{"weight_map": {}, "weight_map": {}}', "'weight_map' stands twice"),
        ("config.json", "{'model_type'", "cannot be read as JSON"),
        ("config.json", "[" * 100_000, "cannot be read as JSON"),
        ("config.json", "[]", "expected a JSON object, found list"),
        ("config.json", '{"moe_layout": 7, "model_type": "qwen3_moe"}', "expected an object, found 7"),
    ],
)
def test_json_that_is_not_what_it_should_be_is_refused(source, refused, name, text, words):
    (source / name).write_text(text)
    message = refused()
    assert words in message
    assert name in message or "record" in message


def test_an_index_without_tensors_is_no_reason_to_take_whatever_lies_there(source, refused):
    (source / INDEX).write_text('{"weight_map": {}}')
    assert f"{FIRST}: called like a shard, but the index does not name it" in refused()


def test_a_left_over_shard_is_refused(source, refused):
    """It would be carried over as a side file, and could take the place of a shard of the output."""
    (source / "model.safetensors").write_bytes((source / FIRST).read_bytes())
    assert "model.safetensors: called like a shard" in refused()


def test_a_tensor_in_two_shards_is_refused(source, refused):
    (source / INDEX).unlink()
    for number, file in enumerate(sorted(source.glob("*.safetensors"))):
        file.rename(source / f"part{number}.safetensors")  # none is called as a model's file is, so that all are the model
    (source / "part9.safetensors").write_bytes((source / "part1.safetensors").read_bytes())
    assert "stands in both part1.safetensors and part9.safetensors" in refused()


def test_files_that_are_cut_for_tensor_parallelism_are_called_so(source, refused):
    """Grok-2: eight files with the same names, each with a part of every expert."""
    for file in [source / INDEX, *sorted(source.glob("*.safetensors"))[1:]]:
        file.unlink()
    whole = next(source.glob("*.safetensors"))
    for rank in range(2):
        (source / f"pytorch_model-00007-TP-00{rank}.safetensors").write_bytes(whole.read_bytes())
    whole.unlink()
    assert "cut for tensor parallelism; join the parts first" in refused()
    index = {"weight_map": dict.fromkeys(load(source), "pytorch_model-00007-TP-001.safetensors")}
    (source / INDEX).write_text(json.dumps(index))  # one part is all that it names
    assert "cut for tensor parallelism, and the index names other parts but not this one" in refused()


@pytest.mark.parametrize("words", [[], ["--family", "qwen3_moe"]])
def test_config_json_may_lack_and_then_the_names_tell(source, words, capsys):
    (source / "config.json").unlink()
    assert main(["--prefuse", str(source), str(source.parent / "out"), "--dry-run", *words]) == 0
    assert ("family told by names: per-expert" in capsys.readouterr().out) == (not words)
    assert main(["--prefuse", str(source), str(source.parent / "out"), "--quiet", *words]) == 0
    assert main(["--verify", str(source), str(source.parent / "out"), "--no-gemm", "--quiet"]) == 0


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("nowhere"), lambda p: p.symlink_to("assets")], ids=["broken", "dir"])
def test_a_link_whose_content_would_be_lost_is_refused(source, refused, make):
    make(source / "link")
    assert f"{source / 'link'}: a link" in refused()


def test_links_to_files_are_followed_as_in_the_cache(source, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(p for p in source.iterdir() if p.is_file())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert main(["--prefuse", str(snapshot), str(tmp_path / "fused"), "--quiet"]) == 0
    assert main(["--split", str(tmp_path / "fused"), str(tmp_path / "back"), "--quiet"]) == 0
    assert same(load(tmp_path / "back"), tensors(QWEN))
    assert not any(file.is_symlink() for file in (tmp_path / "back").iterdir())


def test_empty_scalar_and_unaligned_tensors_and_every_element_type_survive(tmp_path):
    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN), shards=1)
    (source / "model.safetensors").rename(source / "experts.safetensors")
    rng = np.random.default_rng(0)
    header: dict[str, dict] = {"odd": entry(0, 3, [3], "U8")}  # so that nothing behind it is aligned
    end = 3
    for dtype in DTYPES:
        for shape in ([], [0], [2, 0, 3], [5], [2, 3]):
            size = int(np.prod(shape)) * itemsize(dtype)
            header[f"{dtype}{shape}"] = entry(end, end + size, shape, dtype)
            end += size
    raw(source / "odd.safetensors", header, data := rng.bytes(end))
    assert main(["--prefuse", str(source), str(tmp_path / "fused"), "--quiet", "--max-shard-size", "3000"]) == 0
    assert main(["--split", str(tmp_path / "fused"), str(tmp_path / "back"), "--quiet"]) == 0
    for file in source.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    reader = open_checkpoint(tmp_path / "fused")
    for name, spec in header.items():
        begin, stop = spec["data_offsets"]
        array = reader.read(name, (slice(None),) * len(spec["shape"]))
        assert isinstance(array, np.ndarray)
        assert array.shape == tuple(spec["shape"])
        assert array.tobytes() == data[begin:stop]
    reader.close()


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for path, words in ((tmp_path, "no safetensors and no Orbax checkpoint"), (tmp_path / "none", "no such directory")):
        assert main(["--prefuse", str(path), str(tmp_path.parent / "out"), "--quiet"]) == 3
        assert words in capsys.readouterr().err
