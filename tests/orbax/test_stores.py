"""Orbax in, Orbax out, over every store Orbax writes: formats, chunkings, tree shapes, clients, and what may go wrong."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import xxhash

import convert
from convert import cli
from convert.orbax import copy, write
from convert.orbax.chunks import plan_chunks
from convert.planning.planner import make_plan
from layouts.checkpoint import open_checkpoint
from layouts.errors import InputError
from layouts.orbax.codec import streamable
from layouts.orbax.reader import find_item
from layouts.orbax.stream import ChunkStreams, _Stream
from layouts.reader import ReadLimits
from tests.tiny import restore, save

E, L, K, N = 4, 3, 16, 8
FORMATS = [(True, True), (True, False), (False, True), (False, False)]
RANDOM = np.random.default_rng(0)


def noise(*shape):
    """Any bit pattern of bfloat16: NaN payloads and negative zeros included."""
    return RANDOM.integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)


def wide(*shape):
    return RANDOM.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)


def moe(*scan, of=noise):
    experts = {"wi_0": of(E, *scan, K, N), "wi_1": of(E, *scan, K, N), "wo": of(E, *scan, N, K)}
    return experts | {"gate": {"kernel": of(K, *scan, E)}}


def scanned():
    return {"params": {"params": {"decoder": {"layers": {"moe_block": moe(L)}}, "embedding": noise(50, K)}}}


def unscanned():
    return {"params": {"decoder": {f"layers_{i}": {"moe_block": moe(), "norm": noise(K)} for i in range(L)}}}


def train_state():
    def moments():
        return {"params": {"decoder": {"layers": {"moe_block": moe(L, of=wide)}}}}

    adam = {"mu": moments(), "nu": moments(), "count": np.array(3, np.int32)}
    return scanned() | {
        "step": 7,
        "rate": 0.5,
        "opt_state": [adam, None, {}],
        "aux": {},
        "name": "qwen",
        "mask": np.ones(3, bool),
    }


def raw(leaf):
    return (leaf.dtype.name, leaf.shape, leaf.tobytes()) if isinstance(leaf, np.ndarray) else (type(leaf), leaf)


def flat(tree):
    return {key: raw(leaf) for key, leaf in ocp.tree.to_flat_dict(tree, keep_empty_nodes=True).items()}


def fused(tree):
    """What a prefused checkpoint should restore to, made by NumPy alone."""
    if isinstance(tree, list):
        return [fused(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    kept = {key: fused(child) for key, child in tree.items() if key not in ("wi_0", "wi_1")}
    if "wi_0" in tree:
        bits = [tree[key].view(f"u{tree[key].itemsize}") for key in ("wi_0", "wi_1")]
        kept["wi"] = np.concatenate(bits, -1).view(tree["wi_0"].dtype)
    return kept


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMATS)
@pytest.mark.parametrize("make", [scanned, unscanned, train_state])
def test_prefuse_and_split_restore_bit_for_bit(make, ocdbt, zarr3, tmp_path):
    save(tmp_path / "in", make(), ocdbt=ocdbt, zarr3=zarr3)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    assert flat(restore(tmp_path / "out")) == flat(fused(restore(tmp_path / "in")))
    assert flat(restore(tmp_path / "back")) == flat(restore(tmp_path / "in"))
    written = json.loads((tmp_path / "out" / "_METADATA").read_text())
    assert (written["use_ocdbt"], written["use_zarr3"]) == (ocdbt, zarr3)
    assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal
    assert convert.verify(tmp_path / "out").equal


def test_an_output_of_more_chunks_than_are_read_again_is_not_begun(tmp_path, monkeypatch, capsys):
    save(tmp_path / "in", scanned())
    monkeypatch.setattr("convert.orbax.again.CHUNKS", 0)
    assert cli.main(["--prefuse", "--layout", "interleaved", str(tmp_path / "in"), str(tmp_path / "out")]) == 4
    assert "0 are the most that are read again" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_split_restores_the_metadata_of_the_tree(tmp_path):
    save(tmp_path / "in", train_state(), custom={"scan_layers": True})
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    first, between, last = (json.loads((tmp_path / d / "_METADATA").read_text()) for d in ("in", "out", "back"))
    assert first == last
    assert between["custom_metadata"]["scan_layers"] is True
    assert between["custom_metadata"]["moe_layout"]["wi"]["pattern"] == "e ... k (g n)"


@pytest.mark.parametrize("chunk", [64, 256, 1024])
def test_any_chunks_of_the_source(chunk, tmp_path):
    tree = scanned()
    save(tmp_path / "in", tree, chunk=chunk)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert flat(restore(tmp_path / "out")) == flat(fused(tree))
    manifest = json.loads((tmp_path / "out" / "convert_manifest.json").read_text())
    wi = fused(tree)["params"]["params"]["decoder"]["layers"]["moe_block"]["wi"]
    found = manifest["tensors"]["params.params.decoder.layers.moe_block.wi"]["xxh3_128"]
    assert (found == xxhash.xxh3_128(wi.tobytes()).hexdigest()) == ("hashed" not in manifest)
    assert convert.verify(tmp_path / "out").equal


@pytest.mark.parametrize("chunk", [None, 64, 128, 1024])
def test_chunks_are_bounded_cover_all_and_never_span_two_cells(chunk, tmp_path):
    save(tmp_path / "in", scanned(), chunk=chunk)
    reader = open_checkpoint(tmp_path / "in")
    for target in make_plan(reader, tmp_path / "out", "prefuse").targets:
        source = next(target.pieces(target.target.pattern.whole(target.sizes))).source
        for limit, held in ((1, 1), (10, 64), (100, 1000), (10**6, 10**6)):
            for grain in (1, 16, 10**6):
                check_chunks(plan_chunks(target, reader.chunks[source], limit, held, grain), limit)


def check_chunks(chunking, limit):
    pattern, sizes = chunking.target.target.pattern, chunking.target.sizes
    seen, numbers = np.zeros(pattern.split(sizes), int), np.arange(np.prod(pattern.split(sizes))).reshape(pattern.split(sizes))
    order = []
    for box in chunking.boxes():
        block = tuple(slice(box[a].start, box[a].stop) for a in pattern.axes)
        seen[block] += 1
        order.append(numbers[block].ravel())
        assert seen[block].size <= limit
        assert all(box[a].start // chunking.cell[a] == (box[a].stop - 1) // chunking.cell[a] for a in pattern.axes)
        cuts = zip(pattern.window(sizes, box).slices, chunking.shape, chunking.target.spec.shape, strict=True)
        assert all(cut.start % step == 0 and (cut.stop % step == 0 or cut.stop == size) for cut, step, size in cuts)
    assert (seen == 1).all()
    assert chunking.in_order() == np.array_equal(np.concatenate(order), numbers.ravel())


CLIENT = """
import sys
import numpy as np
import orbax.checkpoint as ocp
def wi(tree):
    return tree["params"]["params"]["decoder"]["layers"]["moe_block"]["wi"]
