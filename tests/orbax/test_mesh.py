"""`--mesh`: chunks end where the parts of the devices do, so that a restore reads each of them once."""

import base64
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
from convert.cli import main
from convert.errors import OutputError, UsageError
from layouts.checkpoint import open_checkpoint
from scripts.benchmark_restore import cuts
from scripts.make_checkpoint import make_checkpoint

P = "params.params."
SIZES = {"layers": 1, "experts": 4, "embed": 768, "mlp": 384}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("mesh") / "in", family="qwen3_moe", **SIZES)


def chunks(path):
    reader = open_checkpoint(path)
    found = {name: (spec.shape, reader.unit(name).shape) for name, spec in reader.tensors.items()}
    reader.close()
    return found


def ends_with(found, name, parts):
    """Whether a chunk ends wherever a part of the array does."""
    shape, chunk = found[name]
    return all(size // count % length == 0 for size, count, length in zip(shape, parts, chunk, strict=True))


WI, WO = P + "decoder.layers.moe_block.wi", P + "decoder.layers.moe_block.wo"
MESHES = [
    ({"fsdp": 3, "tensor": 2}, {WI: (1, 1, 3, 2), WO: (1, 1, 2, 3), P + "decoder.logits_dense.kernel": (3, 2)}),
    ({"fsdp": 6}, {WI: (1, 1, 6, 1), WO: (1, 1, 1, 6), P + "token_embedder.embedding": (1, 6)}),
    ({"expert": 2, "fsdp_transpose": 3}, {WI: (2, 1, 1, 3), WO: (2, 1, 3, 1)}),
    ({"tensor": 12}, {WI: (1, 1, 1, 12)}),
]


@pytest.mark.parametrize(("mesh", "wanted"), MESHES)
def test_chunks_end_where_parts_do(mesh, wanted, source, tmp_path):
    """By MaxText's rules (`configs/base.yml`), with `kernel_axes` such as ("exp", "embed_moe", "mlp_moe") of its layers."""
    convert.prefuse(source, tmp_path / "out", to="orbax", mesh=mesh)
    found = chunks(tmp_path / "out")
    assert all(ends_with(found, name, parts) for name, parts in wanted.items())
    assert convert.verify(source, tmp_path / "out", gemm=False).equal
    assert json.loads((tmp_path / "out" / "convert_manifest.json").read_text())["mesh"] == mesh


def test_the_benchmark_cuts_as_the_mesh_does(source):
    """`scripts/benchmark_restore.py`: each device takes its part of an array as MaxText would."""
    found = cuts(source, {"fsdp": 3, "tensor": 2})
    assert (found[WI], found[WO]) == ([[], [], ["fsdp"], ["tensor"]], [[], [], ["tensor"], ["fsdp"]])


def test_without_a_mesh_they_do_not(source, tmp_path):
    """That the test above can fail; and an output with other chunks is not what was asked for."""
    convert.prefuse(source, tmp_path / "out", to="orbax")
    found = chunks(tmp_path / "out")
    assert not all(ends_with(found, name, parts) for _, wanted in MESHES for name, parts in wanted.items())
    with pytest.raises(OutputError, match="its mesh is another one"):
        convert.prefuse(source, tmp_path / "out", to="orbax", mesh="fsdp=6")


def test_a_recorded_sharding_names_the_axes(tmp_path):
    """Orbax -> Orbax, with names that are no MaxText's: what was saved says along which axes of a mesh it lay."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("rows", "columns"))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "columns", "rows"))
    weights = {name: np.random.default_rng(0).standard_normal((4, 384, 384), "f4") for name in ("wi_0", "wi_1", "wo")}
    weights |= {"other": np.ones((4, 384, 384), "f4")}
    params = {"decoder": {"layers_0": {"moe_block": {name: jax.device_put(a, cut) for name, a in weights.items()}}}}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in" / "0" / "items", {"params": {"params": params}})
    convert.prefuse(tmp_path / "in", tmp_path / "out", mesh={"rows": 4, "columns": 3})
    found, block = chunks(tmp_path / "out"), P + "decoder.layers_0.moe_block."
    assert all(ends_with(found, block + name, (1, 3, 4)) for name in ("wi", "wo", "other"))
    assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal
    with pytest.raises(UsageError, match=r"no array is cut along 'fsdp'; they are along columns, rows"):
        convert.prefuse(tmp_path / "in", tmp_path / "x", mesh="fsdp=4")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a run on 3 x 2 devices saved, unfused: experts by a rule of its own, along E and along N."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:6]).reshape(3, 2), ("rows", "columns"))
    spec = jax.sharding.PartitionSpec("columns", None, None, "rows")
    block = {"wi_0": jax.device_put(np.ones((4, 1, 3, 6), "f4"), jax.sharding.NamedSharding(mesh, spec))}
    path = tmp_path_factory.mktemp("trained") / "run"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": {"params": {"decoder": {"layers": {"moe_block": block}}}}})
    return path


@pytest.mark.parametrize("file", [False, True])
def test_a_sharding_file_says_how_devices_cut(file, source, trained, tmp_path):
    """Of arrays that it names; `wi` lies as the `wi_0` that was saved did. No rule of MaxText's knows these axes."""
    given = trained / "_sharding" if file else trained
    convert.prefuse(source, tmp_path / "out", to="orbax", sharding=given)
    assert ends_with(chunks(tmp_path / "out"), WI, (2, 1, 1, 3))
    assert convert.verify(source, tmp_path / "out", gemm=False).equal
    assert convert.prefuse(source, tmp_path / "out", to="orbax", sharding=given).proof
    (tmp_path / "other").write_text((trained / "_sharding").read_text().replace("null", r"\"columns\"", 1))
    with pytest.raises(OutputError, match="its sharding is another one"):
        convert.prefuse(source, tmp_path / "out", to="orbax", sharding=tmp_path / "other")


def _spelled(names, **others):
    text = {"sharding_type": "NamedSharding", "shape": [2], "axis_names": ["fsdp"], "partition_spec": ["fsdp"]} | others
    return json.dumps({base64.b64encode(name.encode()).decode(): json.dumps(text) for name in names})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("[]", "expected a JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"!": "{}"}', "does not say how arrays were sharded"),
        ('{"YQ==": "[1]"}', "does not say how arrays were sharded"),
        ('{"YQ==": 3}', "does not say how arrays were sharded"),
        (_spelled(["a"], shape=[0]), "is not a positive whole number"),
        (_spelled(["a"], shape=[2, 2]), "does not say how arrays were sharded"),
        (_spelled(["a"], axis_names=[["fsdp"]]), "does not say how arrays were sharded"),
        (_spelled(["a"], sharding_type="SingleDeviceSharding"), "its arrays lie on no meshes"),
        (_spelled(["a"]), "it names no array of the output"),
    ],
)
def test_a_sharding_file_that_says_nothing_is_refused(content, words, source, tmp_path, capsys):
    if content is not None:
        (tmp_path / "file").write_text(content)
    arguments = ["--prefuse", "--to", "orbax", "--sharding", str(tmp_path / "file")]
    assert main([*arguments, str(source), str(tmp_path / "out"), "--quiet"]) in (2, 3)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "orbax", "--sharding", "x", "--mesh", "fsdp=4"], "--sharding says what the mesh is"),
        (["--sharding", "x"], "--sharding is for an Orbax output"),
        (["--to", "orbax", "--sharding", "x", "--keep-chunks"], "--sharding cuts chunks anew"),
        (["--to", "orbax", "--mesh", "fspd=4"], "no array is cut along 'fspd'"),
        (["--mesh", "fsdp=4"], "--mesh is for an Orbax output"),
        (["--to", "orbax", "--mesh", "fsdp=4", "--keep-chunks"], "give one of them"),
        (["--to", "orbax", "--mesh", "fsdp"], "is not a mesh"),
        (["--to", "orbax", "--mesh", "fsdp=0"], "is not a positive whole number"),
    ],
)
def test_a_mesh_that_is_none_is_refused(arguments, words, source, tmp_path, capsys):
    try:
        code = main(["--prefuse", str(source), str(tmp_path / "out"), "--quiet", *arguments])
    except SystemExit as error:  # what argparse refuses
        code = error.code
    assert code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
