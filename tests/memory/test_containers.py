"""Whatever holds the arrays comes back, with fused leaves in it, and comes back again when it is split."""

import copy
from collections import OrderedDict, defaultdict
from types import MappingProxyType

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict

import convert

E, K, N = 2, 3, 4
LOGICAL = {"wi_0": ("exp", "embed", "mlp"), "wi_1": ("exp", "embed", "mlp"), "wo": ("exp", "mlp", "embed")}


def moe(seed=0, make=jnp.asarray):
    rng = np.random.default_rng(seed)
    shapes = {"wi_0": (E, K, N), "wi_1": (E, K, N), "wo": (E, N, K)}
    return {name: make(rng.random(shape, "f4")) for name, shape in shapes.items()}


def tree(make=jnp.asarray):
    return {"decoder": {"norm": make(np.ones(K, "f4")), "moe": moe(0, make)}, "layers": [{"moe": moe(i, make)} for i in (1, 2)]}


def boxed(box):
    return {"moe": {name: box(array, names=LOGICAL[name]) for name, array in moe().items()}}


def masked():
    names = lambda path, _: "wi" not in jax.tree_util.keystr(path)  # noqa: E731
    chain = optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-3), lambda p: jax.tree_util.tree_map_with_path(names, p)))
    return chain.init(tree())


HELD = {
    "dict": tree,
    "FrozenDict": lambda: FrozenDict({"decoder": tree()["decoder"]}),
    "OrderedDict": lambda: OrderedDict(tree()),
    "flat tuples": lambda: flatten_dict({"decoder": tree()["decoder"]}),
    "flat slashes": lambda: flatten_dict({"decoder": tree()["decoder"]}, sep="/"),
    "flat dots": lambda: flatten_dict({"decoder": tree()["decoder"]}, sep="."),
    "haiku": lambda: {"net/~/moe": moe(), "net/linear": {"w": jnp.ones(2)}},
    "integers in tuples": lambda: flatten_dict({"decoder": {0: tree()["decoder"]}}),
    "at the top": moe,
    "State": lambda: nnx.State({"decoder": {"moe": {name: nnx.Param(array) for name, array in moe().items()}}}),
    "State of arrays": lambda: nnx.State({"decoder": {"moe": moe()}}),
    "TrainState": lambda: TrainState.create(apply_fn=None, params=tree(), tx=optax.adamw(1e-3)),
    "adam": lambda: optax.adam(1e-3).init(tree()),
    "MultiSteps": lambda: optax.MultiSteps(optax.lion(1e-3), 2).init(tree()),
    "masked": masked,
    "masked beside": lambda: {"params": tree(), "state": masked()},
    "frozen out": lambda: {"a": {"moe": dict.fromkeys(moe())}, "b": {"moe": moe()}},
    "Partitioned": lambda: boxed(nn.Partitioned),
    "LogicallyPartitioned": lambda: boxed(nn.LogicallyPartitioned),
    "abstract": lambda: jax.eval_shape(tree),
    "NumPy": lambda: tree(np.asarray),
}


@pytest.mark.parametrize("held", HELD)
def test_the_same_container_comes_back(held):
    params = HELD[held]()
    before = jax.tree.structure(params)
    fused = convert.prefuse_params(params)
    assert type(fused) is type(params)
    names = "".join(map(jax.tree_util.keystr, (path for path, _ in _leaves(fused))))
    assert "wi" in names
    assert "wi_0" not in names
    again = convert.split_params(fused, "concat")
    assert jax.tree.structure(params) == before == jax.tree.structure(again)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        assert np.array_equal(one, other) if not isinstance(one, jax.ShapeDtypeStruct) else one == other


def _leaves(node):
    return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode))[0]


def test_containers_that_jax_does_not_know():
    for make in (MappingProxyType, lambda t: defaultdict(list, t)):
        params = make(tree())
        fused = convert.prefuse_params(params)
        assert type(fused) is type(params)
        assert fused["decoder"]["moe"].keys() == {"wi", "wo"}
        assert params["decoder"]["moe"].keys() == moe().keys()
    assert fused["new"] == []


