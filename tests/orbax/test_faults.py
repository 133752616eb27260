"""TensorStore's errors become exit 3 or 6 with a line that people read; damaged metadata is refused at once."""

import errno
import json
import os
import shutil
import socket
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
import tensorstore as ts

import convert
from convert import cli
from layouts.checkpoint import open_checkpoint
from layouts.disk import faults
from layouts.disk.faults import answer, told, writing
from layouts.errors import InputError
from layouts.orbax import lengths
from layouts.orbax.codec import says_its_length
from layouts.tensors import TensorSpec
from tests.orbax.test_keep import PATH, save

SPEC = " [tensorstore_spec='{\"context\":{\"cache_pool\":{}}}' [source locations='tensorstore/x.cc:1\n']]"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('RESOURCE_EXHAUSTED: Error writing "x": [OS error 28: ENOSPC No space left on device]', errno.ENOSPC),
        ('PERMISSION_DENIED: Error reading "x": [OS error 13: EACCES Permission denied]', errno.EACCES),
        ('INTERNAL: Error reading "x": [OS error 5: EIO Input/output error]', errno.EIO),
        ("UNAVAILABLE: no route", errno.EIO),
        ("ABORTED: gone", errno.EIO),
    ],
)
def test_faults_of_the_system(text, code):
    for inside in (told("item", "array"), writing("array")):
        with pytest.raises(OSError, match="array") as raised, inside:
            raise ValueError(text + SPEC * 9)
        assert raised.value.errno == code
        assert len(str(raised.value)) < 350
        assert "tensorstore_spec" not in str(raised.value)


@pytest.mark.parametrize(
    ("nbytes", "stored", "sound"), [(16 << 30, 0, True), (17 << 30, 1 << 15, True), (17 << 30, 1 << 14, False)]
)
def test_what_is_stored_must_be_able_to_stand_for_the_arrays(tmp_path, nbytes, stored, sound):
    """2**15 to one is what zstd reaches, and 16 GiB of zeros need not be stored at all; what a link leads to counts."""
    (tmp_path / "disk" / "d").mkdir(parents=True)
    (tmp_path / "disk" / "d" / "values").write_bytes(bytes(stored))
    (tmp_path / "item").mkdir()
    (tmp_path / "item" / "d").symlink_to(tmp_path / "disk" / "d")
    (tmp_path / "item" / "again").symlink_to(tmp_path / "item")
    arrays = [TensorSpec(name="x", dtype="U8", shape=(nbytes,))]
    with nullcontext() if sound else pytest.raises(InputError, match="metadata is damaged"):
        lengths.check_total(tmp_path / "item", arrays)


@pytest.mark.parametrize("text", ["NOT_FOUND: no chunk", "DATA_LOSS: bad", "FAILED_PRECONDITION: x", "INVALID_ARGUMENT: y"])
def test_faults_of_the_data(text):
    with pytest.raises(InputError, match="item: array cannot be read") as raised, told("item", "array"):
        raise ValueError(text + SPEC * 9)
    assert "tensorstore_spec" not in str(raised.value)


def test_a_store_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(faults, "PATIENCE", 0.05)
    promise, future = ts.Promise.new()
    with pytest.raises(OSError, match="no answer within") as raised, told("s3://bucket", "array"):
        answer(future)
    assert raised.value.errno == errno.ETIMEDOUT
    promise.set_result(None)


