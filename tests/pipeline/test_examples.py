"""The worked examples of the guide, as they stand there: training that goes on fused, and a MaxText tree fused in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import convert
import scripts.make_checkpoint as made
from tests import guide

PAGE = "convert/pipeline/README.md"
NAMES = {"convert": convert, "jax": jax, "jnp": jnp, "nnx": nnx}
E, K, N = 4, 8, 16
ADAM = optax.adam(1e-2)


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


def train(graph, params, state, steps):
    @jax.jit
    def update(params, state, x, y):
        loss, gradients = jax.value_and_grad(lambda p: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2))(params)
        changes, state = ADAM.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, loss

    losses = []
    for step in steps:
        params, state, loss = update(params, state, *data(step))
        losses.append(float(loss))
    return params, state, losses


def test_training_goes_on_where_it_was_prefused():
    graph, params = nnx.split(MoE(nnx.Rngs(0)))
    params, _, losses = train(graph, params, ADAM.init(params), range(6))
    found = guide.run(PAGE, "### Training continues, fused", NAMES | {"model": MoE(nnx.Rngs(0)), "adam": ADAM, "train": train})
    np.testing.assert_allclose(found["losses"], losses[2:], rtol=1e-5)
    assert set(found["fused"]) == {"wi", "wo", "router"}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5), found["params"], params)


def test_training_through_the_fused_view():
    graph, params = nnx.split(MoE(nnx.Rngs(0)))
    x, y = data(0)
    found = guide.run(PAGE, "### Training through the fused view", NAMES | {"graph": graph, "params": params, "x": x, "y": y})
    wanted = jax.grad(lambda p: jnp.mean((nnx.merge(graph, p)(x) - y) ** 2))(params)
    for one, other in zip(jax.tree.leaves(found["gradients"]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
        assert float(jnp.abs(one).max()) > 0


def test_a_maxtext_tree_that_orbax_restored_is_the_files_when_it_is_fused(tmp_path):
    run = made.make_checkpoint(tmp_path / "a", family="qwen3_moe", format="orbax")
    found = guide.run(PAGE, "### A MaxText tree that Orbax restored", NAMES | {"run": run, "out": tmp_path / "b"})
    names = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(found["fused"])[0]}
    assert "wi" in names
    assert not names & {"wi_0", "wi_1"}
