"""DeepSeek-V4 in MaxText's tree: sections of one tensor, ones, a table of another type; all come back as they were."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.errors import InputError, PlanError, UsageError
from tests.planning.deepseek4 import by_transformers, published
from tests.tiny import MemoryReader

WORD = "exact-values"
TABLE, BASE, FN, SCALE = "layers.2.ffn.gate.tid2eid", "layers.6.hc_ffn_base", "layers.3.hc_attn_fn", "layers.0.hc_attn_scale"
ONES = "params.params.decoder.scanned_blocks.layers_1.mhc_mlp.mhc_norm.scale"
KEPT = "params.params.decoder.layers_2.mlp.MoeBlock_0.tid2eid"


def save(where: Path, make: Callable[[], MemoryReader] = published, **changed: np.ndarray) -> Path:
    found = make()
    where.mkdir()
    arrays = {key: array if array.dtype == "i8" else array.view("f4") for key, array in found.arrays.items()}
    save_file(arrays | changed, where / "model.safetensors")
    (where / "config.json").write_text(json.dumps(found.config))
    return where


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    where = tmp_path_factory.mktemp("deepseek_v4")
    source, tree = save(where / "in"), where / "tree"
    convert.prefuse(source, tree, to="orbax", compute=WORD)
    return source, tree


def same(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in ("config.json", "model.safetensors"))


def test_a_flipped_bit_is_seen_in_every_section(pair, tmp_path):
    source, tree = pair
    arrays = load_file(source / "model.safetensors")
    for name, at in ((FN, (1, 0)), (FN, (2, 3)), (FN, (-1, -1)), (BASE, 0), (BASE, 2), (BASE, 6), (SCALE, 2), (TABLE, (3, 1))):
        arrays[name].view(f"u{arrays[name].itemsize}")[at] ^= 1
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file(arrays, tmp_path / "model.safetensors")
    verdict = convert.verify(tmp_path, tree, gemm=False)
    assert {line.split(" params.params.decoder.")[-1] for line in _others(verdict)} == {
        *(f"scanned_blocks.layers_0.mhc_attention.{part}_alpha" for part in ("pre", "post", "res")),
        *(f"scanned_blocks.layers_1.mhc_mlp.{part}_beta" for part in ("pre", "post", "res")),
        "layers_0.mhc_attention.res_alpha_scale",
        "layers_2.mlp.MoeBlock_0.tid2eid",
    }


def _others(verdict: convert.Verdict) -> tuple[str, ...]:
    return {level.name: level.differences for level in verdict.levels}["others"]


def test_it_needs_the_word_and_comes_back_as_it_was(pair, tmp_path):
    source, tree = pair
    with pytest.raises(PlanError, match=r"tid2eid\) as float32; scales of mhc_norm.* compute='exact-values' a conversion does"):
        convert.prefuse(source, tmp_path / "out", to="orbax")
    verdict = str(convert.verify(source, tree, gemm=False))
    assert "(float-table) was compared number by number; scales of mhc_norm, which are ones" in verdict
    with pytest.raises(UsageError, match=r"content=True: values are computed \(exact-values\)"):
        convert.split(tree, tmp_path / "again", to="hf", compute=WORD, content=True)
    report = convert.split(tree, tmp_path / "again", to="hf", compute=WORD)
    assert report.plan.computed is None
    assert "values are what they were before they were computed, bit for bit" in report.plan.remarks[-1]
    assert same(source, tmp_path / "again")


SAVED = [(by_transformers, False, None), (published, False, 0), (by_transformers, True, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "fused", "axis"), SAVED)
def test_files_come_back_by_their_own_names(make, fused, axis, tmp_path):
    source, scan = save(tmp_path / "in", make), {"scan": axis is not None, "scan_axis": axis}
    (convert.prefuse if fused else convert.reformat)(source, tmp_path / "tree", to="orbax", **scan, compute=WORD)
    assert convert.verify(source, tmp_path / "tree", gemm=False).equal
    (convert.split if fused else convert.reformat)(tmp_path / "tree", tmp_path / "again", to="hf", compute=WORD)
    assert same(source, tmp_path / "again")


def changed(tree: Path, out: Path, name: str, value: float) -> Path:
    """A tree that somebody has trained."""
    params = convert.load(tree)
    *path, last = name.split(".")
    node = params
    for word in path:
        node = node[word]
    node[last] = np.array(node[last])
    node[last][1, 0] = value
    convert.save(params, out, like=tree)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "why", "seen"),
    [
        (ONES, 1.5, "is not all ones", "is not all ones"),
        (KEPT, 0.5, "holds 0.5, and no int64 is the same", "differs from"),
        (KEPT, -0.0, "holds -0.0, and no int64 is the same", "differs from"),
        (KEPT, 2.0**63, r"holds 9\.\d*e\+18, and no int64 is the same", "differs from"),
    ],
)
def test_what_would_be_lost_on_the_way_back_is_refused(name, value, why, seen, pair, tmp_path):
    source, tree = pair
    tuned = changed(tree, tmp_path / "tuned", name, value)
    with pytest.raises(InputError, match=rf"{re.escape(name)} .*{why}"):
        convert.split(tuned, tmp_path / "again", to="hf", compute=WORD)
    with pytest.raises(InputError, match=rf"{re.escape(name)} .*{why}"):
        convert.load(tuned, names="hf", layout="native", compute=WORD)
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
    assert seen in str(convert.verify(source, tuned, gemm=False))


def test_what_float32_lacks_is_refused_before_anything_is_written(tmp_path):
    table = published().arrays[TABLE]
    table[-1, -1] = 2**24 + 1
    source = save(tmp_path / "in", **{TABLE: table})
    with pytest.raises(InputError, match=rf"{re.escape(TABLE)} .*holds 16777217, and no float32 is the same"):
        convert.prefuse(source, tmp_path / "out", to="orbax", compute=WORD)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.slow
def test_blocks_that_predict_further_tokens_are_left_out_by_the_users_word(tmp_path):
    source = save(tmp_path / "in", **{"mtp.0.e_proj.weight": np.ones((8, 8), "f4")})
    with pytest.raises(PlanError, match=r"1 tensors have no place .*drop_mtp=True leaves out"):
        convert.prefuse(source, tmp_path / "out", to="orbax", compute=WORD)
    convert.prefuse(source, tmp_path / "out", to="orbax", compute=WORD, drop_mtp=True)
    assert convert.verify(source, tmp_path / "out", gemm=False).equal


@pytest.mark.slow
def test_in_memory_it_is_what_a_conversion_makes(pair, tmp_path):
    source, tree = pair
    as_tree, as_hf = {"names": "maxtext", "layout": "concat"}, {"names": "hf", "layout": "native"}
    loaded, wanted = convert.load(source, **as_tree, compute=WORD), convert.load(tree)
    assert jax.tree.all(jax.tree.map(lambda one, other: np.array_equal(bits(one), bits(other)), loaded, wanted))
    convert.save(loaded, tmp_path / "hf", like=source, **as_tree, compute=WORD)
    assert same(source, tmp_path / "hf")
    jax.config.update("jax_enable_x64", True)
    try:
        params = convert.load(tree, **as_hf, compute=WORD)
        convert.save(params, tmp_path / "tree", like=tree, **as_hf, compute=WORD)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert convert.verify(source, tmp_path / "tree", gemm=False).equal
    config = json.loads((source / "config.json").read_text())
    with pytest.raises(PlanError, match=r"sync_plan does not compute exact-values"):
        convert.sync_plan(params, loaded, **as_tree, source_names="hf", config=config, compute=WORD)


def bits(array: object) -> np.ndarray:
    found = np.asarray(array)
    return found.view(f"u{found.itemsize}")
