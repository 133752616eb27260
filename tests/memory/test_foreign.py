"""Trees that others made: numbers in names, arrays of libraries that nobody here knows, and leaves that cannot be fused."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import convert
from tests.memory.test_containers import E, K, N, moe

FAMILY = {"family": "qwen3_moe"}


def experts(kind):
    """One layer as Hugging Face has it, nested; numbers of experts are words or integers."""
    words = {"gate_proj": (N, K), "up_proj": (N, K), "down_proj": (K, N)}
    each = [{word: {"weight": np.full(shape, e)} for word, shape in words.items()} for e in range(E)]
    return {"mlp": {"experts": {kind(e): expert for e, expert in enumerate(each)}}}


TREES = {
    "integers": {"model": {"layers": {0: experts(int)}}},
    "words": {"model": {"layers": {"0": experts(str)}}},
    "words within a list": {"model": {"layers": [experts(str)]}},
    "State": nnx.State({"model": {"layers": {0: experts(int)}}}),
    "tuples of integers": flatten_dict({"model": {"layers": {0: experts(int)}}}),
    "tuples of words": flatten_dict({"model": {"layers": {"0": experts(str)}}}),
}


@pytest.mark.parametrize("name", TREES)
def test_numbers_come_back_as_what_they_were(name):
    fused = convert.prefuse_params(TREES[name], **FAMILY)
    again = convert.split_params(fused, "concat", **FAMILY)
    assert jax.tree.structure(again) == jax.tree.structure(TREES[name]) != jax.tree.structure(fused)


class Foreign:
    """An array of a library that nobody here knows; it speaks DLPack."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, f"lib.{array.dtype}"

    def __dlpack__(self, **asked):
        return self.array.__dlpack__(**asked)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_jax_takes_over_what_speaks_dlpack(dtype):
    arrays = {name: array.astype(dtype) for name, array in moe().items()}
    params = {"moe": {name: Foreign(array) for name, array in arrays.items()}, "other": Foreign(np.ones(3))}
    fused = convert.prefuse_params(params, layout="interleaved")
    wanted = convert.prefuse_params(arrays, layout="interleaved")["wi"]
    assert isinstance(fused["moe"]["wi"], jax.Array)
    assert np.asarray(fused["moe"]["wi"]).tobytes() == np.asarray(wanted).tobytes()
    assert fused["other"] is params["other"]


@dataclass
class Plain:
    params: dict


def deleted():
    array = jnp.ones((E, K, N))
    array.delete()
    return array


def apart():
    return {name: jax.device_put(array, jax.devices()[name == "wi_1"]) for name, array in moe().items()}


@pytest.mark.parametrize(
    ("params", "kind", "message"),
    [
        (
            lambda: optax.sm3(1e-3).init(moe()),
            convert.PlanError,
            "wi_0 has the name of an expert's weight and is several arrays",
        ),
        (lambda: Plain(moe()), convert.PlanError, "no arrays: params is a Plain, neither an array nor a container"),
        (lambda: {**moe(), "wi_0": deleted()}, convert.UsageError, "params.wi_0 was given up to another call"),
        (apart, convert.PlanError, "params.wi_0 and params.wi_1 lie on different devices"),
        (
            lambda: {name: Foreign(np.asarray(array).astype("f8")) for name, array in moe().items()},
            convert.PlanError,
            "params.wi_0 is float64, which JAX takes for|params.wi_0: JAX cannot take over a Foreign by DLPack",
        ),
    ],
    ids=["several arrays", "no tree", "deleted", "apart", "64 bits"],
)
def test_what_cannot_be_fused_is_named(params, kind, message):
    with pytest.raises(kind, match=message):
        convert.prefuse_params(params())