with ocp.StandardCheckpointer() as c:
    one = wi(c.restore(sys.argv[1] + "/3/items"))
with ocp.CheckpointManager(sys.argv[1], item_names=("items",)) as m:
    two = wi(m.restore(m.latest_step(), args=ocp.args.Composite(items=ocp.args.StandardRestore()))["items"])
print(m.latest_step(), one.dtype, one.shape, np.asarray(one).tobytes() == np.asarray(two).tobytes())
"""


def managed(path, tree, steps):
    with ocp.CheckpointManager(path, item_names=("items",)) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.Composite(items=ocp.args.StandardSave(tree)))
        manager.wait_until_finished()


def test_standard_clients_restore_in_a_fresh_process(tmp_path):
    managed(tmp_path / "in", scanned(), [3])
    (tmp_path / "in" / "3" / "iter").mkdir()
    (tmp_path / "in" / "3" / "iter" / "process_0.json").write_text("{}")
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", CLIENT, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[:1] == [f"3 bfloat16 {(E, L, K, 2 * N)} True"], done.stderr
    for file in ("iter/process_0.json", "_CHECKPOINT_METADATA"):
        assert (tmp_path / "out" / "3" / file).read_bytes() == (tmp_path / "in" / "3" / file).read_bytes()


def test_a_step_is_an_input_but_several_are_not(tmp_path):
    managed(tmp_path / "in", unscanned(), [3, 10])
    with pytest.raises(InputError, match=r"several checkpoints: 3, 10\. Pick one"):
        find_item(tmp_path / "in")
    convert.prefuse(tmp_path / "in" / "10", tmp_path / "out")
    assert (tmp_path / "out" / "items" / "_METADATA").is_file()
    (tmp_path / "empty").mkdir()
    assert find_item(tmp_path / "empty") is None


@pytest.mark.parametrize(("ocdbt", "zarr3"), [(True, True), (False, False)])
def test_an_interrupted_run_goes_on_with_the_next_batch(ocdbt, zarr3, tmp_path, monkeypatch):
    def interrupt(done):
        written.append(done)
        if len(written) == 4:
            raise KeyboardInterrupt

    for module in (write, copy):
        monkeypatch.setattr(module, "SYNC", 1)
    written = []
    save(tmp_path / "in", train_state(), ocdbt=ocdbt, zarr3=zarr3)
    with pytest.raises(KeyboardInterrupt):
        convert.prefuse(tmp_path / "in", tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("out.partial-*/.convert_journal"))
    (notes,) = tmp_path.glob("out.partial-*/.convert_journal")
    done = {key for line in notes.read_text().splitlines()[1:] for key in json.loads(line)}
    report = convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert 1 <= report.resumed <= len({key.partition("[")[0] for key in done})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]
    assert flat(restore(tmp_path / "out")) == flat(fused(restore(tmp_path / "in")))
    assert convert.verify(tmp_path / "out").equal


def test_what_an_interrupted_batch_left_takes_no_room(tmp_path):
    def interrupt(done):
        raise KeyboardInterrupt

    save(tmp_path / "in", scanned())
    convert.prefuse(tmp_path / "in", tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        convert.prefuse(tmp_path / "in", tmp_path / "out", progress=interrupt)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    sizes = [sum(f.stat().st_size for f in (tmp_path / d).rglob("*") if f.is_file()) for d in ("whole", "out")]
    assert sizes[1] < 1.1 * sizes[0]


def test_a_signal_is_raised_as_such_and_leaves_no_thread(tmp_path, capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts us in the background may ignore it

    def interrupt(done):
        if done and not sent:
            sent.append(done)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    sent, threads = [], set(threading.enumerate())
    save(tmp_path / "in", train_state())
    with pytest.raises(KeyboardInterrupt):
        convert.prefuse(tmp_path / "in", tmp_path / "out", progress=interrupt)
    signal.signal(signal.SIGINT, before)
    assert not [thread.name for thread in set(threading.enumerate()) - threads if "ThreadPool" in thread.name]
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_lost_chunk_is_an_error_and_not_zeros(tmp_path, capfd):
    save(tmp_path / "in", scanned(), ocdbt=False)
    lost = tmp_path / "in" / "params.params.decoder.layers.moe_block.wi_0" / "c" / "0" / "0" / "0" / "0"
    lost.unlink()
    with pytest.raises(InputError, match=r"wi_0 cannot be read"):
        convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capfd.readouterr().err


STORES = {
    "zarr3": {"driver": "zarr3", "metadata": {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]}},
    "zarr3 zstd": {"driver": "zarr3", "metadata": {"codecs": ["bytes", {"name": "zstd", "configuration": {"level": 9}}]}},
    "zarr2": {"driver": "zarr", "metadata": {"compressor": None}},
    "zarr2 zstd": {"driver": "zarr", "metadata": {"compressor": {"id": "zstd", "level": 1}, "dimension_separator": "/"}},
}
SHARD = {
    "name": "sharding_indexed",
    "configuration": {"chunk_shape": [3, 4, 5], "codecs": ["bytes", {"name": "zstd", "configuration": {"level": 1}}]},
}
STORES["zarr3 shards"] = {"driver": "zarr3", "metadata": {"codecs": [SHARD]}}
TURNED = {"name": "transpose", "configuration": {"order": [2, 0, 1]}}
NOT_STREAMED = {
    "gzip": {"driver": "zarr3", "metadata": {"codecs": ["bytes", {"name": "gzip", "configuration": {"level": 1}}]}},
    "big endian": {"driver": "zarr3", "metadata": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}},
    "turned": {
        "driver": "zarr3",
        "metadata": {"codecs": [{"name": "transpose", "configuration": {"order": [2, 0, 1]}}, "bytes"]},
    },
    "Fortran order": {"driver": "zarr", "metadata": {"compressor": None, "order": "F"}},
    "blosc": {"driver": "zarr", "metadata": {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 1, "shuffle": 1}}},
}


def stored(path, store, array, chunk):
    spec = {**store, "kvstore": {"driver": "file", "path": f"{path}/"}}
    outer = [2 * c for c in chunk] if store is STORES["zarr3 shards"] else chunk
    layout = ts.ChunkLayout(write_chunk_shape=outer)
    made = ts.open(spec, create=True, dtype=array.dtype.name, shape=array.shape, chunk_layout=layout).result()
    made.write(array).result()
    return made


@pytest.mark.parametrize("piece", [1, 64, 1 << 20])
@pytest.mark.parametrize("name", STORES)
def test_streamed_chunks_are_what_tensorstore_reads(name, piece, tmp_path, monkeypatch):
    for module in ("stream", "codec"):
        monkeypatch.setattr(f"layouts.orbax.{module}.PIECE", piece)
    array = RANDOM.integers(0, 1 << 16, (7, 9, 11), dtype=np.uint16)
    store = stored(tmp_path, STORES[name], array, (3, 4, 5))
    assert streamable(store.spec().to_json()["metadata"])
    streams = ChunkStreams.of(store)
    for _ in range(60 if piece > 1 else 20):  # byte by byte takes long
        ends = [sorted(RANDOM.integers(0, size + 1, 2)) for size in array.shape]
        block = tuple(slice(int(a), int(b)) for a, b in ends)
        assert np.array_equal(streams.read(block, array.dtype), array[block]), block


def test_few_arrays_hold_a_stream(tmp_path):
    tree = {f"layers_{i}": {"moe": moe()} for i in range(20)}
    save(tmp_path / "in", tree)
    with closing(open_checkpoint(tmp_path / "in")) as reader:
        reader.limits = ReadLimits(stream=0, streams=4, threads=2)
        for name, spec in reader.tensors.items():
            block = reader.read(name, tuple(slice(0, size) for size in spec.shape))
            path = name.split(".")
            assert np.array_equal(block, functools.reduce(dict.get, path, tree).view(np.uint16))
        assert len(reader._stores) == 4


@pytest.mark.parametrize("name", NOT_STREAMED)
def test_what_cannot_be_streamed_is_known(name, tmp_path):
    store = stored(tmp_path, NOT_STREAMED[name], np.ones((7, 9, 11), np.uint16), (3, 4, 5))
    assert not streamable(store.spec().to_json()["metadata"])


@pytest.mark.parametrize("name", STORES)
def test_damaged_streams_are_errors(name, tmp_path):
    store = stored(tmp_path, STORES[name], np.arange(60, dtype=np.uint16).reshape(3, 4, 5), (3, 4, 5))
    chunk = next(file for file in tmp_path.rglob("*") if file.is_file() and file.name not in ("zarr.json", ".zarray"))
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(ValueError, match=r"chunk|frame|zstd|range"):
        ChunkStreams.of(store).read((slice(0, 3), slice(0, 4), slice(0, 5)), np.dtype(np.uint16))


@pytest.mark.parametrize(("ocdbt", "zarr3"), FORMATS)
@pytest.mark.parametrize("chunk", [None, 256])
def test_streamed_conversions_are_the_same(chunk, ocdbt, zarr3, tmp_path, monkeypatch):
    monkeypatch.setattr("convert.orbax.budget.STREAM", 8)
    save(tmp_path / "in", scanned() if chunk else train_state(), ocdbt=ocdbt, zarr3=zarr3, chunk=chunk)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    assert flat(restore(tmp_path / "out")) == flat(fused(restore(tmp_path / "in")))
    assert flat(restore(tmp_path / "back")) == flat(restore(tmp_path / "in"))
    assert convert.verify(tmp_path / "out").equal


def test_one_stream_serves_two_tensors_in_one_pass_each(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.orbax.budget.STREAM", 8)
    monkeypatch.setattr("convert.orbax.chunks._CRUMB", 16)
    monkeypatch.setattr("convert.orbax.keeping.keep._is_one", lambda reader, name: True)
    starts, restart = [], _Stream._restart
    monkeypatch.setattr(_Stream, "_restart", lambda stream: (starts.append(stream), restart(stream)))
    save(tmp_path / "in", fused(scanned()))
    convert.split(tmp_path / "in", tmp_path / "out", source_layout="concat", jobs=4)
    assert len(starts) == 5, "once for each of embedding, gate and wo, and once for each half of wi"
