"""Chunks that are kept are decoded by nobody: the verdict says so, and `--decode` does it."""

import json
from contextlib import closing

import pytest
import tensorstore as ts

import convert
from convert import cli
from convert.errors import InputError, UsageError
from layouts.checkpoint import open_checkpoint
from layouts.orbax.digest import _named, unread
from layouts.orbax.reader import OrbaxReader
from scripts.make_checkpoint import make_checkpoint
from tests.orbax.test_keep import PATH, save, spec

HEADER = 18
"""Bytes of a zstd frame's header at most; damage behind it shows only when it is decoded."""
DAMAGE = {
    "cut off": lambda raw: raw[:-9],
    "cut off behind its header": lambda raw: raw[:HEADER],
    "garbage behind its header": lambda raw: raw[:7] + b"\xff" * (len(raw) - 7),  # a block of a kind that there is not
}


EXPERT, TWO = (1, 4, 20, 24), (2, 4, 20, 24)
ZSTD = {"codecs": ["bytes", {"name": "zstd", "configuration": {"level": 1}}]}


def store(path, stored, **how):
    """Store gate and up again in this way."""
    for name in ("wi_0", "wi_1"):
        place = spec(path, f"{PATH}.{name}", True, False)
        values = ts.open(place).result().read().result()
        again = {"create": True, "delete_existing": True, "dtype": "bfloat16", "shape": values.shape}
        ts.open(place | stored, **how, **again).result().write(values).result()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint with a directory for each array, whose chunks are experts."""
    path = tmp_path_factory.mktemp("decode") / "in"
    save(path, EXPERT, ocdbt=False)
    store(path, {"metadata": ZSTD}, chunk_layout=ts.ChunkLayout(read_chunk_shape=EXPERT, write_chunk_shape=EXPERT))
    return path


@pytest.fixture
def source(sound, tmp_path):
    """A copy of it."""
    for file in (file for file in sound.rglob("*") if file.is_file()):
        copy = tmp_path / "in" / file.relative_to(sound)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return tmp_path / "in"


def chunk(path, name):
    return next(file for file in sorted((path / f"{PATH}.{name}" / "c").rglob("*")) if file.is_file())


def damage(file, how):
    file.write_bytes(how(file.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_decoded_is_a_difference_though_the_digests_agree(kind, source, tmp_path, capsys):
    damage(chunk(source, "wi_0"), DAMAGE[kind])
    out = str(tmp_path / "out")
    convert.prefuse(source, out)  # kept as they are
    assert cli.main(["--verify", "--quiet", out]) == 0
    assert cli.main(["--verify", "--quiet", "--decode", "--memory", "300MiB", out]) == 1
    text = capsys.readouterr().out
    assert f"{PATH}.wi (in " in text
    assert "cannot be decoded" in text


def test_the_verdict_says_what_was_not_decoded(source, tmp_path):
    convert.prefuse(source, tmp_path / "out")
    verdict = convert.verify(tmp_path / "out")
    every = (file.relative_to(tmp_path / "out") for file in (tmp_path / "out").rglob("*") if file.is_file())
    files = [tmp_path / "out" / file for file in every if "c" in file.parts]  # a scalar's is called just so
    nbytes = sum(file.stat().st_size for file in files)
    assert f"{len(files)} chunks of {nbytes:,} bytes were not decoded; --decode reads them" in str(verdict)
    whole = convert.verify(tmp_path / "out", decode=True)
    assert whole.equal
    assert [level.name for level in whole.levels] == ["files", "digests", "manifest", "decoded"]
    assert "not decoded" not in str(whole)


SAID = {
    False: {".zarray": (b'"order": "C"', b'"order": "F"'), "commit_success.txt": (b"a", b"b")},
    True: {"zarr.json": (b'"fill_value": 0.0', b'"fill_value": 1.0')},
}
"""What is said of kept chunks, whose bytes are hashed as stored: files by the version of zarr, and edits that keep sizes."""


@pytest.mark.parametrize("zarr3", SAID)
def test_what_arrays_say_of_themselves_is_compared(tmp_path, zarr3):
    save(tmp_path / "in", TWO, zarr3=zarr3, ocdbt=False)
    (tmp_path / "in" / "commit_success.txt").write_text("a")
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert convert.verify(tmp_path / "out").equal
    for name, (old, new) in SAID[zarr3].items():
        file = next(file for file in sorted((tmp_path / "out").rglob(name)) if old in file.read_bytes())
        damage(file, lambda raw, old=old, new=new: raw.replace(old, new))
        (line,) = next(level for level in convert.verify(tmp_path / "out").levels if level.name == "files").differences
        assert line == f"{file.relative_to(tmp_path / 'out')} is not what was written"
        damage(file, lambda raw, old=old, new=new: raw.replace(new, old))
    manifest = tmp_path / "out" / "convert_manifest.json"  # of an earlier version, which counted these files in their folders
    found = json.loads(manifest.read_text())
    for name in [name for name in found["files"] if name.endswith((*SAID[zarr3], "commit_success.txt"))]:
        entry, folder = found["files"].pop(name), found["files"].get(f"{name.rpartition('/')[0]}/", {})
        folder |= {"files": folder.get("files", 0) + 1, "size": folder.get("size", 0) + entry["size"]}
    manifest.write_text(json.dumps(found))
    assert not convert.verify(tmp_path / "out").levels[0].differences


def test_what_nobody_reads_of_a_database_is_said(tmp_path):
    """Each byte that the tree names is looked at; of the others the verdict says how many there are."""
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, layers=1, embed=8, mlp=8)
    out = tmp_path / "out"
    convert.reformat(tmp_path / "in", out, to="orbax")
    with closing(open_checkpoint(out)) as reader:
        item, dead = reader.item, unread(reader)
        places = [place.split(":") for place in _named(reader)]
    named = {place[2].removeprefix("d/"): int(place[3]) + int(place[4]) // 2 for place in places}
    files = {file.name: file for file in item.rglob("*") if file.parent.name == "d"}
    assert named.keys() < files.keys()
    assert sum(file.stat().st_size for name, file in files.items() if name not in named) <= dead
    assert f"; {dead:,} bytes that no tree names were not looked at" in str(convert.verify(out))
    (manifest,) = item.glob("ocdbt.process_*/manifest.ocdbt")
    lost = files[min(files.keys() - named.keys())]
    for file, at in ((lost, 0), *((files[name], named[name]) for name in sorted(named)[:3]), (manifest, 20)):
        sound = file.read_bytes()
        file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        assert _is_equal(out) == (file == lost), (file, at)
        file.write_bytes(sound)


def _is_equal(path):
    try:
        return convert.verify(path).equal
    except InputError:
        return False


def test_decode_is_within_memory_and_of_every_array(source, tmp_path, monkeypatch):
    convert.prefuse(source, tmp_path / "out")
    held, read, hold, whole = [], set(), OrbaxReader.hold, OrbaxReader.read
    monkeypatch.setattr(OrbaxReader, "hold", lambda self, *limits: held.append(limits) or hold(self, *limits))
    monkeypatch.setattr(OrbaxReader, "read", lambda self, name, part: read.add(name) or whole(self, name, part))
    assert convert.verify(tmp_path / "out", decode=True, memory="200MiB").equal
    assert [windows.limit for _, windows in held] == [(200 << 20) // 8]
    with closing(open_checkpoint(tmp_path / "out")) as reader:
        assert read == set(reader.tensors)


def test_decode_is_for_one_checkpoint(source):
    with pytest.raises(UsageError, match="decode=True is for one checkpoint"):
        convert.verify(source, source, decode=True)


def test_a_shard_ends_in_a_crc_of_its_index(source, tmp_path):
    store(source, {}, chunk_layout=ts.ChunkLayout(read_chunk_shape=EXPERT, write_chunk_shape=TWO))
    metadata = json.loads((source / f"{PATH}.wi_0" / "zarr.json").read_text())
    assert metadata["codecs"][0]["name"] == "sharding_indexed"
    convert.prefuse(source, tmp_path / "out")
    assert convert.verify(tmp_path / "out", decode=True).equal
    damage(chunk(source, "wi_0"), lambda raw: raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    with pytest.raises(InputError, match=r"wi_0: the index of shard c/0/0/0/0 cannot be read: DATA_LOSS"):
        convert.prefuse(source, tmp_path / "other")
