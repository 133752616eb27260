"""The trees that MaxText, Tunix and Flax save: NNX, Linen, lists, several roots and scans; sharded arrays and random keys."""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

import convert
from convert.errors import PlanError
from tests.tiny import restore
from tests.tiny import save as saved_by_orbax

save = partial(saved_by_orbax, zarr3=False)  # Orbax's own default
E, L, K, N = 4, 3, 16, 8
RANDOM = np.random.default_rng(0)


def noise(*shape):
    return RANDOM.integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)


def block(*scan, box=lambda array: array, first=()):
    return {
        "gate": {"kernel": box(noise(K, *scan, E))},
        "wi_0": box(noise(*first, E, *scan, K, N)),
        "wi_1": box(noise(*first, E, *scan, K, N)),
        "wo": box(noise(*first, E, *scan, N, K)),
    }


def value(array):
    return {"value": array}


def nnx():
    return {
        "decoder": {"layers": {"moe_block": block(L, box=value)}, "norm": value(noise(K))},
        "rngs": value(np.arange(2, dtype=np.uint32)),
    }


TREES = {
    "Linen": lambda: {"params": {"params": {"decoder": {"layers": {"moe_block": block(L)}}}}},
    "params only": lambda: {"params": {"decoder": {"layers": {"moe_block": block(L)}}}},
    "NNX": nnx,
    "base": lambda: {"base": nnx()},
    "list of layers": lambda: {"decoder": {"layers": [{"moe_block": block()} for _ in range(11)]}},
    "dict of numbers": lambda: {"decoder": {"layers": {str(i): {"moe_block": block(box=value)} for i in range(11)}}},
    "cycle": lambda: {"layers": {"layers_0": {"mlp": {"wi_0": {"kernel": noise(K, L, N)}}}, "layers_1": {"moe": block(L)}}},
    "two scan axes": lambda: {"scanned_blocks": {"local_layers": {"MoeBlock_0": block(L, 5)}, "global": {"M": block(L)}}},
    "scan axis 0": lambda: {"params": {"layers": {"moe_block": block(first=(L,))}}},
    "dense then MoE": lambda: {
        "dense_layers": {"mlp": {"wi_0": {"kernel": noise(K, 1, N)}, "wi_1": {"kernel": noise(K, 1, N)}}},
        "moe_layers": {"MoeBlock_0": block(L), "shared_experts": {"wi_0": {"kernel": noise(K, L, N)}}},
    },
    "biases": lambda: {"layers": {"m": block(L) | {f"{w}_bias": noise(E, L, N) for w in ("wi_0", "wi_1")}}},
}


def fused(tree):
    """What a prefused tree should be, by NumPy alone."""
    if isinstance(tree, list):
        return [fused(child) for child in tree]
    if not isinstance(tree, dict):
        return tree
    made = {key: fused(child) for key, child in tree.items() if key not in ("wi_0", "wi_1")}
    halves = [tree.get(key) for key in ("wi_0", "wi_1")]
    if isinstance(halves[0], dict) and "kernel" in halves[0]:
        return made | {key: tree[key] for key in ("wi_0", "wi_1") if key in tree}
    if isinstance(halves[0], dict):
        return made | {"wi": value(np.concatenate([half["value"] for half in halves], -1))}
    return made | ({"wi": np.concatenate(halves, -1)} if halves[0] is not None else {})


def flat(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (x.dtype.name, x.shape, x.tobytes()) for path, x in leaves}


