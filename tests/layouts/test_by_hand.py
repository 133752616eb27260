"""Every family as published, against the same family written by hand: what is fused, where, and that nothing is lost."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.errors import ConvertError, PlanError
from convert.planning.planner import make_plan
from layouts.matching.describe import describe
from layouts.tables.families import FAMILIES, NOT_GATED, name_of
from layouts.tables.natives import SOURCES
from tests.layouts.by_hand import APART, CASES, MODELS, SAID, config, tensors, weights
from tests.layouts.by_hand.styles import out_in
from tests.tiny import MemoryReader, run, same

EACH = pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
ONE = pytest.mark.parametrize("name", MODELS)
SIZES = {"usual": (12, 6, 4), "square": (12, 8, 4), "all alike": (12, 6, 6)}


def reader(name: str, kind: str = "", e: int = 12, k: int = 6, n: int = 4) -> MemoryReader:
    model = MODELS[name]
    return MemoryReader(tensors(model, e=e, k=k, n=n), config=config(model, kind or model.types[0], e))


def place(name: str, layer: int) -> str:
    model = MODELS[name]
    return (model.fused or f"{model.at}.experts").format(layer)


@EACH
@pytest.mark.parametrize("sizes", SIZES)
def test_gate_up_and_down_are_where_concat_wants_them(name, kind, sizes):
    e, k, n = SIZES[sizes]
    source = reader(name, kind, e, k, n)
    fused = run(source, "prefuse")
    for layer in (2, 11):
        gate, up, down = weights(layer, e, k, n)
        assert np.array_equal(fused.arrays[f"{place(name, layer)}.wi"], np.concatenate((gate, up), -1))
        assert np.array_equal(fused.arrays[f"{place(name, layer)}.wo"], down)
    assert same(run(fused, "split").arrays, source.arrays)


@ONE
def test_rows_for_vllm_and_shards_for_tpus(name):
    source = reader(name)
    rows, cut = run(source, "prefuse", layout="vllm"), run(source, "prefuse", layout="per-shard", shards=2, align=3)
    gate, up, down = weights(11, 12, 6, 4)
    assert np.array_equal(rows.arrays[f"{place(name, 11)}.w13_weight"], np.concatenate((gate, up), -1).swapaxes(1, 2))
    assert np.array_equal(rows.arrays[f"{place(name, 11)}.w2_weight"], down.swapaxes(1, 2))
    zero = np.zeros((12, 6, 1), "u4")
    halves = [np.concatenate((w[..., s : s + 2], zero), -1) for s in (0, 2) for w in (gate, up)]
    assert np.array_equal(cut.arrays[f"{place(name, 11)}.wi"], np.concatenate(halves, -1))
    for fused in (rows, cut):
        assert same(run(fused, "split").arrays, source.arrays)


@ONE
def test_all_else_is_copied_as_it_is(name):
    source, model = reader(name), MODELS[name]
    experts = set(model.style(model.at.format(2), *weights(2, 12, 6, 4))) | set(
        model.style(model.at.format(11), *weights(11, 12, 6, 4))
    )
    verbatim = {target.spec.name for target in make_plan(source, Path("out"), "prefuse").targets if target.role == "verbatim"}
    assert verbatim == set(source.arrays) - experts


@ONE
def test_no_damage_to_an_expert_tensor_is_silent(name):
    source, model = reader(name), MODELS[name]
    experts = list(model.style(model.at.format(11), *weights(11, 12, 6, 4)))
    for victim in {experts[0], experts[-1], experts[len(experts) // 2]}:
        array = source.arrays[victim]
        renamed = re.sub(r"11", "77", victim, count=1)
        for damage in ({}, {victim + "_x": array}, {renamed: array}, {victim: np.concatenate((array, array), -1)}):
            if renamed in damage and len(experts) == 2:
                continue  # a layer of two tensors that both move is another layer
            arrays = {n: a for n, a in source.arrays.items() if n != victim} | damage
            with pytest.raises(ConvertError) as error:
                make_plan(MemoryReader(arrays, config=source.config), Path("out"), "prefuse")
            assert error.value.exit_code in (3, 4)


@ONE
def test_a_model_type_that_the_names_contradict_is_refused(name):
    source = reader(name)
    other = "qwen3_moe" if ".ffn" in MODELS[name].at else "dbrx"
    with pytest.raises(PlanError):
        make_plan(MemoryReader(source.arrays, config={"model_type": other}), Path("out"), "prefuse")


@pytest.mark.parametrize("kind", NOT_GATED)
def test_families_without_a_gate_have_nothing_to_fuse(kind):
    arrays = {"backbone.layers.1.mixer.experts.0.up_proj.weight": np.zeros((4, 6), "u4")}
    with pytest.raises(PlanError, match="no gate, so there is nothing to fuse"):
        make_plan(MemoryReader(arrays, config={"model_type": kind}), Path("out"), "prefuse")


def test_every_family_of_the_table_is_written_by_hand():
    by_hand = {kind for _, kind in CASES} | {"ernie4_5_vl_moe"}  # in test_kinds.py
    missing = [f.name for f in FAMILIES if f.model_types and not by_hand & set(f.model_types)]
    assert not missing


ELSEWHERE = {
    "per-expert-kinds", "per-expert-paddle-kinds",  # test_kinds.py
    "per-expert-in-out", "per-expert-lists", "per-expert-lists-in-out", "tunix", "torchtitan", "stacked-bare",  # lookalikes
    "per-expert-below", "per-expert-in-mlp",  # test_unfused.py
    "maxtext", "maxtext-axis-0",  # tests/planning
}  # fmt: skip
"""Rows that are written by hand in another module: a user names them, or something stands beside them."""


def test_every_row_that_checkpoints_come_in_is_written_by_hand():
    used = set()
    for name, model in (MODELS | SAID).items():
        source = MemoryReader(tensors(model, layers=(2,), e=2), config=config(model, model.types[0], 2))
        found = describe(source, source_layout=name if name in SAID else None)
        used.add(name_of({group.role: group.layout for group in found.groups}, found.family))
    assert SOURCES.keys() - used == ELSEWHERE


@pytest.mark.parametrize("name", SAID)
def test_rows_that_a_user_names(name):
    """Each is refused until its layout is named."""
    model = SAID[name]
    source = MemoryReader(tensors(model), config=config(model, model.types[0], 12))
    with pytest.raises(PlanError, match=rf"source-layout: .*\b{name}\b"):
        make_plan(source, Path("out"), "prefuse")
    fused = run(source, "prefuse", source_layout=name)
    gate, up, down = weights(11, 12, 6, 4)
    assert np.array_equal(fused.arrays["model.layers.11.mlp.experts.wi"], np.concatenate((gate, up), -1))
    assert np.array_equal(fused.arrays["model.layers.11.mlp.experts.wo"], down)
    assert same(run(fused, "split").arrays, source.arrays)


NOT_HELD = {"smallthinker", "grok-1", "yuan2", "llama_moe", "dots3_note vision", "hunyuan"}
"""Transformers has no model of them, holds them otherwise (see `together`), or holds the rest of that model so."""
HELD = sorted(APART.keys() - NOT_HELD)


@pytest.mark.parametrize("name", HELD)
def test_what_transformers_holds_of_single_experts(name):
    """gate_up_proj (E, 2N, K) and down_proj (E, K, N), gate first, whatever is published: `save_original_format=False`."""
    model = APART[name]
    place = "model.layers.{}.mlp" if name == "mistral_large4" else model.at
    source = MemoryReader(tensors(replace(model, style=out_in, at=place)), config=config(model, model.types[0], 12))
    fused = run(source, "prefuse")
    gate, up, down = weights(11, 12, 6, 4)
    wi = [array for key, array in fused.arrays.items() if ".11." in key and key.endswith(".wi")]
    assert np.array_equal(wi[0], np.concatenate((gate, up), -1))
    assert np.array_equal(fused.arrays[next(n for n in fused.arrays if ".11." in n and n.endswith(".wo"))], down)
    assert same(run(fused, "split").arrays, source.arrays)
