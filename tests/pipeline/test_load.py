"""Loading: what the file engine makes of a checkpoint is what stands on the devices, however they share it."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import convert
import scripts.make_checkpoint as made
from convert.engine.copying import Worker
from convert.engine.regions import fill
from convert.options import Choices, Running
from convert.pipeline.kinds import kinds_of
from convert.pipeline.load import Loader
from convert.planning.planner import make_plan
from layouts.checkpoint import open_checkpoint
from tests import tiny

OLMOE = next(family for family in tiny.HF if family.name == "olmoe")
WI, WO = (f"model.layers.1.mlp.experts.{word}" for word in ("wi", "wo"))
LAYOUTS = {
    "concat": {},
    "interleaved": {},
    "vllm": {},
    "fused-moe": {},
    "per-shard": {"shards": 2, "align": 3},
    "flashinfer": {},
}

PLAIN = [f for f in tiny.HF if not f.changed_in and f.kinds == 1 and all("-g" not in n["wi"].pattern for n in f.native)]
"""Families that `tiny` can write without more words."""


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))


def cut(name, shape):
    """Every dimension that can be is cut, the last one first."""
    axes, spec = {"x": 4, "y": 2}, []
    for size in reversed(shape):
        axis = next((axis for axis, count in axes.items() if size % count == 0), None)
        axes.pop(axis, None)
        spec.insert(0, axis)
    return NamedSharding(mesh(), P(*spec))


def bits(tree):
    return {name: np.asarray(array).view(f"u{array.dtype.itemsize}") for name, array in tree.items()}


def dotted(tree):
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("a") / "hf", tiny.tensors(OLMOE), tiny.config(OLMOE))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return made.make_checkpoint(tmp_path_factory.mktemp("b") / "hf", family="qwen3_moe")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_device_holds_its_part_of_what_the_file_engine_makes(source, tmp_path, layout):
    convert.prefuse(source, tmp_path / "out", layout=layout, **LAYOUTS[layout])
    found = convert.load(source, layout=layout, sharding=cut, **LAYOUTS[layout])
    assert tiny.same(bits(found), tiny.load(tmp_path / "out"))
    for name, array in found.items():
        assert array.sharding == cut(name, array.shape)
    again = convert.load(tmp_path / "out", layout="native", sharding=cut)
    assert tiny.same(bits(again), tiny.load(source))


@pytest.mark.parametrize("family", PLAIN, ids=lambda family: family.name)
def test_every_family_is_loaded_as_it_is_converted(family):
    reader = tiny.memory(family)
    wanted = tiny.run(reader, "prefuse").arrays
    plan = make_plan(reader, tiny.Path("out"), "prefuse", Choices())
    worker = Worker.make(reader, 1 << 10)
    for target in plan.targets:
        for index in cut("", target.spec.shape).addressable_devices_indices_map(target.spec.shape).values():
            out = np.empty(np.empty(target.spec.shape, "u1")[index].shape, "u4")
            fill(target, index, out, worker, lambda _: None)
            assert np.array_equal(out, wanted[target.spec.name][index])


@pytest.mark.parametrize(("layout", "shards", "align"), [("per-shard", 2, 3), ("per-shard", 4, 5), ("lane", 2, 128)])
def test_parts_that_cut_through_composed_and_padded_dimensions(source, layout, shards, align):
    """Devices cut as shardings say; here any two cuts of any dimension."""
    reader = open_checkpoint(source)
    plan = make_plan(reader, tiny.Path("out"), "prefuse", Choices(layout=layout, shards=shards, align=align))
    for target in (target for target in plan.targets if target.moved):
        whole = tiny.fill(target, reader)
        for strip in (64, 1 << 20):  # bytes at a time
            worker = Worker.make(reader, strip)
            for at, size in enumerate(target.spec.shape):
                steps = sorted({0, 1, size // 3, size // 2, size - 1, size})
                for start, stop in itertools.combinations(steps, 2):
                    index = tuple(slice(start, stop) if i == at else slice(0, n) for i, n in enumerate(target.spec.shape))
                    told, out = [], np.full(whole[index].shape, 7, "u4")
                    fill(target, index, out, worker, told.append)
                    assert np.array_equal(out, whole[index])
                    assert sum(told) == out.nbytes
        break
    reader.close()


@pytest.mark.parametrize(("layout", "scan"), [(None, True), (None, False), ("per-shard", True)])
def test_maxtexts_tree_of_a_hugging_face_checkpoint(qwen3, tmp_path, layout, scan):
    options = {"layout": layout, "shards": 2} if layout else {}
    (convert.prefuse if layout else convert.reformat)(qwen3, tmp_path / "orbax", to="orbax", scan=scan, **options)
    found = convert.load(qwen3, names="maxtext", sharding=cut, scan=scan, **options)
    assert tiny.same(bits(dotted(found)), bits(dotted(tiny.restore(tmp_path / "orbax" / "0" / "items"))))
    stored = convert.load(tmp_path / "orbax", sharding=cut)
    assert tiny.same(bits(dotted(stored)), bits(dotted(found)))
    back = convert.load(tmp_path / "orbax", names="hf", sharding=cut)
    assert tiny.same(bits(back), bits(convert.load(qwen3)))


def test_nobody_says_a_sharding(source):
    found = convert.load(source, layout="concat")
    assert found[WI].devices() == {jax.devices()[0]}
    assert not found[WI].committed  # it goes with arrays that lie elsewhere
    elsewhere = jax.devices()[3]
    assert convert.load(source, sharding=SingleDeviceSharding(elsewhere))["lm_head.weight"].devices() == {elsewhere}


def test_a_tree_of_shardings_as_eval_shape_gives_it(qwen3):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut("", x.shape)), convert.load(qwen3))
    assert {n: a.sharding for n, a in convert.load(qwen3, sharding=like).items()} == {n: s.sharding for n, s in like.items()}
    nested = convert.load(qwen3, names="maxtext")
    found = convert.load(qwen3, names="maxtext", sharding=jax.tree.map(lambda x: cut("", x.shape), nested))
    assert all(array.sharding == cut("", array.shape) for array in jax.tree.leaves(found))


def test_types_are_rounded_and_what_is_no_plain_float_stays(tmp_path):
    values = np.array([1.00390625, 1.01171875, np.inf, -0.0], "f4")
    quantised = np.arange(4, dtype="u1").view(ml_dtypes.float8_e4m3fn)
    save_file({"a": values, "b": quantised, "c": np.arange(4, dtype="i4")}, tmp_path / "model.safetensors")
    found = convert.load(tmp_path, dtype="bfloat16")
    assert np.array_equal(bits(found)["a"], values.astype(ml_dtypes.bfloat16).view("u2"))
    assert [str(found[name].dtype) for name in "abc"] == ["bfloat16", "float8_e4m3fn", "int32"]
    own = convert.load(tmp_path, dtype=lambda name, dtype: jnp.float16 if name == "b" else dtype)
    assert [str(own[name].dtype) for name in "abc"] == ["float32", "float16", "int32"]


def test_bits_pass_as_they_are(tmp_path):
    """NaN payloads, in every type that JAX holds."""
    rng, kinds = np.random.default_rng(0), ("bfloat16", "float16", "float32", "float8_e5m2", "int8", "uint32", "bool")
    arrays = {kind: rng.integers(0, 2 if kind == "bool" else 256, (8, 64), "u1") for kind in kinds}
    typed = {kind: array.view(getattr(ml_dtypes, kind, None) or kind) for kind, array in arrays.items()}
    save_file(typed, tmp_path / "model.safetensors")
    for limit in (1 << 30, 99):  # at once, and in parts as to a device with memory of its own
        found = in_parts(tmp_path, limit)
        assert all(np.asarray(found[kind]).tobytes() == typed[kind].tobytes() for kind in kinds)
        assert {str(found[kind].dtype) for kind in kinds} == set(kinds)


def in_parts(path, limit):
    """A loader that takes no device for the host's own memory."""
    reader = open_checkpoint(path)
    plan = convert.pipeline.request.plan_as_stored(reader)
    loader = Loader.make(plan, reader, Running(memory=1 << 30))
    loader = Loader(reader=reader, budget=loader.budget, limit=limit)
    kinds = kinds_of({target.spec.name: target for target in plan.targets}, cut, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.pipeline.load._is_host", lambda _: False)
        return loader.leaves(kinds, lambda _: None)


def test_lazy_leaves_read_when_they_are_asked(source):
    found = convert.load(source, layout="concat", lazy=True, sharding=cut)
    wanted = convert.load(source, layout="concat")
    assert {(n, x.shape, x.dtype) for n, x in found.items()} == {(n, x.shape, x.dtype) for n, x in wanted.items()}
    assert found[WI].sharding == found[WI].load().sharding == cut("", found[WI].shape)
    assert np.array_equal(found[WO].load(), wanted[WO])
    assert float(jnp.sum(jnp.asarray(found[WO]))) == float(jnp.sum(wanted[WO]))
    assert repr(found[WI]) == f"Lazy({WI}, float32[12, 6, 8])"
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(each, wanted[WI]) for each in pool.map(lambda _: found[WI].load(), range(8)))


