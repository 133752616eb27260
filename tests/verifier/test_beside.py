"""What stands beside the tensors is compared, too: an edited config, tokenizer, header or record is a difference, by name."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import convert
from convert.errors import InputError
from convert.verifier.files.beside import compare_files
from convert.verifier.files.leaves import compare_leaves
from convert.verifier.verdict import Level
from layouts.checkpoint import open_checkpoint
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import save

CONFIG = "config.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("beside")
    make_checkpoint(root / "in", family="qwen3_moe", experts=4, embed=8, mlp=4, layers=2, values="normal")
    config = json.loads((root / "in" / CONFIG).read_text())
    config |= {"rope_theta": 1e6, "norm_topk_prob": True, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    (root / "in" / CONFIG).write_text(json.dumps(config))
    (root / "in" / "tokenizer.json").write_text('{"a": 1}')
    (root / "in" / "assets").mkdir()
    (root / "in" / "assets" / "chat.jinja").write_text("{{ messages }}")
    convert.prefuse(root / "in", root / "out")
    convert.split(root / "out", root / "again")
    convert.reformat(root / "in", root / "tree", to="orbax")
    convert.prefuse(root / "tree", root / "fused-tree")
    return root


def files(a: Path, b: Path) -> Level:
    return next(level for level in convert.verify(a, b, gemm=False).levels if level.name == "files")


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


PAIRS = [("in", "out"), ("out", "in"), ("in", "again"), ("in", "tree"), ("tree", "fused-tree"), ("in", "fused-tree")]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_what_we_make_has_no_differences(root, a, b):
    level = files(root / a, root / b)
    assert level.state == "equal", level
    assert re.match(r"\d+ keys of config.json, [2-9] side files by their digests", level.covered)


def test_what_orbax_keeps_of_a_step_is_compared_wherever_it_lies(root, tmp_path):
    """Beside safetensors it is a side file, which was compared with nothing."""
    for name, said in (("a", 1), ("b", 2)):
        shutil.copytree(root / "in", tmp_path / name)
        (tmp_path / name / "_CHECKPOINT_METADATA").write_text(
            json.dumps({"custom_metadata": said, "init_timestamp_nsecs": said})
        )
    level = files(tmp_path / "a", tmp_path / "b")
    assert level.differences == ("_CHECKPOINT_METADATA: custom_metadata is 1 in one, 2 in the other",)


LEAVES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no kind": (lambda leaf: leaf["key_metadata"][0].update(key_type=7), "and a key of kind 7, which Orbax has not (1 leaves)"),
    "a text": (
        lambda leaf: leaf["key_metadata"][0].update(key_type="2"),
        "and a key of kind '2', which Orbax has not (1 leaves)",
    ),
    "skipped": (lambda leaf: leaf["value_metadata"].update(skip_deserialize=True), "so Orbax does not restore it"),
}


@pytest.mark.parametrize("against", ["in", "fused-tree"])
@pytest.mark.parametrize("edit", LEAVES)
def test_what_orbax_says_of_a_leaf_is_looked_at(root, tmp_path, edit, against):
    """`0` of a list and `0` of a dictionary are one name."""
    change, line = LEAVES[edit]
    tree = shutil.copytree(root / "tree", tmp_path / "tree")

    def first(found: dict[str, Any]) -> None:
        name = next(name for name in found["tree_metadata"] if "router" in name or "gate" in name or "norm" in name)
        change(found["tree_metadata"][name])

    edited(next(tree.rglob("_METADATA")), first)
    found = files(root / against, tree).differences
    assert sum(line in each for each in found) == 1, found


@pytest.mark.parametrize("kind", [[], {}, [2]], ids=str)
def test_a_kind_that_is_no_value_is_refused(root, tmp_path, kind):
    tree = shutil.copytree(root / "tree", tmp_path / "tree")
    edited(
        next(tree.rglob("_METADATA")),
        lambda found: next(iter(found["tree_metadata"].values()))["key_metadata"][0].update(key_type=kind),
    )
    with pytest.raises(InputError, match=r"_METADATA: .*key_type is"):
        open_checkpoint(tree)


def test_leaves_are_counted_where_nothing_else_is_beside_them(root, tmp_path):
    save(tmp_path / "bare", {"params": {"norm": np.ones(3, "f4"), "head": np.ones(2, "f4")}})
    with closing(open_checkpoint(tmp_path / "bare")) as one, closing(open_checkpoint(root / "tree")) as tree:
        alone, count = compare_files(one, one), 2 * len(tree.leaves)
    assert (alone.state, alone.compared) == ("equal", 4)
    assert f"shards, kinds of {count} leaves, records" in files(root / "tree", root / "tree").covered


def test_a_list_is_no_dictionary_with_the_same_names():
    def tree(kind: int) -> Any:
        keys = [{"key": "params", "key_type": 2}, {"key": "0", "key_type": kind}]
        leaf = SimpleNamespace(kind="np.ndarray", entry={"key_metadata": keys, "value_metadata": {"skip_deserialize": False}})
        return SimpleNamespace(path=Path("tree"), leaves={"params.0": leaf})

    assert list(compare_leaves(tree(1), tree(1))) == []
    wanted = "_METADATA: below params is an index of a list in one, a key of a dictionary in the other"
    assert list(compare_leaves(tree(1), tree(2))) == [wanted]


def test_the_records_of_two_models_do_not_hide_what_they_are(root, tmp_path):
    """What the record of one side says of the other is taken where it fits; here that is another family."""
    make_checkpoint(tmp_path / "mixtral", family="mixtral", experts=4, embed=8, mlp=4, layers=2)
    verdict = convert.verify(tmp_path / "mixtral", root / "out", gemm=False)
    assert not verdict.equal
    assert any(level.differences for level in verdict.levels if level.name == "exact")


EDITS = {
    "hidden_act": "gelu",
    "model_type": "olmoe",
    "num_experts_per_tok": 1,
    "norm_topk_prob": False,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": 8.0},
    "eos_token_id": 5,
}


@pytest.mark.parametrize("key", EDITS)
@pytest.mark.parametrize("pair", [("in", "out"), ("in", "tree"), ("tree", "fused-tree")])
def test_an_edited_key_is_named_with_both_values(root, tmp_path, key, pair):
    a, b = root / pair[0], shutil.copytree(root / pair[1], tmp_path / "b")
    before = json.loads((a / CONFIG).read_text()).get(key)
    edited(b / CONFIG, lambda config: config.update({key: EDITS[key]}))
    old, new, name = before, EDITS[key], key
    if key == "rope_scaling":
        old, new, name = 4.0, 8.0, "rope_scaling.factor"
    told = "absent" if old is None else json.dumps(old)
    assert files(a, b).differences == (f"config.json: {name} is {told} in one, {json.dumps(new)} in the other",)


def test_side_files_are_compared_by_their_digests_and_missing_ones_named(root, tmp_path):
    b = shutil.copytree(root / "out", tmp_path / "b")
    (b / "tokenizer.json").write_text('{"a": 2}')
    (b / "assets" / "chat.jinja").unlink()
    (b / "pytorch_model.bin").write_bytes(b"other weights")
    (b / "metal").mkdir()
    (b / "metal" / "model.json").write_text("{}")
    assert files(root / "in", b).differences == ("tokenizer.json differs", f"assets/chat.jinja is only in {root / 'in'}")


def test_a_format_that_lacks_files_is_not_another_model(root, tmp_path):
    tree = shutil.copytree(root / "tree", tmp_path / "tree")
    (tree / "assets" / "chat.jinja").unlink()
    (tree / CONFIG).unlink()
    level = files(root / "in", tree)
    assert level.state == "equal"
    assert f"; not compared: assets/chat.jinja is only in {root / 'in'}" in level.covered


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A shard with another header."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


@pytest.mark.parametrize("side", ["out", "again"])
def test_metadata_of_shards(root, tmp_path, side):
    b = shutil.copytree(root / side, tmp_path / "b")
    rewritten(sorted(b.glob("*.safetensors"))[0], lambda header: header.setdefault("__metadata__", {}).update(source="x"))
    line, header = files(root / "in", b).differences
    assert line.startswith("__metadata__")
    assert line.endswith('source is absent in one, "x" in the other')
    assert header == f"{b}: the header of {sorted(b.glob('*.safetensors'))[0].name} is not what was written"


MANIFEST = "convert_manifest.json"
CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "layout": (lambda found: found.update(layout="vllm"), f"{MANIFEST} is not what was written"),
    "shape": (lambda found: found["tensors"]["lm_head.weight"]["shape"].reverse(), f"{MANIFEST} is not what was written"),
    "texts": (lambda found: found["original"]["texts"].clear(), f"{MANIFEST} is not what was written"),
    "seal": (lambda found: found.pop("xxh3_128"), f"{MANIFEST} has no digest of itself"),
    "no manifest": (lambda found: found.pop("tensors"), "not a manifest of this version"),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("pair", [("in", "out"), ("in", "again"), ("tree", "fused-tree"), ("in", "fused-tree")])
def test_a_manifest_is_looked_at_beside_another_checkpoint_too(root, tmp_path, what, pair):
    """Alone it was DIFFERENT, and EQUAL beside the checkpoint that it was made of."""
    b = shutil.copytree(root / pair[1], tmp_path / "b")
    change, words = CHANGES[what]
    if what == "texts" and "original" not in json.loads((b / MANIFEST).read_text()):
        return
    if what == "shape" and pair[1].endswith("tree"):
        change = lambda found: next(iter(found["tensors"].values()))["shape"].append(1)  # noqa: E731
    edited(b / MANIFEST, change)
    assert any(str(b) in line and words in line for line in files(root / pair[0], b).differences)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.experts.wi"])
def test_a_header_with_a_word_too_many(root, tmp_path, name):
    b = shutil.copytree(root / "out", tmp_path / "b")
    rewritten(next(b.glob("*.safetensors")), lambda header: header[name].update(more=1))
    assert files(root / "in", b).differences == (f"{b}: the header of model.safetensors is not what was written",)


def test_what_an_earlier_version_wrote_without_a_digest_is_no_difference(root, tmp_path):
    b = shutil.copytree(root / "out", tmp_path / "b")
    edited(b / MANIFEST, lambda found: [found.pop("xxh3_128"), found.pop("headers"), found.update(tool="0.1.0")])
    assert files(root / "in", b).state == "equal"


def test_the_word_for_the_layout_is_that_of_what_it_describes(root, tmp_path):
    b = shutil.copytree(root / "out", tmp_path / "b")
    edited(b / CONFIG, lambda config: config["moe_layout"].update(layout="vllm"))
    record = json.loads((b / CONFIG).read_text())["moe_layout"]
    for shard in b.glob("*.safetensors"):
        rewritten(shard, lambda header: header["__metadata__"].update(moe_layout=json.dumps(record)))
    edited(b / "convert_manifest.json", lambda manifest: manifest.update(record=record))
    lines = files(root / "in", b).differences
    assert f"{b}: the record calls its layout 'vllm', but wi is stored as 'e ... k (g n)'" in lines


def test_scan_layers(root, tmp_path):
    b = shutil.copytree(root / "tree", tmp_path / "b")
    edited(b / "0" / "_CHECKPOINT_METADATA", lambda step: step["custom_metadata"].update(scan_layers=False))
    assert files(root / "tree", b).differences == (
        "_CHECKPOINT_METADATA: custom_metadata.scan_layers is true in one, false in the other",
    )
    assert files(root / "in", b).differences == (
        "_CHECKPOINT_METADATA: scan_layers is false, but the tree's layers are stacked",
    )
