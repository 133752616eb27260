"""Every family of the table: nothing is guessed, nothing is left over, and no damage is silent."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert.errors import ConvertError, InputError, PlanError
from convert.options import Choices
from convert.planning.landings import _apart, _check_written, land
from convert.planning.planner import make_plan
from layouts.language.layout import Placed
from layouts.language.template import Template
from layouts.matching.describe import describe
from layouts.matching.lookup import find_family, fitting
from layouts.tables.families import FAMILIES, Family
from layouts.tables.targets import TARGETS
from tests.tiny import HF, LOOKALIKES, E, K, MemoryReader, N, config, logical, memory, run, same, tensors

SEPARATE = [f for f in FAMILIES if f.name in ("mixtral", "qwen3_moe", "deepseek_v3", "lfm2_moe", "maxtext")]
"""Families with separate experts, one of a kind; tests/layouts/by_hand has them all."""
EACH = pytest.mark.parametrize("family", SEPARATE, ids=lambda family: family.name)
EACH_HF = pytest.mark.parametrize("family", SEPARATE[:-1], ids=lambda family: family.name)
LAYOUT = pytest.mark.parametrize("layout", ["concat", "transformers"])
STACKED = pytest.mark.parametrize("layout", ["concat", "transformers", "vllm", "interleaved"])
QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")
GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


def plan(reader, action="prefuse", **choices):
    return make_plan(reader, Path("out"), action, Choices(**choices))


def edited(family: Family, layout=None, **changes) -> MemoryReader:
    """A checkpoint of the family with tensors replaced, added, or (None) removed."""
    arrays = tensors(family, layout) | changes
    return MemoryReader({n: a for n, a in arrays.items() if a is not None}, config=config(family), format=family.format)


@EACH
@STACKED
@pytest.mark.parametrize("sizes", [(E, K, N), (E, 8, 4), (E, 4, 4), (1, 1, 1), (3, 5, 3)], ids=str)
def test_prefuse_is_what_the_layout_says_and_split_undoes_it(family, layout, sizes):
    dims = dict(zip("ekn", sizes, strict=True))
    original = memory(family, **dims)
    fused = run(original, "prefuse", layout=layout)
    assert same(fused.arrays, tensors(family, TARGETS[layout], **dims))
    assert same(run(fused, "split").arrays, original.arrays)


@EACH
def test_experts_are_in_the_order_of_their_numbers(family):
    name = next(name for name in tensors(family, TARGETS["concat"], layers=(2,), others=False) if name.endswith("wi"))
    wi = run(memory(family), "prefuse").arrays[name]
    gate, up = np.moveaxis(logical(2, E, K, N)["wi"], 2, 0)
    assert wi.shape == (E, K, 2 * N)
    assert [int(wi[e, 0, 0]) for e in (2, 10, 11)] == [int(gate[e, 0, 0]) for e in (2, 10, 11)]
    assert np.array_equal(wi, np.concatenate((gate, up), -1))


@EACH
def test_look_alikes_are_copied_and_listed(family):
    planned = plan(memory(family))
    assert {t.spec.name for t in planned.targets if t.role == "verbatim"} == set(LOOKALIKES[family.format])


@EACH
@LAYOUT
def test_every_source_element_is_read_once(family, layout):
    reader = memory(family)
    for now, action in ((reader, "prefuse"), (run(reader, "prefuse", layout=layout), "split")):
        counts = {name: np.zeros(array.shape, int) for name, array in now.arrays.items()}
        for target in plan(now, action, layout=layout).targets:
            for piece in target.pieces(target.target.pattern.whole(target.sizes)):
                window = target.source.pattern.window(target.sizes, piece.source_box)
                block = counts[piece.source][window.slices].reshape(window.shape)
                block[window.inside] += 1
                counts[piece.source][window.slices] = block.reshape(counts[piece.source][window.slices].shape)
        assert all((count == 1).all() for count in counts.values())


@EACH
@pytest.mark.parametrize("layout", [None, "concat", "transformers"])
def test_no_damage_to_one_tensor_is_silent(family, layout):
    """Removed, renamed, of another shape: for every expert tensor, in every layout that says what it is."""
    table = TARGETS.get(layout)
    choices = {"source_layout": layout} if layout else {}
    action = "split" if layout else "prefuse"
    plan(edited(family, table), action, **choices)
    for name in tensors(family, table, layers=(2,), others=False):
        array = tensors(family, table)[name]
        for damage in (
            {name: None},
            {name: None, name + "x": array},
            {name: None, re.sub(r"\d+(?!.*\d)", "77", name): array},
            {name: array.reshape(-1, 1)},
            {name: np.concatenate((array, array), -1)},
        ):
            with pytest.raises(ConvertError) as error:
                plan(edited(family, table, **damage), action, **choices)
            assert error.value.exit_code in (3, 4)
            assert "bug" not in str(error.value)


@EACH_HF
@pytest.mark.parametrize("name", list(tensors(QWEN, layers=(2,), others=False))[::5])
def test_another_element_type_is_named(family, name):
    reader = memory(family)
    name = next(n for n in reader.tensors if re.search(r"layers\.2\..*\.7\.", n))
    reader.tensors[name] = type(reader.tensors[name])(name=name, dtype="I32", shape=reader.tensors[name].shape)
    with pytest.raises(PlanError, match=rf"alike.*{re.escape(name)} \(in home of .*I32"):
        plan(reader)


@EACH_HF
@pytest.mark.parametrize(
    "name",
    [
        "{place}.3.gate_proj.weight_absmax",
        "{place}.03.gate_proj.weight",
        "{place}.e_score_correction_bias",
        "{place}.9999999999.gate_proj.weight",
        "mtp.layers.0.attention.experts.0.up_proj.weight",
        "model.layers.1.conv.experts.gate_up_proj",
    ],
)
def test_an_expert_tensor_that_the_table_does_not_know_is_refused(family, name):
    name = name.replace("{place}", next(iter(tensors(family, layers=(1,), others=False))).partition(".0.")[0])
    with pytest.raises(PlanError, match=rf"{re.escape(name)} \(in home of .*family {family.name} does not know") as error:
        plan(edited(family, **{name: np.zeros((2, 2), "u4")}))
    assert "--family" not in str(error.value), "the other names fit, so another family is no way out"


@EACH_HF
@pytest.mark.parametrize("stated", [E - 1, E + 1, 10**12])
def test_config_that_states_another_number_of_experts_is_refused(family, stated):
    for layout in (None, "transformers"):
        reader = memory(family, TARGETS.get(layout))
        reader.config["num_experts"] = stated
        with pytest.raises(InputError, match=rf"{stated}"):
            plan(reader, "split" if layout else "prefuse")


def test_a_hostile_expert_number_is_refused_without_counting_to_it():
    with pytest.raises(InputError, match=r"experts\.12\.gate_proj\.weight is missing"):
        plan(edited(QWEN, **{GATE.replace(".3.", ".999999999."): np.zeros((N, K), "u4")}))


@EACH
def test_both_layouts_at_once_are_refused(family):
    both = tensors(family, TARGETS["transformers"]) | tensors(family)
    reader = MemoryReader(both, config=config(family), format=family.format)
    with pytest.raises(PlanError, match="hold the same weights in two layouts"):
        plan(reader, source_layout="transformers")


@EACH
def test_a_half_layer_is_refused(family):
    lonely = edited(family, **{n: None for n in tensors(family, layers=(2,)) if re.search(r"down_proj|w2|\.wo$", n)})
    with pytest.raises(InputError, match="has no wo beside it"):
        plan(lonely)


def test_gate_and_down_of_other_sizes_do_not_fit_together():
    wider = {n: np.concatenate((a, a), -1) for n, a in tensors(QWEN, others=False).items() if "down_proj" in n}
    with pytest.raises(PlanError, match="do not fit together"):
        plan(edited(QWEN, **wider))


@EACH
def test_an_unmarked_fused_tensor_is_refused_until_it_is_named(family):
    reader = memory(family, TARGETS["concat"])
    with pytest.raises(PlanError, match="--source-layout"):
        plan(reader, "split")
    assert same(run(reader, "split", source_layout="concat").arrays, tensors(family))


@EACH_HF
def test_what_transformers_owns_needs_no_mark(family):
    assert same(run(memory(family, TARGETS["transformers"]), "split").arrays, tensors(family))


@EACH
def test_laying_out_again_keeps_the_weights(family):
    relaid = run(run(memory(family), "prefuse"), "prefuse", layout="transformers")
    assert same(relaid.arrays, tensors(family, TARGETS["transformers"]))
    assert same(run(relaid, "split").arrays, tensors(family))


@EACH
@LAYOUT
def test_there_must_be_something_to_do(family, layout):
    with pytest.raises(PlanError, match="as they were published already"):
        plan(memory(family), "split")
    with pytest.raises(PlanError, match=f"in layout '{layout}' already"):
        plan(run(memory(family), "prefuse", layout=layout), layout=layout)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("qwen3_5_mo", "model_type 'qwen3_5_mo' in config.json is no known MoE family (nearest: qwen3_5_moe)"),
        ("xyz", "nearest: qwen3_5_moe, qwen3_vl_moe, hy_v4"),
        (None, "config.json names no model_type"),
        (["qwen3_moe"], "model_type ['qwen3_moe']"),
        ("maxtext", "model_type 'maxtext'"),
    ],
)
def test_an_unknown_family_is_refused_with_the_nearest(model_type, words):
    """One tensor of gate and up has more than one reading, so that names alone do not tell; the nearest fit the names."""
    reader = memory(QWEN, TARGETS["transformers"])
    reader.config = {"model_type": model_type} if model_type else {}
    with pytest.raises(PlanError, match=re.escape(words)):
        plan(reader)
    assert same(run(reader, "prefuse", family="qwen3_moe").arrays, tensors(QWEN, TARGETS["concat"]))


def test_an_unknown_name_of_a_family_is_refused():
    with pytest.raises(PlanError, match=r"'qwen3moe' is no known MoE family \(nearest: qwen3_moe\)"):
        plan(memory(QWEN), family="qwen3moe")


def test_every_alias_finds_its_family():
    for family in (family for family in HF if family.model_types):
        assert all(
            find_family({"model_type": alias}, [], where=Path("in"), format="hf") is family
            for alias in (family.name, *family.model_types)
        )


@EACH_HF
def test_names_of_another_family_are_shown_with_the_family_that_has_them(family):
    name = {"mixtral": "jamba", "lfm2_moe": "qwen3_moe"}.get(family.name, "mixtral")
    other = next(f for f in HF if f.name == name)
    reader = MemoryReader(tensors(other), config=config(family))
    with pytest.raises(PlanError, match=rf"experts.*family {family.name} does not know.* names as in .*{other.name}"):
        plan(reader)
    assert same(run(reader, "prefuse", family=other.name).arrays, tensors(other, TARGETS["concat"]))


def test_a_dense_model_is_refused():
    reader = MemoryReader({name: np.zeros(2, "u4") for name in LOOKALIKES["hf"]}, config=config(QWEN))
    with pytest.raises(PlanError, match=r"no expert weights found where family qwen3_moe keeps them.*lm_head.weight"):
        plan(reader)


RECORD = run(memory(QWEN), "prefuse").record


@pytest.mark.parametrize(
    "damage",
    [
        {"wi": None},
        {"wi": {"key": "model.layers.{l}.mlp.experts.wi"}},
        {"wi": {"key": 5, "pattern": "e ... k (g n)"}},
        {"wi": {"key": "model.layers.{l}.mlp.experts.wi", "pattern": "e ... k n"}},
        {"wi": {"key": "model.layers.{l}.mlp.experts.wi", "pattern": "e" * 60 + "!"}},
        {"wo": {"key": "elsewhere.{l}.wo", "pattern": "e ... n k"}},
    ],
)
def test_a_damaged_record_is_refused(damage):
    reader = memory(QWEN, TARGETS["concat"])
    reader.record = json.loads(json.dumps({**RECORD, **damage}))
    with pytest.raises(InputError, match="record of the layout is damaged"):
        plan(reader, "split")


@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        ({**RECORD, "version": 99}, PlanError, "version 99"),
        ({**RECORD, "family": "nobody"}, PlanError, "nobody"),
        ([1], InputError, "expected an object"),
    ],
)
def test_a_record_of_something_else_is_refused(record, error, words):
    reader = memory(QWEN, TARGETS["concat"])
    reader.record = record
    with pytest.raises(error, match=words):
        plan(reader, "split")


def test_a_plan_that_would_lose_or_overwrite_something_is_refused():
    """The last net below the tables: no input that passes them is known to fall into it."""
    reader = memory(QWEN)
    described = describe(reader)
    landed = land(reader, described, "prefuse", Choices())
    made = plan(reader)
    assert (landed.count, landed.nbytes) == (sum(t.role != "verbatim" for t in made.targets), made.nbytes)
    name = next(landed.landings[0].names())
    with pytest.raises(PlanError, match=f"would be called {re.escape(name)}"):
        _check_written(reader, described, [*landed.landings, landed.landings[0]], ())
    way, layer = landed.landings[0].way, landed.landings[0].group.index["l"]
    key = Template(way.target.key.text.replace("{l}", str(layer)))  # the same names by another key
    again = landed.landings[0]._replace(way=replace(way, target=Placed(key, way.target.pattern)))
    assert list(again.names()) == list(landed.landings[0].names())
    assert _apart(landed.landings, described.verbatim)
    assert not _apart([*landed.landings, again], described.verbatim)
    with pytest.raises(PlanError, match=f"would be called {re.escape(name)}"):
        _check_written(reader, described, [*landed.landings, again], ())
    more = MemoryReader({**tensors(QWEN), name: np.zeros(1)}, config=reader.config, format="hf")
    with pytest.raises(PlanError, match=f"would be called {re.escape(name)}"):
        _check_written(more, replace(described, verbatim=(*described.verbatim, name)), landed.landings, ())
    with pytest.raises(PlanError, match="this is a bug"):
        _check_written(reader, described, landed.landings[1:], ())


def test_a_hint_for_many_odd_names_looks_at_few(monkeypatch):
    looked, parse = [], Template.parse
    monkeypatch.setattr(Template, "parse", lambda key, name: looked.append(name) or parse(key, name))
    names = [f"t{i}" for i in range(20_000)] + ["model.layers.0.mlp.experts.0.gate_proj.weight"]
    assert "olmoe" in [family.name for family in fitting(names, "hf")]
    assert len(set(looked)) <= 1_000