def test_names_are_what_a_function_makes_of_them(source):
    found = convert.load(source, layout="concat", names=lambda name: name.removeprefix("model."))
    assert WI.removeprefix("model.") in found
    told = convert.load(source, layout="concat", names=("hf", str.upper))
    assert WI.upper() in told
    with pytest.raises(convert.UsageError, match="gives x for both"):
        convert.load(source, names=lambda _: "x")
    with pytest.raises(convert.UsageError, match="gives None for"):
        convert.load(source, names=lambda _: None)


class Watcher:
    def __init__(self):
        self.phases, self.done = [], 0

    def __call__(self, done):
        self.done += done

    def phase(self, name, total):
        self.phases.append((name, total))

    def at(self, what):
        pass


def test_progress_hears_of_the_bytes_that_are_read(source):
    seen = Watcher()
    found = convert.load(source, layout="concat", sharding=cut, progress=seen)
    assert seen.phases == [("loading", seen.done)]
    assert seen.done == sum(array.nbytes for array in found.values())  # what devices share is read once


def test_a_failing_callback_stops_the_workers(source):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert.load(source, progress=stop)


WRONG = [
    ({"layout": "concatt"}, convert.UsageError, r"layout: 'concatt' is none \(did you mean concat\?\)"),
    ({"layout": 3}, convert.UsageError, "layout: 3 is not a word"),
    ({"names": "torch"}, convert.UsageError, "names: 'torch' is neither of hf, maxtext"),
    ({"names": ("torch", str.upper)}, convert.UsageError, "nor a pair of these"),
    ({"names": ("hf", None)}, convert.UsageError, "nor a pair of these"),
    ({"names": (None, str.upper)}, convert.UsageError, "nor a pair of these"),
    ({"sharding": 3}, convert.UsageError, "sharding: a int is neither"),
    ({"sharding": {"lm_head.weight": None}}, convert.UsageError, "sharding: the tree has nothing for"),
    ({"sharding": lambda name, shape: P("x")}, convert.UsageError, "is a P(artitionSpec)?; make a jax.sharding.NamedSharding"),
    ({"sharding": lambda name, shape: NamedSharding(mesh(), P("x"))}, convert.UsageError, r"\(3, 5\) cannot be cut so"),
    ({"dtype": "bf17"}, convert.UsageError, "dtype: 'bf17' is no element type"),
    ({"dtype": "float64"}, convert.UsageError, "is float64, which JAX would narrow"),
    ({"memory": "1MiB"}, convert.UsageError, "memory=.*; give a third more"),
    ({"memory": "lots"}, convert.UsageError, "memory: 'lots' is not a size"),
    ({"layout": "vllm", "names": "maxtext"}, convert.PlanError, "no MaxText tree|no place"),
    ({"family": "mixtrall", "layout": "concat"}, convert.PlanError, "mixtrall"),
]


