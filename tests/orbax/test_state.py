"""States of optimizers: those of one number per weight are fused along, all others are refused with the reason or left out."""

from contextlib import closing
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from convert.orbax.metadata import render
from convert.orbax.origin import origin_of
from convert.planning.planner import make_plan
from layouts.checkpoint import open_checkpoint
from layouts.errors import PlanError
from layouts.orbax.state import check_optimizer, drop_optimizer

optax = pytest.importorskip("optax")
E, L, K, N = 4, 3, 16, 8


def params():
    rng = np.random.default_rng(0)
    moe = {"wi_0": (E, L, K, N), "wi_1": (E, L, K, N), "wo": (E, L, N, K)}
    block = {name: jax.numpy.asarray(rng.standard_normal(shape), "float32") for name, shape in moe.items()}
    return {"params": {"decoder": {"layers": {"moe_block": block}, "norm": jax.numpy.ones(K)}}}


def save(path, optimizer):
    weights = params()
    tree = {"params": weights, "opt_state": optimizer.init(weights), "step": 5}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return open_checkpoint(path)


ELEMENTWISE = {
    "adam": optax.adam(1e-3),
    "adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "lion": optax.lion(1e-3),
    "accumulated": optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation(),
}
NOT = {
    "adafactor, unfactored": (optax.adafactor(1e-3, factored=False), "not of the shape"),
    "adafactor": (optax.adafactor(1e-3, min_dim_size_to_factor=4), "not of the shape"),
    "adafactor with momentum": (optax.adafactor(1e-3, min_dim_size_to_factor=4, momentum=0.9), "not of the shape"),
    "SM3": (optax.sm3(1e-3), "several parts"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_number_for_each_weight_is_fused_along(name, tmp_path):
    with closing(save(tmp_path / "in", ELEMENTWISE[name])) as reader:
        check_optimizer(reader)
        plan = make_plan(reader, tmp_path / "out", "prefuse")
    fused = [target.spec.name for target in plan.targets if target.spec.name.endswith(".wi")]
    assert len(fused) == 1 + sum(".wi_0" in name and name.startswith("opt_state") for name in reader.tensors)
    assert not [target.spec.name for target in plan.targets if target.spec.name.endswith(("wi_0", "wi_1"))]


@pytest.mark.parametrize("name", NOT)
def test_what_stands_for_a_whole_matrix_is_refused_with_the_reason(name, tmp_path):
    optimizer, reason = NOT[name]
    with (
        closing(save(tmp_path / "in", optimizer)) as reader,
        pytest.raises(PlanError, match=rf"wi_.*{reason}.*--drop-optimizer"),
    ):
        check_optimizer(reader)


def test_muon_is_refused_although_its_momentum_has_the_shape_of_the_weights(tmp_path):
    moments = {"opt_state": {"inner_states": {"muon": {"mu": params()}}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "in", args=ocp.args.PyTreeSave({"params": params(), **moments}))
        checkpointer.save(tmp_path / "alone", args=ocp.args.PyTreeSave(moments))  # an item of its own
    for name in ("in", "alone"):
        with closing(open_checkpoint(tmp_path / name)) as reader, pytest.raises(PlanError, match=r"muon's.*--drop-optimizer"):
            check_optimizer(reader)


def test_an_optimizer_that_is_left_out_is_empty_in_the_tree(tmp_path):
    reader = save(tmp_path / "in", NOT["adafactor"][0])
    with closing(drop_optimizer(reader)) as left:
        check_optimizer(left)
        plan = make_plan(left, tmp_path / "out", "prefuse")
        chunks = {target.spec.name: target.spec.shape for target in plan.targets}
        tree = render(plan, origin_of(left), chunks)["_METADATA"]
    assert not [target.spec.name for target in plan.targets if "opt_state" in target.spec.name]
    assert "\"('opt_state',)\"" in tree
    assert "('opt_state', '" not in tree
    assert replace(left, leaves=reader.leaves, tensors=reader.tensors) == reader
    assert any(target.spec.name == "step" for target in plan.targets)
