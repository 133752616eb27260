"""The output's model card says how its experts are stored; the way back takes exactly that away."""

import json
import re
import shlex

import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.card import CARD, command
from convert.cli import main
from convert.options import Choices, Running
from layouts.card import MOST, add, strip
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.tiny import adapter, whole

CARDS = {
    "none": None,
    "empty": b"",
    "front matter, CRLF, no newline": b"---\r\nlicense: mit\r\n---\r\n# A model",
    "ours, of another": add(b"# Another\n", "ours\n"),
    "not UTF-8": "# é\n".encode("latin1"),
    "huge": b"# A model\n" + b" " * MOST,
    "too large to hold": b"# A model\n" + b" " * (2 * MOST),
}


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)


def put(path, card):
    (path / CARD).unlink(missing_ok=True)
    if card is not None:
        (path / CARD).write_bytes(card)


def card_of(path):
    return (path / CARD).read_bytes() if (path / CARD).exists() else None


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_there_and_back(checkpoint, tmp_path, card):
    put(checkpoint, card)
    fused, other, back = (tmp_path / name for name in ("fused", "other", "back"))
    told = convert.prefuse(checkpoint, fused)
    convert.prefuse(fused, other, layout="transformers")
    convert.split(other, back)
    assert card_of(back) == card
    for one in (fused, other, back):
        assert convert.verify(checkpoint, one, gemm=False).equal
        assert convert.verify(one).equal
    for source, out, action in ((checkpoint, fused, convert.prefuse), (other, back, convert.split)):
        assert action(source, out).proof
    plain = card is None or (len(card) <= MOST and card.isascii())
    assert plain == (not told.notes)
    assert card_of(fused) == card if not plain else strip(card_of(fused)) == card
    assert plain or f"{CARD} is no text of at most 1,048,576 bytes" in told.notes[0]