def test_an_optimizer_goes_on_where_it_was():
    """The state of the fused parameters is the state that the optimizer has of fused parameters."""
    optimizer = optax.adamw(1e-2)
    params = tree()
    update = jax.jit(optimizer.update)
    state = update(params, optimizer.init(params), params)[1]
    fused, fused_state = convert.prefuse_params(params), convert.prefuse_params(state)
    assert jax.tree.structure(fused_state) == jax.tree.structure(optimizer.init(fused))
    updates, _ = update(params, state, params)
    fused_updates, _ = update(fused, fused_state, fused)
    for one, other in zip(jax.tree.leaves(convert.prefuse_params(updates)), jax.tree.leaves(fused_updates), strict=True):
        np.testing.assert_array_equal(one, other)


def test_axis_names_follow_their_axes():
    wi = convert.prefuse_params(boxed(nn.Partitioned), layout="fused-moe")["moe"]["w13"]
    assert wi.names == ("exp", None, "embed", "mlp")
    wi = convert.prefuse_params(boxed(nn.Partitioned), layout="flashinfer")["moe"]["w13_weight"]
    assert wi.names == ("exp", "mlp", "embed")
    params = boxed(nn.Partitioned)
    params["moe"]["wi_1"] = params["moe"]["wi_1"].replace(names=("exp", "mlp", "embed"))
    with pytest.raises(convert.PlanError, match=r"must be alike, but params.moe.wi_0 is .*'embed', 'mlp'"):
        convert.prefuse_params(params)
    with nnx.use_eager_sharding(False):
        state = nnx.State({"moe": {k: nnx.Param(v, out_sharding=LOGICAL[k], tag=k[:2]) for k, v in moe().items()}})
        made = convert.prefuse_params(state, layout="vllm")["moe"]["w13_weight"]
    assert isinstance(made, nnx.Param)
    assert made.get_metadata()["out_sharding"] == ("exp", "mlp", "embed")
    assert made.get_metadata()["tag"] == "wi"


class Moe(nnx.Module):
    def __init__(self, seed):
        for name, array in moe(seed).items():
            setattr(self, name, nnx.Param(array))


class Model(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Moe(0), Moe(1)])
        self.named = nnx.Dict(first=Moe(2))
        self.tied = self.layers[0]
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(0))


def test_a_module_is_cloned_and_its_attributes_replaced():
    model = Model()
    fused = convert.prefuse_params(model)
    assert isinstance(fused, Model)
    assert hasattr(model.layers[0], "wi_0")
    assert fused.tied is fused.layers[0]
    for mine, theirs in zip((*fused.layers, fused.named["first"]), (*model.layers, model.named["first"]), strict=True):
        assert not hasattr(mine, "wi_0")
        np.testing.assert_array_equal(mine.wi[...], jnp.concatenate((theirs.wi_0[...], theirs.wi_1[...]), -1))
        assert mine.wo is not theirs.wo
    again = nnx.state(convert.split_params(fused, "concat"))
    assert jax.tree.structure(again) == jax.tree.structure(nnx.state(model))


def test_gradients_through_a_module_and_its_optimizer():
    model = Moe(0)
    gradient = nnx.grad(lambda m: (convert.prefuse_params(m).wi[...] ** 2).sum())(model)
    np.testing.assert_array_equal(gradient["wi_1"][...], 2 * model.wi_1[...])
    optimizer = convert.prefuse_params(nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param))
    assert optimizer.opt_state[0].mu["wi"].shape == (E, K, 2 * N)


def hugging_face(layers, experts):
    """Modules as dictionaries or lists, as `torch.nn.ModuleList` and its conversions leave them."""
    words = {"gate_proj": (N, K), "up_proj": (N, K), "down_proj": (K, N)}
    each = [{word: {"weight": np.full(shape, e, "f4")} for word, shape in words.items()} for e in range(E)]
    return {"model": {"layers": layers([{"mlp": {"experts": experts(each)}}])}}


