"""Every layout of every family in memory, with the file engine as the oracle: the same names, the same bits, both ways."""

import itertools
import json
from functools import partial

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import convert
from convert.errors import ConvertError
from layouts.language.layout import Layout
from layouts.tables.families import FAMILIES, Family
from layouts.tables.natives import FLAT, SOURCES
from layouts.tables.targets import TARGETS
from tests.tiny import MemoryReader, config, logical, place, run, store

SHARDED = {"per-shard": {"shards": 2, "align": 3}, "lane": {"shards": 2}}
WIDE = {"n": 256, "k": 3, "e": 2}
"""What glu32 and lane divide."""
PRODUCT = [
    pytest.param(family, layout, marks=() if i % 13 == 0 else pytest.mark.slow, id=f"{family.name}-{layout}")
    for i, (family, layout) in enumerate(itertools.product((each for each in FAMILIES if each.kinds == 1), TARGETS))
]
"""Experts of several kinds are counted by `config.json`, which parameters in memory have none of."""


def checkpoint(family: Family, native) -> MemoryReader:
    """Two layers, as this native layout has them; einops knows no order but the usual one, so up comes first by hand."""
    found, turned = {}, "-g" in native["wi"].pattern
    plain = {role: Layout(layout.key, layout.pattern.replace("-g", "g")) for role, layout in native.items()}
    for layer in (1, 2):
        weights = logical(layer, **WIDE)
        weights["wi"] = weights["wi"][..., ::-1, :] if turned else weights["wi"]
        found |= store(plain, family.experts, place(family, layer), weights)
    words = {"transformers_version": "4.0" if native is family.native[0] else "5.0"} if family.changed_in else {}
    return MemoryReader(found, config=config(family, WIDE["e"]) | words, format=family.format)


def said(family: Family, native) -> dict:
    """What names and shapes do not say: config.json says it of files."""
    sizes = {"sizes": {"e": WIDE["e"]}} if native == FLAT else {}
    name = next(name for name, table in SOURCES.items() if family.own(table) == native)
    return {"family": family.name, **sizes, **({"source_layout": name} if family.changed_in else {})}


def same_trees(mine, wanted):
    assert mine.keys() == wanted.keys()
    for name, array in wanted.items():
        assert mine[name].shape == array.shape
        assert np.asarray(mine[name]).tobytes() == array.tobytes()


@pytest.mark.parametrize(("family", "layout"), PRODUCT)
def test_the_same_tensors_as_in_files(family, layout):
    check_like_files(family, layout, np.asarray)


@pytest.mark.parametrize(("family", "layout"), [pytest.param(*each.values, id=each.id) for each in PRODUCT[::90]])
def test_the_same_tensors_as_in_files_by_jax(family, layout):
    check_like_files(family, layout, jnp.asarray)


def check_like_files(family, layout, make):
    for native in family.native:
        source = checkpoint(family, native)
        params = {name: make(array) for name, array in source.arrays.items()}
        options = {"layout": layout, **SHARDED.get(layout, {})}
        try:
            wanted = run(source, "prefuse", family=family.name, **options).arrays
        except ConvertError as error:
            with pytest.raises(type(error)):
                convert.prefuse_params(params, **said(family, native), **options)
            continue
        fused = convert.prefuse_params(params, **said(family, native), **options)
        same_trees(fused, wanted)
        record = convert.layout_of(params, **said(family, native), **options)
        same_trees(convert.split_params(fused, json.loads(json.dumps(record))), source.arrays)


MAXTEXT = {"decoder": {"layers": {"moe": {"wi_0": (2, 3, 6, 200), "wi_1": (2, 3, 6, 200), "wo": (2, 3, 200, 6)}}}}
"""E, layers, K, N."""


def maxtext(make=np.asarray, *, wo: bool = True):
    rng = np.random.default_rng(3)
    moe = {name: make(rng.random(shape, "f4")) for name, shape in MAXTEXT["decoder"]["layers"]["moe"].items()}
    if not wo:
        del moe["wo"]
    return {"decoder": {"layers": {"moe": moe}}}


@pytest.mark.parametrize(
    ("layout", "options", "columns"),
    [("concat", {}, 400), ("interleaved", {}, 400), ("gmm-ep", {}, 512)]
    + [("per-shard", {"shards": 4, "align": align}, columns) for align, columns in ((1, 400), (128, 1024), ("maxtext", 2048))]
    + [("lane", {"shards": shards, "align": align}, columns) for shards, align, columns in ((4, 128, 1024), (1, 384, 768))],
)
def test_a_layout_that_is_named_is_split_without_a_record(layout, options, columns):
    params = maxtext()
    fused = convert.prefuse_params(params, layout=layout, **options)
    moe = fused["decoder"]["layers"]["moe"]
    assert moe["wi"].shape == (2, 3, 6, columns)
    same_trees(convert.split_params(fused, layout, **options)["decoder"]["layers"]["moe"], params["decoder"]["layers"]["moe"])
    del moe["wo"]
    if columns != 400:
        with pytest.raises(convert.PlanError, match="how many n are real; say it with sizes"):
            convert.split_params(fused, layout, **options)
    again = convert.split_params(fused, layout, sizes={"n": 200} if options or columns > 400 else None, **options)
    same_trees(again["decoder"]["layers"]["moe"], maxtext(wo=False)["decoder"]["layers"]["moe"])


