"""MaxText's muon takes a fused `wi` as one matrix, and so steps otherwise than with gate and up: why its state is refused."""

import warnings

import numpy as np
import pytest

with warnings.catch_warnings():  # what it imports is deprecated
    warnings.simplefilter("ignore")
    pytest.importorskip("maxtext.optimizers.muon")
    pytest.importorskip("maxtext.utils.muon_utils")

import jax.numpy as jnp
from maxtext.optimizers import muon
from maxtext.utils.muon_utils import transform_logic

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

E, K, N = 2, 8, 6


def step(name: str, gradient: np.ndarray) -> np.ndarray:
    """The first update that MaxText's muon makes of a gradient of a leaf of this name, by the axes that it says."""
    axes = transform_logic(("params", "decoder", "layers_0", "moe_block", name), gradient.shape)
    sharded = muon.ShardedMuonDimensionNumbers(axes.reduction_axis, axes.output_axis)
    rule = muon.scale_by_muon(weight_dimension_numbers={name: sharded})
    params = {name: jnp.asarray(gradient)}
    return np.asarray(rule.update(params, rule.init(params), params)[0][name])


def test_a_step_of_the_fused_matrix_is_not_those_of_its_halves():
    rng = np.random.default_rng(0)
    gate, up = rng.standard_normal((2, E, K, N)).astype(np.float32)
    apart = np.concatenate([step("wi_0", gate), step("wi_1", up)], axis=-1)
    fused = step("wi", np.concatenate([gate, up], axis=-1))
    assert fused.shape == apart.shape
    assert np.abs(fused - apart).max() > 0.1