def quantized(scan):
    """As MaxText's `RoutedMoE` holds weights of 8 bits: scales of blocks beside them, biases apart."""
    stack = (E, L) if scan else (E,)
    shapes = {"wi_0": (K, N), "wi_1": (K, N), "wo": (N, K)}
    moe = {
        name: RANDOM.integers(0, 120, (*stack, *shape), "u1").view(ml_dtypes.float8_e4m3fn) for name, shape in shapes.items()
    }
    moe |= {f"{name}_scale": RANDOM.random((*stack, *(size // 2 for size in shape)), "f4") for name, shape in shapes.items()}
    moe |= {f"wi_{g}_bias": RANDOM.random((*stack, N), "f4") for g in (0, 1)}
    return {"params": {"params": {"decoder": {"layers": {"moe_block": moe}}}}}


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_block_scales_are_fused_with_their_weights(scan, axis, tmp_path):
    """MaxText 0.2.5 `layers/moe.py`: `wi_scale` (E, K / block, 2N / block) where `prefuse_moe_weights` is set."""
    tree = quantized(scan)
    if scan and not axis:
        tree = jax.tree.map(lambda array: np.swapaxes(array, 0, 1).copy(), tree)
    save(tmp_path / "in", tree)
    convert.prefuse(tmp_path / "in", tmp_path / "out", scan_axis=axis)
    convert.split(tmp_path / "out", tmp_path / "back")
    moe, made = (t["params"]["params"]["decoder"]["layers"]["moe_block"] for t in (tree, restore(tmp_path / "out")))
    assert made.keys() == {"wi", "wi_scale", "wo", "wo_scale", "wi_0_bias", "wi_1_bias"}
    for end in ("", "_scale"):
        halves = [moe[f"wi_{g}{end}"] for g in (0, 1)]
        assert made[f"wi{end}"].tobytes() == np.concatenate(halves, -1).tobytes()
    assert flat(restore(tmp_path / "back")) == flat(tree)
    verdict = convert.verify(tmp_path / "in", tmp_path / "out")
    assert verdict.equal, verdict


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_a_scale_for_each_expert_cannot_be_fused(scan, tmp_path):
    tree = quantized(scan)
    moe = tree["params"]["params"]["decoder"]["layers"]["moe_block"]
    moe |= {key: np.ones(moe[key].shape[: 1 + scan], "f4") for key in moe if key.endswith("_scale")}
    save(tmp_path / "in", tree)
    with pytest.raises(PlanError, match="one number for gate, and another stands for up; MaxText's wi has room for one"):
        convert.plan(tmp_path / "in", tmp_path / "out", prefuse=True)


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("name", TREES)
def test_every_tree_is_fused_and_split(name, ocdbt, tmp_path):
    tree = TREES[name]()
    save(tmp_path / "in", tree, ocdbt=ocdbt)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    assert flat(restore(tmp_path / "out")) == flat(fused(tree))
    assert flat(restore(tmp_path / "back")) == flat(tree)
    before, after = (json.loads((tmp_path / d / "_METADATA").read_text()) for d in ("in", "back"))
    assert before == after
    assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal
    assert convert.verify(tmp_path / "out").equal


@pytest.mark.parametrize("item", ["items", "model_params", "default"])
def test_items_of_steps_are_found(item, tmp_path):
    with ocp.CheckpointManager(tmp_path / "in", item_names=(item, "other")) as manager:
        items = {item: ocp.args.StandardSave(TREES["Linen"]()), "other": ocp.args.JsonSave({"a": 1})}
        manager.save(1000, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
    convert.prefuse(tmp_path / "in" / "1000", tmp_path / "out")
    assert "wi" in restore(tmp_path / "out" / item)["params"]["params"]["decoder"]["layers"]["moe_block"]
    assert (tmp_path / "out" / "other" / "metadata").read_bytes() == (tmp_path / "in/1000/other/metadata").read_bytes()


def test_experts_in_another_item_are_not_taken_for_side_files(tmp_path):
    """MaxText's training engine saves its optimizer's state beside the weights: separate there, it would not fit a fused wi."""
    tree = TREES["Linen"]()
    with ocp.CheckpointManager(tmp_path / "in", item_names=("model_params", "optimizer_state", "means")) as manager:
        state, means = {"opt_state": {"mu": tree["params"]}}, {"loss": np.ones(3)}
        items = {"model_params": tree, "optimizer_state": state, "means": means}
        manager.save(7, args=ocp.args.Composite(**{item: ocp.args.PyTreeSave(each) for item, each in items.items()}))
        manager.wait_until_finished()
    with pytest.raises(PlanError, match=r"7/optimizer_state: another item .*moe_block\.wi_0.*drop_optimizer=True"):
        convert.prefuse(tmp_path / "in", tmp_path / "out")
    report = convert.prefuse(tmp_path / "in", tmp_path / "out", drop_optimizer=True)
    assert {name.split("/")[1] for name in report.plan.left_out_files} == {"optimizer_state"}
    assert "7/means/_METADATA" in report.plan.side_files
    assert not (tmp_path / "out" / "7" / "optimizer_state").exists()
    assert convert.verify(tmp_path / "in", tmp_path / "out", gemm=False).equal
    convert.prefuse(tmp_path / "in" / "7" / "optimizer_state", tmp_path / "state")
    assert "wi" in restore(tmp_path / "state")["opt_state"]["mu"]["params"]["decoder"]["layers"]["moe_block"]


def test_v1_saves_are_read_and_what_is_written_v1_loads(tmp_path):
    v1 = pytest.importorskip("orbax.checkpoint.experimental.v1")
    write = getattr(v1, "save", None) or v1.save_pytree
    read = getattr(v1, "load", None) or v1.load_pytree
    tree = TREES["Linen"]()
    write(tmp_path / "in", tree)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    assert flat(read(tmp_path / "out")) == flat(fused(tree))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), fused(tree))
    assert flat(jax.tree.map(np.asarray, read(tmp_path / "out", abstract))) == flat(fused(tree))


SHARDED = """
import json, sys
import jax, ml_dtypes, numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import convert

source, out, back = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("expert", "fsdp", "tensor"))
rng = np.random.default_rng(0)
def make(shape, *spec):
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)
    return jax.device_put(bits, NamedSharding(mesh, P(*spec)))
def raw(array):
    return np.asarray(array).view(np.uint16)
up, down = ("expert", None, "fsdp", "tensor"), ("expert", None, "tensor", "fsdp")
shape = (4, 3, 256, 128)
moe = {"wi_0": make(shape, *up), "wi_1": make(shape, *up), "wo": make((4, 3, 128, 256), *down)}
tree = {"params": {"moe_block": moe, "norm": make((256,), "fsdp")}, "key": jax.random.key(3), "step": 7}
def saved(path, tree):
    with ocp.StandardCheckpointer() as c:
        c.save(path, tree)
def loaded(path, target=None):
    with ocp.StandardCheckpointer() as c:
        return c.restore(path, target)
saved(source, tree)
convert.prefuse(source, out)
convert.split(out, back)
want = np.concatenate((raw(moe["wi_0"]), raw(moe["wi_1"])), -1)
sharding = NamedSharding(mesh, P(*up))

plain = loaded(out)  # as the file says
wi = plain["params"]["moe_block"]["wi"]
assert isinstance(wi, jax.Array) and wi.sharding == sharding, wi.sharding
assert np.array_equal(raw(wi), want)
assert jax.random.key_data(plain["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
assert plain["step"] == 7

other = NamedSharding(mesh, P(("expert", "fsdp"), None, None, "tensor"))  # another mesh than it was saved for
abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, plain)
abstract["params"]["moe_block"]["wi"] = jax.ShapeDtypeStruct(wi.shape, wi.dtype, sharding=other)
again = loaded(out, abstract)["params"]["moe_block"]["wi"]
assert again.sharding == other and np.array_equal(raw(again), want)

same = loaded(back, jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
for a, b in zip(jax.tree.leaves(same["params"]), jax.tree.leaves(tree["params"]), strict=True):
    assert a.sharding == b.sharding and np.array_equal(raw(a), raw(b))
print("done", wi.addressable_shards[0].data.shape)
"""


def test_sharded_arrays_stay_sharded_on_eight_devices(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    paths = [str(tmp_path / name) for name in ("in", "out", "back")]
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, *paths]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "done (2, 3, 128, 128)", done.stderr[-3000:]
    for name in ("_METADATA", "_sharding"):
        first, last = (json.loads((tmp_path / d / name).read_text()) for d in ("in", "back"))
        assert first == last
    # No chunk lies across the parts of two devices along experts and rows, so that each reads its own only.
    kvstore = {"driver": "ocdbt", "base": f"file://{tmp_path}/out/", "path": "params.moe_block.wi/"}
    chunk = ts.open({"driver": "zarr", "kvstore": kvstore}).result().chunk_layout.read_chunk.shape
    assert all(part % size == 0 for part, size in zip((2, 3, 128, 128), chunk, strict=True))
    entries = json.loads((tmp_path / "out" / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    found = {entry["array_metadata"]["param_name"]: entry["array_metadata"] for entry in entries}
    assert found["params.moe_block.wi"]["write_shape"] == [2, 3, 128, 128]
    assert found["params.moe_block.wi"]["chunk_shape"] == list(chunk)
    assert "params.moe_block.wi_0" not in found


def test_a_flax_nnx_module_is_restored_from_the_output(tmp_path):
    nnx = pytest.importorskip("flax.nnx")

    class Experts(nnx.Module):
        def __init__(self, *names):
            shapes = {"wi": (E, K, 2 * N), "wi_0": (E, K, N), "wi_1": (E, K, N), "wo": (E, N, K)}
            for name in names:
                setattr(self, name, nnx.Param(jax.numpy.asarray(RANDOM.standard_normal(shapes[name]), dtype="bfloat16")))

    separate, prefused = Experts("wi_0", "wi_1", "wo"), Experts("wi", "wo")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", {"moe": nnx.state(separate)})
        checkpointer.wait_until_finished()
        convert.prefuse(tmp_path / "in", tmp_path / "out")
        found = checkpointer.restore(tmp_path / "out", {"moe": nnx.state(prefused)})
    nnx.update(prefused, found["moe"])
    halves = [np.asarray(separate.wi_0[...]), np.asarray(separate.wi_1[...])]
    assert np.array_equal(np.asarray(prefused.wi[...]), np.concatenate(halves, -1))
    assert np.array_equal(np.asarray(prefused.wo[...]), np.asarray(separate.wo[...]))


def test_a_linen_module_is_restored_from_the_output(tmp_path):
    nn = pytest.importorskip("flax.linen")

    class Experts(nn.Module):
        fused: bool

        @nn.compact
        def __call__(self, x):
            def weight(name, *shape):
                return self.param(name, nn.initializers.lecun_normal(batch_axis=(0,)), shape)

            if self.fused:
                both = jax.numpy.einsum("tk,ekf->tef", x, weight("wi", E, K, 2 * N))
                gate, up = both[..., :N], both[..., N:]
            else:
                gate, up = (jax.numpy.einsum("tk,ekf->tef", x, weight(name, E, K, N)) for name in ("wi_0", "wi_1"))
            return jax.numpy.einsum("tef,efk->tk", jax.nn.silu(gate) * up, weight("wo", E, N, K))

    x = jax.numpy.asarray(RANDOM.standard_normal((5, K)), dtype="float32")
    separate = Experts(fused=False).init(jax.random.key(0), x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "in", separate)
        checkpointer.wait_until_finished()
        convert.prefuse(tmp_path / "in", tmp_path / "out")
        target = Experts(fused=True).init(jax.random.key(1), x)
        found = checkpointer.restore(tmp_path / "out", target)
    assert np.allclose(Experts(fused=True).apply(found, x), Experts(fused=False).apply(separate, x), atol=1e-6)


PROCESS = """
import sys, jax
number, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, number)
import ml_dtypes, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("devices",))
rng = np.random.default_rng(0)
def make(shape, *spec):
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(*spec)), lambda index: bits[index])
def block():
    gate, up = (make((4, 3, 16, 8), "devices") for _ in range(2))
    return {"moe_block": {"wi_0": gate, "wi_1": up, "wo": make((4, 3, 8, 16), None, None, None, "devices")}}
tree = {"params": {"params": block()}, "opt_state": [{"mu": {"params": block()}}, None], "step": np.int32(3)}
with ocp.CheckpointManager(path) as manager:
    manager.save(5, args=ocp.args.PyTreeSave(tree))
    manager.wait_until_finished()
"""


@pytest.mark.parametrize("anew", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_several_processes_saved_is_read(anew, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    commands = [[*command, str(number), port, str(tmp_path / "in")] for number in (0, 1)]
    running = [subprocess.Popen(each, env=environment, stderr=subprocess.PIPE) for each in commands]
    errors = [process.communicate(timeout=120)[1][-2000:] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert len(list((tmp_path / "in" / "5" / "default").glob("ocdbt.process_*"))) == 2
    if anew:
        monkeypatch.setattr("convert.orbax.keeping.keep._is_one", lambda reader, name: True)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    convert.split(tmp_path / "out", tmp_path / "back")
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def whole(path):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
            arguments = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=one, restore_type=np.ndarray), tree)
            return checkpointer.restore(path, restore_args=arguments)

    before, out, back = (whole(tmp_path / d / "5" / "default") for d in ("in", "out", "back"))
    assert flat(out) == flat(fused(before))
    assert flat(back) == flat(before)
    names = [json.loads(path.read_text())["array_metadatas"] for path in (tmp_path / "out/5/default/array_metadatas").iterdir()]
    found = [entry["array_metadata"]["param_name"] for entry in names[0]]
    assert sorted(found) == sorted(set(found))
    assert len(names) == 1
    assert "opt_state.0.mu.params.moe_block.wi" in found


@pytest.mark.parametrize(("scan", "axis"), [((), 1), ((L,), 1), ((L,), 0), ((2, L), 1), ((2, L), 0)])
def test_the_verifier_sends_tokens_by_the_router_of_each_layer(scan, axis, tmp_path):
    """Whatever the axes of the layers; a router of other numbers sends them elsewhere, and the whole layer differs."""

    def stacked(*shape):
        return RANDOM.standard_normal((*shape[:axis], *scan, *shape[axis:]), np.float32)

    moe = {"gate": {"kernel": stacked(K, E)}, "wi_0": stacked(E, K, N), "wi_1": stacked(E, K, N), "wo": stacked(E, N, K)}
    other = moe | {"gate": {"kernel": moe["gate"]["kernel"].copy()}}
    last = (*(-1 for _ in scan), slice(None), slice(None)) if not axis else (slice(None), *(-1 for _ in scan), slice(None))
    other["gate"]["kernel"][last] *= -1
    for name, tree in (("in", moe), ("other", other)):
        save(tmp_path / name, {"params": {"params": {"layers": {"moe_block": tree}}}})
    convert.prefuse(tmp_path / "in", tmp_path / "out", scan_axis=axis)
    verdict = convert.verify(tmp_path / "in", tmp_path / "out")
    assert verdict.equal, verdict
    assert "the checkpoint's routers" in next(level for level in verdict.levels if level.name == "layer").covered
    (level,) = (level for level in convert.verify(tmp_path / "other", tmp_path / "out").levels if level.name == "layer")
    assert len(level.differences) == 1