@pytest.mark.parametrize(
    "make", [list, tuple, lambda items: {str(i): item for i, item in enumerate(items)}], ids=["list", "tuple", "dict"]
)
def test_nested_hugging_face_modules(make):
    fused = convert.prefuse_params(hugging_face(make, make), family="qwen3_moe")
    layers = fused["model"]["layers"]
    experts = next(iter(layers.values() if isinstance(layers, dict) else layers))["mlp"]["experts"]
    assert experts.keys() == {"wi", "wo"}
    assert experts["wi"].shape == (E, K, 2 * N)
    again = convert.split_params(fused, "concat", family="qwen3_moe")
    assert jax.tree.leaves(again)[0].shape == (K, N)


@flax.struct.dataclass
class Fields:
    wi_0: jax.Array
    wi_1: jax.Array
    wo: jax.Array


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"m": Fields(**moe())}, "a Fields has its fields once and for all, so wi_0, wi_1 cannot become wi in it"),
        ({"m": {"wi_0": jax.sharding.PartitionSpec("x"), "wi_1": 1}}, "wi_0 has the name of an expert's weight and is a P"),
        ({"m": {**moe(), "wi_1": None}}, "wi_1 is missing"),
        ({"m": {**moe(), "wi": np.ones((E, K, N))}}, "looks like layout 'concat'"),
        ({"m": moe(), ("m", "wi_0"): np.ones((E, K, N))}, "params.m.wi_0: two leaves have this name"),
        (optax.adafactor(1e-3).init({"m": moe()}), "v_row.m.wo .*: a tensor of rank 1 is not of the form"),
        ([], r"no leaves are called as \*.wi_0 is. First leaves: none"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused(params, message):
    kept = copy.copy(params)
    with pytest.raises((convert.PlanError, convert.InputError), match=message):
        convert.prefuse_params(params)
    assert type(kept) is type(params)


def test_an_unknown_family_is_refused():
    with pytest.raises(convert.PlanError, match="no MoE family is called 'mixtrall'"):
        convert.prefuse_params(tree(), family="mixtrall")


NAMES = {"wi_0": "gate_proj.kernel", "wi_1": "up_proj.kernel", "wo": "down_proj.kernel", "wi": "gate_up.kernel"}


def test_names_of_the_callers_own():
    arrays = moe()
    params = {"moe": {end.split(".")[0]: {"kernel": arrays[word]} for word, end in NAMES.items() if word != "wi"}}
    params["dense"] = {"wi_0": jnp.ones((K, N)), "wi_1": jnp.ones((K, N))}
    fused = convert.prefuse_params(params, names=NAMES)
    assert fused["moe"].keys() == {"gate_up", "down_proj"}
    np.testing.assert_array_equal(fused["moe"]["gate_up"]["kernel"], jnp.concatenate((arrays["wi_0"], arrays["wi_1"]), -1))
    assert fused["dense"].keys() == {"wi_0", "wi_1"}
    again = convert.split_params(fused, "concat", names=NAMES)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    np.testing.assert_array_equal(again["moe"]["up_proj"]["kernel"], arrays["wi_1"])
    record = convert.layout_of(params, layout="gmm-ep", names=NAMES)
    padded = convert.prefuse_params(params, layout="gmm-ep", names=NAMES)
    np.testing.assert_array_equal(
        convert.split_params(padded, record, names=NAMES)["moe"]["gate_proj"]["kernel"], arrays["wi_0"]
    )


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ({"gate": "wi_0"}, {}, "'gate' is none of wi_0, wi_1, wi, wo"),
        ({"wi_0": "a", "wi_1": "a"}, {}, "two words are called the same"),
        ({"wi_0": 3}, {}, "3 is no end of a name"),
        ({"wi_0": "a"}, {"family": "mixtral"}, "give names or a family"),
    ],
)
def test_names_that_say_nothing(names, options, message):
    with pytest.raises(convert.UsageError, match=message):
        convert.prefuse_params(tree(), names=names, **options)
