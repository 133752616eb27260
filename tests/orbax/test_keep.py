"""Chunks of the input that are chunks of the output move as they are stored; others are written anew, to the same tensors."""

import json
import re
import shutil
from contextlib import closing
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import xxhash

import convert
from convert.commit.files import Folder
from convert.orbax import write
from convert.orbax.keeping import moves
from convert.orbax.keeping.keep import keep
from convert.planning.planner import make_plan
from layouts.checkpoint import open_checkpoint
from layouts.orbax.chunks import chunks_of, contents, key_at
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import restore

E, L, K, N = 6, 4, 20, 24
PATH = "params.params.decoder.layers.moe_block"
RANDOM = np.random.default_rng(0)
KEPT = {
    "experts": (2, 4, 20, 24),
    "rows": (6, 4, 5, 24),
    "columns": (6, 4, 20, 2),
    "all": (2, 3, 8, 12),
    "ragged": (4, 3, 7, 24),
    "single rows": (1, 1, 1, 24),
    "one": (6, 4, 20, 24),
}
CUT = {"askew": (6, 4, 20, 16), "askew and small": (1, 2, 3, 5), "larger than n": (6, 4, 20, 32)}


def noise(*shape):
    return RANDOM.integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)


def spec(item, name, zarr3, ocdbt=True):
    kvstore = {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"} if ocdbt else f"file://{item}/{name}/"
    return {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}


def save(path, chunk, *, zarr3=True, ocdbt=True):
    """A checkpoint of Orbax's whose experts have been stored again with these chunks."""
    moe = {"wi_0": noise(E, L, K, N), "wi_1": noise(E, L, K, N), "wo": noise(E, L, N, K), "gate": {"kernel": noise(K, L, E)}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=zarr3, use_ocdbt=ocdbt)) as checkpointer:
        tree = {"params": {"params": {"decoder": {"layers": {"moe_block": moe}}}}, "step": 3}
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    for name in ("wi_0", "wi_1"):
        zstd = {} if zarr3 else {"metadata": {"compressor": {"id": "zstd", "level": 1}}}  # blosc by default
        made = ts.open(
            spec(path, f"{PATH}.{name}", zarr3, ocdbt) | zstd,
            create=True,
            delete_existing=True,
            dtype="bfloat16",
            shape=moe[name].shape,
            chunk_layout=ts.ChunkLayout(read_chunk_shape=chunk, write_chunk_shape=chunk),
        ).result()
        made.write(moe[name]).result()
    return moe


def raw(array):
    return array.view(np.uint16)


def values(item, name):
    store = ts.KvStore.open(spec(item, f"{PATH}.{name}", True, (item / "manifest.ocdbt").exists())["kvstore"]).result()
    keys = [key for key in store.list().result() if not key.endswith((b"json", b".zarray"))]
    return {key: store.read(key).result().value for key in keys}


def is_kept(path):
    with closing(open_checkpoint(path)) as reader:
        plan = make_plan(reader, Path("out"), "prefuse")
        return keep(plan, reader) is not None


def check(tmp_path, moe):
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    block = restore(tmp_path / "out")["params"]["params"]["decoder"]["layers"]["moe_block"]
    wi = np.concatenate((raw(moe["wi_0"]), raw(moe["wi_1"])), -1)
    assert sorted(block) == ["gate", "wi", "wo"]
    assert np.array_equal(raw(block["wi"]), wi)
    assert np.array_equal(raw(block["wo"]), raw(moe["wo"]))
    again = restore(tmp_path / "back")["params"]["params"]["decoder"]["layers"]["moe_block"]
    assert all(np.array_equal(raw(again[name]), raw(moe[name])) for name in ("wi_0", "wi_1", "wo"))
    manifest = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
    stored = values(tmp_path / "out", "wi")
    by_place = sorted(stored, key=lambda key: [int(word) for word in re.findall(rb"\d+", key)])
    content = b"".join(stored[key] for key in by_place) if is_kept(tmp_path / "in") else wi.tobytes()
    assert manifest["tensors"][f"{PATH}.wi"]["xxh3_128"] == xxhash.xxh3_128(content).hexdigest()
    assert manifest.get("hashed") == ("stored chunks" if is_kept(tmp_path / "in") else None)
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(tmp_path / "back").equal
    assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal


STORES = [
    pytest.param(zarr3, ocdbt, marks=() if zarr3 == ocdbt else pytest.mark.slow, id=f"{'zarr3' if zarr3 else 'zarr2'}-{place}")
    for zarr3 in (True, False)
    for ocdbt, place in ((True, "database"), (False, "directories"))
]
"""Formats of chunks, in a database or in directories."""


