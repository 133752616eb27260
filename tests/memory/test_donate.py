"""Arrays that are given up: no more than one layer is held twice, and nothing is freed that somebody still holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from convert import memory

E, K, N, LAYERS = 2, 8, 16, 6


def layers(dtype="float32"):
    rng = np.random.default_rng(0)
    shapes = {"wi_0": (E, K, N), "wi_1": (E, K, N), "wo": (E, N, K)}
    return {str(i): {k: jnp.asarray(rng.random(s), dtype) for k, s in shapes.items()} for i in range(LAYERS)}


@pytest.mark.parametrize("donate", [False, True])
def test_no_more_than_one_layer_is_held_twice(monkeypatch, donate):
    others = jax.live_arrays()  # held, so that no new array takes the place of one of them
    params = layers()
    wanted = {name: np.concatenate((layer["wi_0"], layer["wi_1"]), -1) for name, layer in params.items()}
    live, moved = [], memory.moved

    def watched(*arguments):
        made = moved(*arguments)
        live.append(sum(array.nbytes for array in jax.live_arrays() if all(array is not other for other in others)))
        return made

    monkeypatch.setattr(memory, "moved", watched)
    given, one = sum(array.nbytes for array in jax.tree.leaves(params)), 2 * E * K * N * 4
    fused = convert.prefuse_params(params, donate=donate)
    assert max(live) == given + (one if donate else LAYERS * one)
    for name, layer in params.items():
        assert layer["wi_0"].is_deleted() == donate
        assert not layer["wo"].is_deleted()
        np.testing.assert_array_equal(fused[name]["wi"], wanted[name])


def test_what_somebody_still_holds_is_not_freed():
    params = layers()
    params["1"]["wi_0"] = params["0"]["wi_0"]
    fused = convert.prefuse_params(params, donate=True)
    assert not params["0"]["wi_0"].is_deleted()
    assert params["0"]["wi_1"].is_deleted()
    again = convert.split_params(fused, "concat", donate=True)
    np.testing.assert_array_equal(again["1"]["wi_0"], params["0"]["wi_0"])
    traced = layers()
    jax.jit(lambda p: convert.prefuse_params(p, donate=True))(traced)
    assert not traced["0"]["wi_0"].is_deleted()