def test_what_nobody_has_named_is_not_split():
    fused = convert.prefuse_params(maxtext(), layout="per-shard", shards=4)
    with pytest.raises(convert.PlanError, match="name it with layout"):
        convert.split_params(fused)


def test_padding_that_is_not_zeros_is_not_dropped():
    fused = convert.prefuse_params(maxtext(jnp.asarray), layout="gmm-ep")
    moe = fused["decoder"]["layers"]["moe"]
    moe["wi"] = moe["wi"].at[..., 255].set(1.0)
    with pytest.raises(convert.InputError, match=r"params.decoder.layers.moe.wi should hold zeros behind"):
        convert.split_params(fused, "gmm-ep")


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("per-shards", {}, "no layout is called 'per-shards'"),
        ("concat", {"shards": 4}, "'concat' is not cut into shards"),
        ("per-shard", {"shards": 7}, "n = 200 does not divide into s = 7"),
        ("fused-moe", {}, "2 scan axes|scan axes have no place|no place in"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(layout, options, message):
    with pytest.raises((convert.PlanError, convert.UsageError), match=message):
        convert.prefuse_params(maxtext(), layout=layout, **options)


def test_hugging_face_names_need_a_family():
    params = {f"model.layers.0.mlp.experts.{e}.{w}.weight": np.ones((2, 3)) for e in (0, 1) for w in ("gate_proj", "up_proj")}
    with pytest.raises(convert.PlanError, match=r"names as in qwen2_moe, .* say so with family"):
        convert.prefuse_params(params)
    assert convert.prefuse_params(params, family="olmoe")["model.layers.0.mlp.experts.wi"].shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("layout", "sizes", "message"),
    [
        ("gmm-ep", {"n": "4"}, r"sizes: \{'n': '4'\} is no number"),
        ("gmm-ep", {"m": 4}, r"sizes: \{'m': 4\} is no number"),
        ("gmm-ep", {"n": 199}, "moe.wi and .*moe.wo do not fit together"),
        ("gmm-ep", {"k": 6}, "sizes: gmm-ep pads n"),
        ("concat", {"n": 200}, "sizes: k and n are those of a padded layout"),
        ({"layout": "gmm"}, None, "no layout is called 'gmm'"),
        (7, None, "7 is neither a name nor a record"),
        ("concat", None, "not of the form|do not fit together"),
    ],
)
def test_what_is_said_of_a_fused_tree_must_hold(layout, sizes, message):
    fused = convert.prefuse_params(maxtext(), layout="gmm-ep")
    with pytest.raises(convert.ConvertError, match=message):
        convert.split_params(fused, layout, sizes=sizes)


def test_a_tree_that_is_split_already_is_not_split():
    with pytest.raises(convert.PlanError, match=r"no leaves are called as \*\.wi is"):
        convert.split_params(maxtext(), "concat")


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_many_results_are_made_one_by_one(dtype):
    """Twelve experts, each with its own gate and up: more than are compiled together."""
    words = np.random.default_rng(4).integers(0, 1 << 16, (12, 5, 8), dtype="u2")
    wi = words.view(ml_dtypes.bfloat16) if dtype == "bfloat16" else words.astype(dtype)
    name = "model.layers.3.mlp.experts.gate_up_proj"
    split = partial(convert.split_params, layout="fused-in-out", family="qwen3_moe")
    made, wanted = split({name: jnp.asarray(wi)}), split({name: wi})
    same_trees(made, wanted)
    last = np.asarray(made["model.layers.3.mlp.experts.11.up_proj.weight"])
    assert last.tobytes() == np.ascontiguousarray(wi[11, :, 4:].T).tobytes()


def test_experts_of_two_kinds_are_counted_by_who_knows():
    """ERNIE 4.5 VL numbers experts for text and for images through; the two have sizes of their own."""
    sizes = {"gate_proj": lambda n: (n, 3), "up_proj": lambda n: (n, 3), "down_proj": lambda n: (3, n)}
    params = {
        f"model.layers.1.mlp.experts.{e}.{word}.weight": np.full(shape(4 if e < 2 else 2), 10 * e + at, np.float32)
        for e, (at, (word, shape)) in itertools.product(range(4), enumerate(sizes.items()))
    }
    with pytest.raises(convert.PlanError, match=r"experts of two kinds.*sizes=\{'e': 64\}"):
        convert.prefuse_params(params, family="ernie4_5_vl_moe")
    fused = convert.prefuse_params(params, family="ernie4_5_vl_moe", sizes={"e": 2})
    shapes = {name.split(".", 4)[4]: array.shape for name, array in fused.items()}
    assert shapes == {
        "text_moe.experts.wi": (2, 3, 8), "text_moe.experts.wo": (2, 4, 3),
        "vision_moe.experts.wi": (2, 3, 4), "vision_moe.experts.wo": (2, 2, 3),
    }  # fmt: skip
    same_trees(convert.split_params(fused, "concat", family="ernie4_5_vl_moe", sizes={"e": 2}), params)
    with pytest.raises(convert.PlanError, match=r"how many of each kind there are is not stated.*in memory$"):
        convert.split_params(fused, "concat", family="ernie4_5_vl_moe")