@pytest.mark.parametrize(("zarr3", "ocdbt"), STORES)
@pytest.mark.parametrize("name", KEPT)
def test_chunks_move_as_they_are_stored(name, zarr3, ocdbt, tmp_path):
    moe = save(tmp_path / "in", KEPT[name], zarr3=zarr3, ocdbt=ocdbt)
    assert is_kept(tmp_path / "in")
    check(tmp_path, moe)
    stored = sorted(value for half in ("wi_0", "wi_1") for value in values(tmp_path / "in", half).values())
    assert sorted(values(tmp_path / "out", "wi").values()) == stored
    for half in ("wi_0", "wi_1"):
        assert values(tmp_path / "back", half) == values(tmp_path / "in", half)
        assert not values(tmp_path / "out", half)


@pytest.mark.parametrize(("zarr3", "ocdbt"), STORES)
@pytest.mark.parametrize("name", CUT)
def test_chunks_that_would_be_cut_are_written_anew(name, zarr3, ocdbt, tmp_path):
    moe = save(tmp_path / "in", CUT[name], zarr3=zarr3, ocdbt=ocdbt)
    assert not is_kept(tmp_path / "in")
    check(tmp_path, moe)


@pytest.mark.parametrize("zarr3", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", {**KEPT, **CUT})
def test_all_written_anew_is_the_same(name, zarr3, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.orbax.keeping.keep.ONE", -1)
    monkeypatch.setattr("convert.orbax.keeping.keep._is_one", lambda reader, name: True)
    moe = save(tmp_path / "in", (KEPT | CUT)[name], zarr3=zarr3)
    assert not is_kept(tmp_path / "in")
    check(tmp_path, moe)


def test_a_large_array_of_one_chunk_is_cut_unless_it_should_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.orbax.keeping.keep.ONE", 1000)
    moe = save(tmp_path / "in", KEPT["one"])
    assert not is_kept(tmp_path / "in")
    convert.prefuse(tmp_path / "in", tmp_path / "out", keep_chunks=True)
    assert len(values(tmp_path / "in", "wi_0")) == 1
    assert len(values(tmp_path / "out", "wi")) == 2
    convert.split(tmp_path / "out", tmp_path / "back", keep_chunks=True)
    assert values(tmp_path / "back", "wi_1") == values(tmp_path / "in", "wi_1")
    (tmp_path / "out").rename(tmp_path / "kept")
    (tmp_path / "back").rename(tmp_path / "split")
    check(tmp_path, moe)
    assert convert.verify(tmp_path / "kept", tmp_path / "out", gemm=False).equal


def test_different_codecs_of_gate_and_up_are_written_anew(tmp_path):
    moe = save(tmp_path / "in", KEPT["experts"])
    zstd = {"codecs": ["bytes", {"name": "zstd", "configuration": {"level": 1}}]}
    wanted = {**spec(tmp_path / "in", f"{PATH}.wi_1", True), "metadata": zstd}
    layout = ts.ChunkLayout(read_chunk_shape=KEPT["experts"])
    again = {"create": True, "delete_existing": True, "dtype": "bfloat16", "shape": (E, L, K, N), "chunk_layout": layout}
    ts.open(wanted, **again).result().write(moe["wi_1"]).result()
    assert not is_kept(tmp_path / "in")
    check(tmp_path, moe)


def test_an_interrupted_run_goes_on_and_copies_once(tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    moe = save(tmp_path / "in", KEPT["experts"])
    copied, real = [], Folder.reserve
    monkeypatch.setattr(Folder, "reserve", lambda self, name, *a, **k: (copied.append(name), real(self, name, *a, **k)))
    with monkeypatch.context() as patch:
        patch.setattr(write, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            convert.prefuse(tmp_path / "in", tmp_path / "out")
    first = len(copied)
    report = convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert report.resumed == 4
    assert copied[first:] == ["manifest.ocdbt"]
    convert.split(tmp_path / "out", tmp_path / "back")
    (tmp_path / "out").rename(tmp_path / "first")
    (tmp_path / "back").rename(tmp_path / "second")
    check(tmp_path, moe)


def test_names_of_many_chunks_are_written_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(moves, "RENAMED", 7)
    monkeypatch.setattr("convert.orbax.item._JOINED", 7)
    check(tmp_path, save(tmp_path / "in", KEPT["ragged"]))
    for path in ("out", "back"):
        (tmp_path / path).rename(tmp_path / f"kept {path}")
    monkeypatch.setattr("convert.orbax.write.keep", lambda plan, reader: None)
    for way in (convert.prefuse, convert.split):
        source, out = ("in", "out") if way is convert.prefuse else ("out", "back")
        way(tmp_path / source, tmp_path / out)
        assert convert.verify(tmp_path / out).equal
        assert convert.verify(tmp_path / f"kept {out}", tmp_path / out, gemm=False).equal


def test_renaming_that_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    def files(path):
        return sorted(file.stat().st_size for file in path.rglob("*") if file.is_file())

    monkeypatch.setattr(moves, "RENAMED", 7)
    moe = save(tmp_path / "in", KEPT["rows"])
    convert.prefuse(tmp_path / "in", tmp_path / "once")
    with monkeypatch.context() as patch:
        patch.setattr(moves, "_metadata", fail)  # after all chunks have their new names
        with pytest.raises(KeyboardInterrupt):
            convert.prefuse(tmp_path / "in", tmp_path / "out")
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert len(files(tmp_path / "out")) == len(files(tmp_path / "once"))
    (tmp_path / "out").rename(tmp_path / "resumed")
    check(tmp_path, moe)
    assert convert.verify(tmp_path / "resumed", tmp_path / "out", gemm=False).equal


@pytest.mark.parametrize("anew_first", [True, False])
def test_a_run_that_goes_another_way_begins_anew(anew_first, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    moe = save(tmp_path / "in", KEPT["rows"])
    with monkeypatch.context() as patch:
        patch.setattr(write, "render", fail)
        patch.setattr("convert.orbax.keeping.keep._is_one", lambda reader, name: anew_first)
        with pytest.raises(KeyboardInterrupt):
            convert.prefuse(tmp_path / "in", tmp_path / "out")
    monkeypatch.setattr("convert.orbax.keeping.keep._is_one", lambda reader, name: not anew_first)
    check(tmp_path, moe)
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).rglob("*") if f.is_file()) for d in ("in", "out")]
    assert sizes[1] < 1.5 * sizes[0] + 20_000


def test_a_lost_chunk_is_an_error(tmp_path):
    save(tmp_path / "in", KEPT["experts"])
    kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/in/", "path": f"{PATH}.wi_1/"}
    ts.KvStore.open(kvstore).result().write("c/1/0/0/0", None).result()
    with pytest.raises(convert.InputError, match=r"wi_1 cannot be read"):
        convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("name", ["experts", "rows", "ragged", "single rows"])
def test_the_chunks_of_some_rows(name, zarr3, tmp_path):
    save(tmp_path / "in", KEPT[name], zarr3=zarr3)
    with closing(open_checkpoint(tmp_path / "in")) as reader:
        every = chunks_of(reader, f"{PATH}.wi_0")
        counts = [-(-size // step) for size, step in zip((E, L, K, N), KEPT[name], strict=True)]
        assert [chunk.at for chunk in every] == list(np.ndindex(*counts))
        assert all(key_at(reader.grids[chunk.name], chunk.at) == chunk.key for chunk in every)
        for rows in (range(E), range(2), range(2, 6), range(1, 4), range(5, 6)):
            wanted = [chunk for chunk in every if chunk.at[0] * KEPT[name][0] in rows]
            assert chunks_of(reader, f"{PATH}.wi_0", rows) == wanted
        (scalar,) = chunks_of(reader, "step")
        assert scalar.at == ()
        assert b"".join(contents(reader, [scalar]))


def test_a_flipped_bit_in_a_kept_chunk_is_found(tmp_path):
    save(tmp_path / "in", KEPT["experts"])
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    value = values(tmp_path / "out", "wi")[b"c/1/0/0/1"]
    damaged = bytes([*value[:9], value[9] ^ 1, *value[10:]])
    for file in (file for file in (tmp_path / "out").rglob("*") if file.is_file()):
        file.write_bytes(file.read_bytes().replace(value, damaged))
    assert values(tmp_path / "out", "wi")[b"c/1/0/0/1"] == damaged
    verdict = convert.verify(tmp_path / "out")
    assert not verdict.equal
    (digests,) = (level for level in verdict.levels if level.name == "digests")
    assert [difference.split()[0] for difference in digests.differences] == [f"{PATH}.wi"]


def test_digests_of_chunks_are_for_orbax(tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, layers=1)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    path = tmp_path / "out" / "convert_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hashed": "stored chunks"}))
    with pytest.raises(convert.InputError, match="no Orbax checkpoint"):
        convert.verify(tmp_path / "out")


def test_chunks_of_zeros_that_were_never_stored_are_still_zeros(tmp_path):
    """Where the input does not store them, the output that keeps its chunks does not either, and says so."""
    source = tmp_path / "in"
    save(source, KEPT["rows"], ocdbt=False)
    for name in ("wi_0", "wi_1"):
        shutil.rmtree(source / f"{PATH}.{name}" / "c")
    metadata = source / "_METADATA"
    tree = json.loads(metadata.read_text()) | {"store_array_data_equal_to_fill_value": False}
    metadata.write_text(json.dumps(tree))
    convert.prefuse(source, tmp_path / "out")
    assert convert.verify(tmp_path / "out").equal
    assert convert.verify(source, tmp_path / "out", gemm=False).equal
    moe = restore(tmp_path / "out")["params"]["params"]["decoder"]["layers"]["moe_block"]
    assert not np.asarray(moe["wi"]).view(np.uint16).any()
