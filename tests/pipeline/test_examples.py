"""The worked examples of the guide, as they stand there: training that goes on fused, and a MaxText tree fused in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import convert
import scripts.make_checkpoint as made
from tests import tiny
from tests.pipeline.test_load import bits, dotted

E, K, N = 4, 8, 16


class MoE(nnx.Module):
    """Each token goes through all experts, weighted by a router; fused or not, as its parameters are."""

    def __init__(self, rngs):
        shapes = {"wi_0": (E, K, N), "wi_1": (E, K, N), "wo": (E, N, K), "router": (K, E)}
        for name, shape in shapes.items():
            setattr(self, name, nnx.Param(jax.random.normal(rngs.params(), shape) * 0.2))

    def __call__(self, x):
        if hasattr(self, "wi"):
            gate, up = jnp.split(jnp.einsum("tk,ekn->etn", x, self.wi[...]), 2, axis=-1)
        else:
            gate, up = (jnp.einsum("tk,ekn->etn", x, wi[...]) for wi in (self.wi_0, self.wi_1))
        out = jnp.einsum("etn,enk->etk", nnx.silu(gate) * up, self.wo[...])
        return jnp.einsum("etk,te->tk", out, jax.nn.softmax(x @ self.router[...]))


def data(step):
    x, y = np.random.default_rng(step).standard_normal((2, 32, K)).astype("f4")
    return jnp.asarray(x), jnp.asarray(y)


def train(graph, params, state, steps, adam):
    @jax.jit
    def update(params, state, x, y):
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2))(params)
        changes, state = adam.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    losses = []
    for step in steps:
        params, state, loss = update(params, state, *data(step))
        losses.append(float(loss))
    return params, state, losses


def test_training_goes_on_where_it_was_prefused():
    adam = optax.adam(1e-2)
    graph, params = nnx.split(MoE(nnx.Rngs(0)))
    params, state, _ = train(graph, params, adam.init(params), range(2), adam)
    _, _, wanted = train(graph, params, state, range(2, 6), adam)

    fused, fused_state = convert.prefuse_params(params), convert.prefuse_params(state)
    fused_graph = nnx.graphdef(convert.prefuse_params(nnx.merge(graph, params)))
    last, _, losses = train(fused_graph, fused, fused_state, range(2, 6), adam)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)
    assert set(convert.split_params(last, "concat")) == {"wi_0", "wi_1", "wo", "router"}


def test_training_through_the_fused_view():
    """The parameters stay apart, and the kernel sees them fused: gradients are those of the parts."""
    graph, params = nnx.split(MoE(nnx.Rngs(0)))
    fused_graph = nnx.graphdef(convert.prefuse_params(nnx.merge(graph, params)))
    x, y = data(0)

    def loss(graph, view):
        return lambda p: jnp.mean((nnx.merge(graph, view(p))(x) - y) ** 2)

    found = jax.grad(loss(fused_graph, convert.prefuse_params))(params)
    wanted = jax.grad(loss(graph, lambda p: p))(params)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
        assert float(jnp.abs(one).max()) > 0


def test_a_maxtext_tree_that_orbax_restored_is_the_files_when_it_is_fused(tmp_path):
    source = made.make_checkpoint(tmp_path / "a", family="qwen3_moe", format="orbax")
    convert.prefuse(source, tmp_path / "b", layout="per-shard", shards=2)
    restored = tiny.restore(next((tmp_path / "a").rglob("_METADATA")).parent)
    fused = convert.prefuse_params(restored, layout="per-shard", shards=2)
    wanted = tiny.restore(next((tmp_path / "b").rglob("_METADATA")).parent)
    fused, wanted = dotted(fused), dotted(wanted)
    assert fused.pop("step") == wanted.pop("step")
    assert tiny.same(bits(fused), bits(wanted))