@pytest.mark.parametrize(("asked", "kind", "said"), WRONG, ids=map(str, range(len(WRONG))))
def test_what_cannot_be_is_said_in_the_words_of_arguments(source, asked, kind, said):
    with pytest.raises(kind, match=said):
        convert.load(source, **asked)


def test_64_bits_need_jaxs_consent(tmp_path):
    save_file({"a": np.arange(3), "b": np.ones(3, "f4")}, tmp_path / "model.safetensors")
    with pytest.raises(convert.UsageError, match="a is int64, which JAX would narrow"):
        convert.load(tmp_path)
    found = convert.load(tmp_path, dtype=lambda name, dtype: "int32" if name == "a" else dtype)
    assert found["a"].dtype == jnp.int32


def test_a_file_that_is_cut_meanwhile_is_an_input_error(source, tmp_path):
    path = tiny.checkpoint(tmp_path / "a", tiny.tensors(OLMOE), tiny.config(OLMOE), shards=1)
    found = convert.load(path, lazy=True)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(4096)
    with pytest.raises(convert.InputError, match="cut while it was read"):
        [leaf.load() for leaf in found.values()]


def test_an_adapter_is_no_checkpoint(tmp_path):
    save_file({"base_model.x.lora_A.weight": np.ones((2, 2), "f4")}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(convert.UsageError, match="a LoRA adapter; load it with peft"):
        convert.load(tmp_path)


def test_values_survive_a_program_that_donates_them(tmp_path):
    """On a CPU an array takes over the memory that was read into."""
    save_file({"a": np.arange(1 << 16, dtype="f4")}, tmp_path / "model.safetensors")
    found = convert.load(tmp_path)["a"]
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(found)
    assert np.array_equal(doubled, load_file(tmp_path / "model.safetensors")["a"] * 2)
