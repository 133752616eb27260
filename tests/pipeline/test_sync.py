"""Weight sync: what one jitted function makes of a trainer's tree is what the file engine makes of its checkpoint."""

import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from safetensors.numpy import save_file

import convert
import scripts.make_checkpoint as made
from tests.memory.test_adapters import tree as lora_tree
from tests.pipeline.test_load import bits, cut, dotted
from tests.planning.models import reader


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return made.make_checkpoint(tmp_path_factory.mktemp("a") / "hf", family="qwen3_moe", layers=2, experts=4)


def config(source):
    return json.loads((source / "config.json").read_text())


def specs(params, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding and sharding("", x.shape)), params)


def equal(one, other):
    one, other = bits(dotted(one)), bits(dotted(other))
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


CASES = {
    "per-shard, in MaxText's tree": ({}, {"layout": "per-shard", "shards": 2}),
    "of a tree that is not scanned": ({"scan": False}, {"layout": "concat"}),
    "to Hugging Face's names": ({}, {"names": "hf"}),
    "to Hugging Face's names, not scanned": ({"scan": False}, {"names": "hf", "layout": "vllm"}),
    "fused, to Hugging Face's names": ({"layout": "concat"}, {"names": "hf", "source_layout": "concat"}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_file_engine_makes(source, case):
    before, after = CASES[case]
    trainer = convert.load(source, names="maxtext", **before)
    wanted = {word: value for word, value in {"names": "maxtext", **before, **after}.items() if word != "source_layout"}
    server = convert.load(source, **{**wanted, "layout": after.get("layout")})
    sync = convert.sync_plan(specs(trainer), specs(server), config=config(source), **after)
    found = jax.jit(sync)(trainer)
    assert equal(found, server)
    assert jax.tree.structure(found) == jax.tree.structure(server)


def test_out_of_hugging_faces_names(source):
    server = convert.load(source, names="maxtext", layout="concat")
    trainer = convert.load(source)
    sync = convert.sync_plan(trainer, server, layout="concat", names="maxtext", source_names="hf", config=config(source))
    assert equal(sync.jitted()(trainer), server)


def test_shardings_types_and_containers_are_the_servers():
    trainer = jax.tree.map(lambda x: jax.device_put(x, cut("", x.shape)), small("bfloat16"))
    padded = convert.prefuse_params(small("float32"), layout="per-shard", shards=2)
    asked = {"layout": "per-shard", "shards": 2}
    with pytest.raises(convert.PlanError, match=r"is bfloat16, and float32 in the second tree; cast=True"):
        convert.sync_plan(trainer, padded, **asked)
    sync = convert.sync_plan(trainer, FrozenDict(specs(padded, cut)), **asked, cast=True)
    for found in (sync(trainer), sync.jitted()(trainer)):
        assert isinstance(found, FrozenDict)
        assert equal(found.unfreeze(), padded)
        assert all(x.sharding.is_equivalent_to(cut("", x.shape), x.ndim) for x in jax.tree.leaves(found))


def small(dtype):
    shapes = {"wi_0": (4, 6, 8), "wi_1": (4, 6, 8), "wo": (4, 8, 6)}
    return {"layer": {"moe": {name: jnp.arange(192, dtype=dtype).reshape(shape) for name, shape in shapes.items()}}}


def test_donated_arrays_are_given_up():
    trainer, server = small("float32"), convert.prefuse_params(small("float32"), layout="interleaved")
    sync = convert.sync_plan(trainer, server, layout="interleaved").jitted(donate=True)
    assert equal(sync(trainer), server)
    assert all(array.is_deleted() for array in jax.tree.leaves(trainer))


def test_gradients_go_through_it():
    moe = {
        "layer": {
            "moe": {name: jnp.ones(shape) for name, shape in {"wi_0": (2, 3, 4), "wi_1": (2, 3, 4), "wo": (2, 4, 3)}.items()}
        }
    }
    target = {"layer": {"moe": {"wi": jnp.zeros((2, 3, 8)), "wo": jnp.zeros((2, 4, 3))}}}
    sync = convert.sync_plan(moe, target, layout="concat")
    weights = jnp.arange(48.0).reshape(2, 3, 8)
    found = jax.grad(lambda tree: jnp.sum(sync(tree)["layer"]["moe"]["wi"] * weights))(moe)["layer"]["moe"]
    assert np.array_equal(jnp.concatenate([found["wi_0"], found["wi_1"]], -1), weights)


def test_a_server_of_nnx_with_names_of_its_own():
    trainer = {"layer": {"moe": {"wi_0": jnp.ones((2, 3, 4)), "wi_1": jnp.ones((2, 3, 4)) * 2, "wo": jnp.ones((2, 4, 3))}}}
    names = {"layer.moe.wi": "experts.w13", "layer.moe.wo": "experts.w2"}
    server = nnx.State({"experts": {"w13": nnx.Param(jnp.zeros((2, 3, 8))), "w2": nnx.Param(jnp.zeros((2, 4, 3)))}})
    sync = convert.sync_plan(trainer, server, layout="concat", names=names.__getitem__)
    found = sync.jitted()(trainer)
    assert isinstance(found, nnx.State)
    assert np.array_equal(found["experts"]["w13"].get_value()[..., 4:], trainer["layer"]["moe"]["wi_1"])


TREE = {
    "layer": {"moe": {"wi_0": jnp.ones((2, 3, 4)), "wi_1": jnp.ones((2, 3, 4)), "wo": jnp.ones((2, 4, 3))}, "norm": jnp.ones(3)}
}
MOE = {"wi": jnp.ones((2, 3, 8)), "wo": jnp.ones((2, 4, 3))}
REFUSED = {
    "a leaf too many there": (
        {"layer": {"moe": {**MOE, "bias": jnp.ones(3)}, "norm": jnp.ones(3)}},
        "bias of the second tree is not",
    ),
    "a leaf too many here": ({"layer": {"moe": MOE}}, "layer.norm has no place in the second tree"),
    "another shape": (
        {"layer": {"moe": {**MOE, "wi": jnp.ones((2, 3, 9))}, "norm": jnp.ones(3)}},
        r"becomes \(2, 3, 8\), and is",
    ),
    "no array": ({"layer": {"moe": {**MOE, "wi": "text"}, "norm": jnp.ones(3)}}, "wi is a str and no array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_trees_that_do_not_fit(case):
    target, said = REFUSED[case]
    with pytest.raises(convert.PlanError, match=said):
        convert.sync_plan(TREE, target, layout="concat")


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """Qwen3.5, in which queries, keys, values and gates take turns, as bfloat16 with NaN payloads; two layers of each kind."""
    model, path = reader("qwen3_5_moe"), tmp_path_factory.mktemp("a")
    arrays = {name: array.view(ml_dtypes.bfloat16)[..., : array.shape[-1]] for name, array in model.arrays.items()}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(model.config))
    return path


TURNS = [("maxtext", True, "numpy"), ("hf", False, "numpy")]
SLOWER = [each for each in itertools.product(("maxtext", "hf"), (True, False), ("numpy", "eager", "jit")) if each not in TURNS]


@pytest.mark.parametrize(("to", "scan", "how"), [*TURNS, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOWER)])
def test_tensors_that_take_turns(sections, to, scan, how):
    """Both ways, bit for bit what a conversion makes of them."""
    tree, plain = convert.load(sections, names="maxtext", scan=scan), convert.load(sections)
    (trainer, server), whose = ((plain, tree), "hf") if to == "maxtext" else ((tree, plain), "maxtext")
    sync = convert.sync_plan(trainer, server, names=to, source_names=whose, config=config(sections), scan=scan)
    trainer = jax.tree.map(np.asarray, trainer) if how == "numpy" else trainer
    assert equal(sync.jitted()(trainer) if how == "jit" else sync(trainer), server)


@pytest.mark.slow
def test_gradients_and_shards_go_through_what_takes_turns(sections):
    """The derivative is the way back; on devices that share each array."""
    asked, options = {"sharding": cut, "dtype": "float32"}, {"config": config(sections)}
    plain, tree = convert.load(sections, **asked), convert.load(sections, names="maxtext", **asked)
    counted, weights = (jax.tree.map(lambda x: jax.device_put(np.arange(x.size, dtype="f4").reshape(x.shape), x.sharding), t)
                        for t in (plain, tree))  # fmt: skip
    sync = convert.sync_plan(plain, tree, names="maxtext", source_names="hf", **options).jitted()
    back = convert.sync_plan(tree, plain, names="hf", **options).jitted()
    assert equal(back(sync(counted)), counted)
    assert equal(jax.jit(lambda x, w: jax.vjp(sync, x)[1](w)[0])(counted, weights), back(weights))


def test_a_tree_that_is_not_as_planned():
    sync = convert.sync_plan(TREE, {"layer": {"moe": MOE, "norm": jnp.ones(3)}}, layout="concat")
    with pytest.raises(convert.PlanError, match="norm is not in the tree"):
        sync({"layer": {"moe": TREE["layer"]["moe"]}})
    with pytest.raises(convert.UsageError, match="source_names: 'torch' is neither"):
        convert.sync_plan(TREE, TREE, source_names="torch")


@pytest.mark.parametrize("alone", [False, True])
def test_lora_of_gate_and_up_goes_along(alone):
    kept = {name: array for name, array in lora_tree()["moe"].items() if not alone or "lora" in name}
    trainer = {"decoder": {"moe": kept}}
    wanted = convert.prefuse_params(trainer)
    made = convert.sync_plan(trainer, specs(wanted), layout="concat")(trainer)
    assert equal(made, wanted)
