"""The in-memory calls: bits preserved, structure kept, sharding kept, errors clear."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert


def tree(make):
    rng = np.random.default_rng(0)
    bits = [rng.integers(0, 1 << 16, (3, 2, 5, 7), dtype=np.uint16) for _ in range(2)]
    gate, up = (make(b.view(ml_dtypes.bfloat16)) for b in bits)
    moe = {
        "gate": {"kernel": np.ones((5, 3))},
        "wi_0": gate,
        "wi_1": up,
        "wo": make(bits[0].swapaxes(2, 3).view(ml_dtypes.bfloat16)),
    }
    return {"decoder": {"moe": moe, "mlp": {"wi_0": {"kernel": np.ones((5, 7))}}}, "list": [dict(moe), None]}


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_fuse_and_split_keep_every_bit_and_the_structure(make):
    params = tree(make)
    fused = convert.prefuse_params(params)
    moe = fused["decoder"]["moe"]
    assert list(moe) == ["gate", "wi", "wo"]
    assert isinstance(moe["wi"], type(make(np.ones(1))))
    wanted = np.concatenate([np.asarray(params["decoder"]["moe"][w]).view(np.uint16) for w in ("wi_0", "wi_1")], -1)
    np.testing.assert_array_equal(np.asarray(moe["wi"]).view(np.uint16), wanted)
    assert fused["list"][0]["wi"].shape == (3, 2, 5, 14)
    assert moe["wo"] is params["decoder"]["moe"]["wo"]
    again = convert.split_params(fused, "concat")
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert new.dtype == old.dtype
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def test_block_scales_are_fused_and_biases_stay():
    rng = np.random.default_rng(2)
    arrays = {f"wi_{g}{end}": rng.random((3, *rest)) for g in (0, 1) for end, rest in (("", (4, 6)), ("_scale", (2, 3)))}
    moe = {
        **arrays,
        "wo": rng.random((3, 6, 4)),
        "wo_scale": rng.random((3, 3, 2)),
        "wi_0_bias": rng.random((3, 6)),
        "wi_1_bias": rng.random((3, 6)),
    }
    fused = convert.prefuse_params({"moe": moe})["moe"]
    assert fused.keys() == {"wi", "wi_scale", "wo", "wo_scale", "wi_0_bias", "wi_1_bias"}
    np.testing.assert_array_equal(fused["wi_scale"], np.concatenate((arrays["wi_0_scale"], arrays["wi_1_scale"]), -1))
    again = convert.split_params({"moe": fused}, "concat")["moe"]
    assert all(np.array_equal(again[key], moe[key]) for key in moe | again)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"wo": np.ones((1, 2, 2))}, r"no leaves are called as \*\.wi_0 is"),
        ({"m": {"wi_0": np.ones((1, 2, 2))}}, "params.m.wi_1 is missing"),
        ({"m": {"wi_0": np.ones((1, 2, 2)), "wi_1": np.ones((1, 2, 3))}}, "must be alike, but params.m.wi_0 is F64"),
        ({"m": {"wi_0": np.ones((1, 2, 2)), "wi_1": np.ones((1, 2, 2)), "wi": 1}}, "params.m.wi has the name"),
        # a scale for each expert: one for gate and one for up have no place in one
        (
            {"m": {"wi_0": np.ones((2, 2, 2)), "wi_1": np.ones((2, 2, 2)), "wi_0_scale": np.ones(2), "wi_1_scale": np.ones(2)}},
            "wi_0_scale is one number for gate",
        ),
    ],
)
def test_fuse_refuses_what_it_cannot_fuse(params, message):
    with pytest.raises((convert.PlanError, convert.InputError), match=message):
        convert.prefuse_params(params)


@pytest.mark.parametrize("params", [{"m": {"wi": np.ones((1, 2, 3))}}, {"wi": {"kernel": np.ones((2, 2))}}])
def test_split_refuses_what_it_cannot_split(params):
    with pytest.raises(convert.PlanError):
        convert.split_params(params, "concat")