def test_the_command_and_what_it_made(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    words = [
        "--prefuse",
        str(checkpoint),
        str(out),
        "--layout",
        "per-shard",
        "--shards",
        "2",
        "--align",
        "maxtext",
        "--content",
    ]
    assert main([*words, "--max-shard-size", "1000", "--jobs", "1", "--quiet", "--family", "qwen3_moe"]) == 0
    text = card_of(out).decode()
    assert str(tmp_path) not in text
    command = "convert --prefuse IN OUT --content --layout per-shard --shards 2 --align maxtext --family qwen3_moe"
    assert f"    {command} --max-shard-size 1000\n" in text
    assert "`e ... k (s=2 g n%256)`" in text
    assert re.findall("sha256:([0-9a-f]{64})", capsys.readouterr().out)[0] in text
    assert main([*_said(text, tmp_path, IN="in", OUT="again"), "--quiet", "--jobs", "2"]) == 0
    assert card_of(tmp_path / "again") == card_of(out)
    (back,) = re.findall("`(convert --split .*?)`", text)
    assert main([*shlex.split(back.replace("OUT", str(out)).replace("BACK", str(tmp_path / "back")))[1:], "--quiet"]) == 0
    assert card_of(tmp_path / "back") == card_of(checkpoint)


def _said(text, folder, **places):
    """The words of the command in a card."""
    words = shlex.split(next(line for line in text.splitlines() if line.startswith("    convert ")))[1:]
    return [str(folder / places[word]) if word in places else word for word in words]


def test_between_formats(checkpoint, tmp_path):
    put(checkpoint, None)
    tree, plain, back = (tmp_path / name for name in ("tree", "plain", "back"))
    convert.prefuse(checkpoint, tree, to="orbax")
    text = card_of(tree).decode()
    assert "layout `concat` of Orbax (MaxText)" in text
    assert "`convert --split --to hf OUT BACK`" in text
    assert convert.verify(checkpoint, tree, gemm=False).equal
    convert.split(tree, plain)
    convert.split(tree, back, to="hf")
    assert card_of(plain) is card_of(back) is None


@pytest.mark.parametrize("edit", [b"# edited", "## How the experts are stored here"], ids=["the card", "the section"])
def test_an_edit_is_a_difference(checkpoint, tmp_path, edit):
    convert.prefuse(checkpoint, tmp_path / "out")
    card = card_of(tmp_path / "out")
    put(tmp_path / "out", edit + card if isinstance(edit, bytes) else card.replace(edit.encode(), b"## Elsewhere"))
    verdict = convert.verify(checkpoint, tmp_path / "out", gemm=False)
    assert [str(each) for level in verdict.levels for each in level.differences] == [f"{CARD} differs"]
    assert not convert.verify(tmp_path / "out").equal
    with pytest.raises(convert.OutputError, match=f"is not what was written: {CARD}"):
        convert.prefuse(checkpoint, tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    assert card_of(tmp_path / "back") == (strip(card_of(tmp_path / "out")))


def test_a_card_of_the_input_that_has_changed_is_seen(checkpoint, tmp_path):
    convert.prefuse(checkpoint, tmp_path / "out")
    put(checkpoint, b"# another\n")
    with pytest.raises(convert.OutputError, match=f"was made from another input: {CARD} differs"):
        convert.prefuse(checkpoint, tmp_path / "out")
    put(tmp_path / "out", None)
    assert f"{CARD} is only in {checkpoint}" in str(convert.verify(checkpoint, tmp_path / "out", gemm=False))


def test_a_card_that_outlived_its_record_is_put_right(checkpoint, tmp_path):
    fused, back = tmp_path / "fused", tmp_path / "back"
    convert.prefuse(checkpoint, fused, layout="transformers")
    (fused / "convert_manifest.json").unlink()
    config = json.loads((fused / "config.json").read_text())
    del config["moe_layout"]
    (fused / "config.json").write_text(json.dumps(config))
    save_file(load_file(fused / "model.safetensors"), fused / "model.safetensors", {"format": "pt"})
    convert.split(fused, back)
    assert card_of(back) == card_of(checkpoint)
    assert convert.verify(checkpoint, back, gemm=False).equal


def test_a_directory_and_a_link(checkpoint, tmp_path):
    put(checkpoint, None)
    (tmp_path / "elsewhere").write_bytes(b"# linked\n")
    (checkpoint / CARD).symlink_to(tmp_path / "elsewhere")
    convert.prefuse(checkpoint, tmp_path / "linked")
    assert strip(card_of(tmp_path / "linked")) == b"# linked\n"
    assert (tmp_path / "elsewhere").read_bytes() == b"# linked\n"
    (checkpoint / CARD).unlink()
    (checkpoint / CARD).mkdir()
    (checkpoint / CARD / "page").write_text("1")
    told = convert.prefuse(checkpoint, tmp_path / "folder")
    assert f"{CARD} is a directory" in told.notes[0]
    assert (tmp_path / "folder" / CARD / "page").read_text() == "1"
    assert convert.verify(checkpoint, tmp_path / "folder", gemm=False).equal


def test_a_tree_that_is_saved_keeps_its_card(checkpoint, tmp_path):
    convert.prefuse(checkpoint, tmp_path / "fused")
    params = convert.load(tmp_path / "fused", layout="concat")
    convert.save(params, tmp_path / "saved", like=tmp_path / "fused", layout="concat")
    assert card_of(tmp_path / "saved") == card_of(tmp_path / "fused")


def test_an_adapter_has_a_card_as_well(tmp_path):
    given = adapter(tmp_path / "in", whole("per-expert"))
    convert.prefuse(given, tmp_path / "fused")
    text = card_of(tmp_path / "fused").decode()
    assert strip(text.encode()) == card_of(given)
    assert "    convert --prefuse IN OUT\n" in text
    assert convert.prefuse(given, tmp_path / "fused").proof
    convert.split(tmp_path / "fused", tmp_path / "back")
    assert card_of(tmp_path / "back") == card_of(given)
    put(given, b"\xff")
    assert f"{CARD} is no text" in convert.prefuse(given, tmp_path / "other").notes[0]


def test_an_adapter_without_a_card_is_split_without_one(tmp_path):
    given = adapter(tmp_path / "in", whole("per-expert"))
    (given / CARD).unlink()
    convert.prefuse(given, tmp_path / "fused")
    assert card_of(tmp_path / "fused")
    convert.split(tmp_path / "fused", tmp_path / "back")
    assert card_of(tmp_path / "back") is None


def test_a_card_names_no_place():
    """Where the checkpoint is whose devices a tree is cut for is nobody's business but the user's."""
    choices = Choices(to="orbax", sharding="/home/me/run", base="/home/me/base")
    said = command("prefuse", choices, Running())
    assert said == "convert --prefuse IN OUT --to orbax --base BASE --sharding SHARDING"