def item(path, shape=(4,), chunk=(2,)):
    """An item with one array, in a directory of its own."""
    path.mkdir(parents=True)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/x/"}}
    layout = ts.ChunkLayout(chunk_shape=[2])
    ts.open(spec, create=True, dtype="float32", shape=[4], chunk_layout=layout).result().write([1.0, 2, 3, 4]).result()
    metadata = json.loads((path / "x" / "zarr.json").read_text())
    metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"] = list(shape), list(chunk)
    (path / "x" / "zarr.json").write_text(json.dumps(metadata))
    leaf = {"key_metadata": [{"key": "x", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}
    (path / "_METADATA").write_text(json.dumps({"tree_metadata": {"('x',)": leaf}, "use_ocdbt": False, "use_zarr3": True}))
    return path


def refused(capsys, source, words, code=3):
    assert cli.main(["--prefuse", "--quiet", str(source), str(source.parent / "out")]) == code
    text = capsys.readouterr().err
    assert words in text, text


def test_a_grid_that_nothing_can_hold_is_refused_at_once(tmp_path, capsys):
    refused(capsys, item(tmp_path / "in", shape=(10**9,), chunk=(1,)), "1,000,000,000 chunks")


def test_an_unfinished_directory_is_refused_by_its_own_name(tmp_path, capsys):
    refused(capsys, item(tmp_path / "default.orbax-checkpoint-tmp-1"), "has not finished")


@pytest.mark.parametrize(
    ("name", "words"),
    [("_METADATA", "neither"), ("x/zarr.json", "not a regular file"), ("x/c/0", "not a regular file")],
)
def test_a_pipe_is_refused_at_once(tmp_path, capsys, name, words):
    source = item(tmp_path / "in")
    (source / name).unlink()
    os.mkfifo(source / name)
    refused(capsys, source, words)


def test_metadata_of_another_shape_is_the_inputs_fault(tmp_path, capsys):
    for number, tree in enumerate(([], {}, {"tree_metadata": 3}, {"tree_metadata": {"x": None}}, {"tree_metadata": {}})):
        source = item(tmp_path / str(number) / "in")
        (source / "_METADATA").write_text(json.dumps(tree))
        code = cli.main(["--prefuse", "--quiet", str(source), str(tmp_path / "out")])
        assert code in (3, 4), (tree, capsys.readouterr().err)
        shutil.rmtree(source)


def test_nobody_waits_for_tensorstore_without_a_limit():
    root = Path(convert.__file__).parents[1]
    modules = [*(root / "convert").rglob("*.py"), *(root / "layouts").rglob("*.py")]
    using = {str(path.relative_to(root)): text for path in modules if "import tensorstore" in (text := path.read_text())}
    assert len(using) > 4
    assert not [name for name, text in using.items() if ".result(" in text and name != "layouts/disk/faults.py"]


@pytest.fixture(scope="module")
def silent():
    """A store that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_place_in_a_store_that_does_not_answer_is_exit_6(monkeypatch, tmp_path, capfd, silent):
    monkeypatch.setattr(faults, "AT_FIRST", 0.2)
    stated = {"AWS_ENDPOINT_URL": silent, "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in stated.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--prefuse", "--quiet", "s3://bucket/in", str(tmp_path / "out")]) == 6
    text = capfd.readouterr().err
    assert "no answer within" in text
    assert "s3://bucket/in" in text
    assert text.count("\n") == 1, "only our own line"


@pytest.fixture
def kept(tmp_path):
    """A checkpoint whose chunks, a file each, are kept."""
    save(tmp_path / "in", (1, 4, 20, 24), ocdbt=False)
    return tmp_path / "in"


@pytest.mark.parametrize("key", ["c/7/0/0/0", "c/-1/0/0/0", "c/00/0/0/0", "c/0/1/0/0"])
def test_a_chunk_beyond_the_grid_is_refused(kept, capsys, key):
    chunk = kept / f"{PATH}.wi_0" / key
    chunk.parent.mkdir(parents=True, exist_ok=True)
    chunk.write_bytes((kept / f"{PATH}.wi_0" / "c/0/0/0/0").read_bytes())
    refused(capsys, kept, key)


@pytest.mark.parametrize("name", [f"{PATH}.wi_0/c/0/0/0/0", f"{PATH}.gate.kernel/c/0/0/0"])
def test_a_hole_of_8_gib_is_no_chunk(kept, capsys, name):
    os.truncate(kept / name, 8 << 30)
    refused(capsys, kept, "8,589,934,592 bytes, and")
    assert cli.main(["--verify", "--quiet", "--no-gemm", str(kept), str(kept)]) == 3


def test_a_manifest_of_8_gib_is_refused(tmp_path, capsys):
    source = item(tmp_path / "in")
    tree = json.loads((source / "_METADATA").read_text())
    (source / "_METADATA").write_text(json.dumps(tree | {"use_ocdbt": True}))
    (source / "manifest.ocdbt").touch()
    os.truncate(source / "manifest.ocdbt", 8 << 30)
    refused(capsys, source, "are the most that it may have")


def test_a_side_file_that_is_a_link_to_a_directory_is_not_left_out(kept, capsys):
    (kept / "assets").symlink_to("/usr")
    refused(capsys, kept, "a link to a directory")


@pytest.fixture
def tree(tmp_path):
    """A database of several levels, and the name of its root."""
    base = {"driver": "file", "path": f"{tmp_path}/"}
    config = {"max_decoded_node_bytes": 200, "max_inline_value_bytes": 10}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    with ts.Transaction() as together:
        for number in range(40):
            store.with_transaction(together)[f"k{number:03}"] = b"x" * (number + 1)
    version = ts.ocdbt.dump(ts.KvStore.open(base).result()).result()["versions"][-1]
    assert version["root_height"] > 1
    return tmp_path, version["root"]["location"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: None, ""),
        (lambda found: found["entries"].append(found["entries"][0]), "twice"),
        (lambda found: found["entries"][1].update(location="btreenode::d/x:0:999999999"), "999,999,999 bytes"),
        (lambda found: found.update(height=1), "is not where its tree says"),
    ],
    ids=["sound", "twice", "long", "height"],
)
def test_the_nodes_of_a_database_are_looked_at_before_any_is_read(tree, change, words, monkeypatch):
    item, root = tree
    dump = ts.ocdbt.dump

    def dumped(store, *node):
        found = dump(store, *node).result()
        if node == (root,):
            change(found)
        future = ts.Promise.new()
        future[0].set_result(found)
        return future[1]

    monkeypatch.setattr(ts.ocdbt, "dump", dumped)
    with pytest.raises(InputError, match=words) if words else nullcontext():
        lengths.check_nodes(item)


@pytest.mark.parametrize("size", [0, 1, 1 << 31])
def test_a_chunk_that_says_it_decodes_to_something_else_is_refused(size, tmp_path):
    source, blosc = item(tmp_path / "in"), {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}
    shutil.rmtree(source / "x")
    metadata = {"compressor": blosc, "shape": [4], "chunks": [2], "dtype": "<f4"}
    array = ts.open({"driver": "zarr", "kvstore": f"file://{source}/x/", "metadata": metadata}, create=True).result()
    array.write([1.0, 2, 3, 4]).result()
    tree = json.loads((source / "_METADATA").read_text()) | {"use_zarr3": False}
    (source / "_METADATA").write_text(json.dumps(tree))
    with closing(open_checkpoint(source)) as reader:
        assert reader.read("x", (slice(None),)).view("f4").tolist() == [1, 2, 3, 4]
    chunk = bytearray((source / "x" / "1").read_bytes())
    chunk[4:8] = size.to_bytes(4, "little")
    (source / "x" / "1").write_bytes(chunk)
    words = f"x: 1 says that it decodes to {size:,} bytes; a chunk has 8"
    with closing(open_checkpoint(source)) as reader, pytest.raises(InputError, match=words):
        reader.read("x", (slice(None),))


PLAIN, BLOSC = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "blosc", "configuration": {"cname": "lz4"}}
SHARD = {"name": "sharding_indexed", "configuration": {"chunk_shape": [2], "codecs": [PLAIN, BLOSC]}}


@pytest.mark.parametrize(
    ("codecs", "attributes", "seen"),
    [
        ([PLAIN, BLOSC], {}, True),
        ([PLAIN, BLOSC, {"name": "crc32c"}], {}, True),
        ([{"name": "transpose", "configuration": {"order": [0]}}, PLAIN, BLOSC], {}, True),
        ([SHARD], {}, False),
        ([PLAIN, {"name": "crc32c"}, BLOSC], {}, False),
        ([PLAIN, BLOSC, {"name": "zstd"}], {}, False),
        ([PLAIN, {"name": "zstd"}, BLOSC], {}, False),
        ([PLAIN, {"name": "zstd"}], {"codec": "blosc"}, False),
    ],
)
def test_of_what_a_chunk_in_blosc_says_its_length(codecs, attributes, seen, tmp_path):
    source = item(tmp_path / "in")
    shutil.rmtree(source / "x")
    grid = {"name": "regular", "configuration": {"chunk_shape": [4]}}
    metadata = {"codecs": codecs, "attributes": attributes, "shape": [4], "chunk_grid": grid, "data_type": "float32"}
    array = ts.open({"driver": "zarr3", "kvstore": f"file://{source}/x/", "metadata": metadata}, create=True).result()
    array.write([1.0, 2, 3, 4]).result()
    with closing(open_checkpoint(source)) as reader:
        assert reader.read("x", (slice(None),)).view("f4").tolist() == [1, 2, 3, 4]
    chunk = bytearray((source / "x" / "c" / "0").read_bytes())
    chunk[4:8] = (1 << 30).to_bytes(4, "little")
    (source / "x" / "c" / "0").write_bytes(chunk)
    with closing(open_checkpoint(source)) as reader, pytest.raises(InputError) if seen else nullcontext() as raised:
        assert says_its_length(reader.grids["x"]) == seen
        if seen:
            reader.read("x", (slice(None),))
    assert not seen or "says that it decodes to 1,073,741,824 bytes; a chunk has 16" in str(raised.value)


def test_a_database_that_keeps_its_versions_elsewhere_is_none_of_orbax(tmp_path):
    base = {"driver": "file", "path": f"{tmp_path}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base, "config": {"manifest_kind": "numbered"}}).result()
    store["a"] = b"b"
    with pytest.raises(InputError, match="the versions of the database are not in it"):
        lengths.check_nodes(tmp_path)
