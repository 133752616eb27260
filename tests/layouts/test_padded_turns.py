"""Turns of gate and up whose last one is not full: files, memory and the verifier against NumPy, which pads and then cuts."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from convert.errors import InputError, PlanError
from convert.options import Choices
from convert.planning.planner import make_plan
from convert.verifier.bits.stored import arranged, dimensions
from layouts.language.cuts import cut
from layouts.language.layout import layouts
from layouts.language.pattern import Pattern
from layouts.tables.families import FAMILIES
from layouts.tables.targets import TARGETS
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import MemoryReader, fill, logical, memory, run, same, tree

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")
E, K = 5, 2
WI = "model.layers.1.mlp.experts.wi"
SHARES = [(n, s) for n in range(1, 301) for s in (1, 2, 3, 4, 7) if n % s == 0]


def reader(n) -> MemoryReader:
    return memory(QWEN, layers=(1,), e=E, k=K, n=n)


def turns(n, shards, width, align):
    """Each shard's gate and up, with zeros behind them, a turn after the other."""
    wi = logical(1, E, K, n)["wi"]
    found = []
    for shard in np.split(wi, shards, axis=-1):
        room = -(-shard.shape[-1] // align) * align
        wide = np.zeros((*shard.shape[:-1], room), wi.dtype)
        wide[..., : shard.shape[-1]] = shard
        found += [wide[..., g, at : at + width] for at in range(0, room, width) for g in (0, 1)]
    return np.concatenate(found, -1)


@st.composite
def cases(draw):
    width = draw(st.sampled_from([128, 64, 48, 32, 5, 1]))
    return (*draw(st.sampled_from(SHARES)), width, width * draw(st.integers(1, 3)))


@settings(max_examples=12, deadline=None)
@given(cases(), cases(), st.sampled_from([900, 1 << 25]), st.sampled_from([500, 10_000]))
def test_any_size_in_any_turns(case, other, slab, limit):
    n, shards, width, align = case
    source, wanted = reader(n), turns(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.engine.blocks.SLAB", slab)
        patch.setitem(TARGETS, "lane", layouts(wi=("{experts}.wi{part}", f"e ... k (s={{shards}} c g n={width}{{pad}})"),
                                               wo=("{experts}.wo{part}", "e ... n k")))  # fmt: skip
        plan = make_plan(source, Path("out"), "prefuse", Choices(layout="lane", shards=shards, align=align))
        arrays = {target.spec.name: fill(target, source, limit) for target in plan.targets}
        assert np.array_equal(arrays[WI], wanted)
        fused = MemoryReader(arrays, config=source.config, record=json.loads(json.dumps(plan.record)))
        assert same(run(fused, "split").arrays, source.arrays)
        relaid = run(fused, "prefuse", layout="per-shard", shards=other[1], align=other[3]) if n % other[1] == 0 else None
        assert relaid is None or same(run(relaid, "prefuse", layout="lane", shards=shards, align=align).arrays, arrays)
        told = {"layout": "lane", "shards": shards, "align": align, "family": "qwen3_moe"}
        assert same(convert.prefuse_params(dict(source.arrays), **told), arrays)
        assert same(convert.split_params(dict(arrays), **told), source.arrays)
    pattern = Pattern(plan.record["wi"]["pattern"].replace("... ", ""))
    dims = dimensions(pattern.text, {"e": E, "k": K, "g": 2, **cut({"n": n}, pattern)})
    assert np.array_equal(arranged(wanted, dims, "ekgscn"), logical(1, E, K, n)["wi"])


@pytest.mark.parametrize(("n", "shards", "align"), [(300, 1, 128), (300, 2, 256), (100, 1, 384), (96, 3, 128), (256, 1, 128)])
def test_what_stands_where_zeros_should_is_not_dropped(n, shards, align):
    fused = run(reader(n), "prefuse", layout="lane", shards=shards, align=align)
    holes = np.flatnonzero(turns(n, shards, 128, align)[1, 1] == 0)
    pattern = Pattern(fused.record["wi"]["pattern"].replace("... ", ""))
    dims = dimensions(pattern.text, {"e": E, "k": K, "g": 2, **cut({"n": n}, pattern)})
    for at in {int(hole) for hole in holes[:: max(1, len(holes) // 9)]} | {int(hole) for hole in holes[-1:]}:
        wrong = {**fused.arrays, WI: fused.arrays[WI].copy()}
        wrong[WI][1, 1, at] = 1
        for split in (
            lambda wrong=wrong: run(MemoryReader(wrong, config=fused.config, record=fused.record), "split"),
            lambda wrong=wrong: convert.split_params(wrong, fused.record),
        ):
            with pytest.raises(InputError, match=rf"should hold zeros behind the first .*{n // shards}"):
                split()
        with pytest.raises(ValueError, match="more than zeros behind"):
            arranged(wrong[WI], dims, "ekgscn")


@pytest.mark.parametrize(
    ("entry", "error", "words"),
    [
        ({"n": 301}, PlanError, "do not fit together"),
        ({"n": 299}, PlanError, "do not fit together"),
        ({"n": 512}, PlanError, "is not of the form"),
        ({"n": 0}, PlanError, "is not of the form"),
        ({"n": -300}, PlanError, "is not of the form"),
        ({"n": 300, "c": 3}, None, ""),
        ({"c": 3}, PlanError, "nothing says how many n are real"),
        ({}, PlanError, "nothing says how many n are real"),
        ({"n": "many"}, InputError, "the record of the layout is damaged"),
    ],
)
def test_a_record_that_lies_about_how_much_is_real(entry, error, words):
    source = reader(300)
    fused = run(source, "prefuse", layout="lane", align=128)
    record = json.loads(json.dumps(fused.record))
    record["stored"]["wi."]["unpadded"] = entry
    lying = MemoryReader(fused.arrays, config=fused.config, record=record)
    if error is None:
        assert same(run(lying, "split").arrays, source.arrays)
        return
    with pytest.raises(error, match=words):
        run(lying, "split")


@pytest.mark.parametrize(
    "pattern",
    ["e k (c g n=128%100)", "e k (g n=128%128)", "e k (c=3 g n=128%128)", "e k (n=128%128 g c)", "e k=3%3 (c g n%128)",
     "e k (c%2 g n=128%128)", "e k (c g n=128%0)", "e k (-c g n=128%128)"],
)  # fmt: skip
def test_a_record_whose_turns_are_none(pattern):
    fused = run(reader(300), "prefuse", layout="lane", align=128)
    record = json.loads(json.dumps(fused.record))
    record["wi"]["pattern"] = record["stored"]["wi."]["pattern"] = pattern
    with pytest.raises((InputError, PlanError), match=r"damaged|is not of the form"):
        run(MemoryReader(fused.arrays, config=fused.config, record=record), "split")


@pytest.mark.parametrize(
    ("choices", "words"),
    [({"align": 100}, "n is padded to 300; take --align=128 or a multiple of it"), ({"shards": 7, "align": 128}, "s = 7"),
     ({}, "does not divide into n = 128; --layout=lane is padded with --align=128")],
)  # fmt: skip
def test_what_cannot_be_padded_is_refused(choices, words):
    with pytest.raises(PlanError, match=words):
        run(reader(300), "prefuse", layout="lane", **choices)


def test_a_layout_that_is_named_is_split_without_a_record():
    source = reader(300)
    fused = run(source, "prefuse", layout="lane", shards=2, align=256)
    bare = MemoryReader(fused.arrays, config=fused.config)
    assert same(run(bare, "split", source_layout="lane:2:256").arrays, source.arrays)
    with pytest.raises(PlanError, match="do not fit together"):
        run(bare, "split", source_layout="lane:2")


def test_files_of_both_formats_lead_back_byte_for_byte(tmp_path):
    """Both formats, both directions, other shards between them; `tests/verifier` has the grouped GEMMs."""
    make_checkpoint(tmp_path / "hf", family="qwen3_moe", experts=2, embed=16, mlp=300, layers=1, values="normal")
    told = {"layout": "lane", "shards": 2, "align": 128}
    convert.prefuse(tmp_path / "hf", tmp_path / "lane", **told)
    convert.prefuse(tmp_path / "hf", tmp_path / "tree", to="orbax", **told)
    convert.prefuse(tmp_path / "tree", tmp_path / "relaid", layout="lane", shards=3, align=256)
    convert.prefuse(tmp_path / "relaid", tmp_path / "again", to="hf", **told)
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "lane" / "config.json").read_bytes()
    convert.split(tmp_path / "lane", tmp_path / "back")
    convert.split(tmp_path / "relaid", tmp_path / "back from a tree", to="hf")
    wanted = {name: digest for name, digest in tree(tmp_path / "hf").items() if name != "convert_manifest.json"}
    for back in ("back", "back from a tree"):
        assert {name: digest for name, digest in tree(tmp_path / back).items() if name != "convert_manifest.json"} == wanted
    assert convert.verify(tmp_path / "hf", tmp_path / "lane", gemm=False, content=True).equal
    assert convert.verify(tmp_path / "tree", tmp_path / "relaid", gemm=False, content=True).equal
    assert convert.verify(tmp_path / "relaid", tmp_path / "again", gemm=False).equal
    assert convert.inspect(tmp_path / "relaid").to_dict()["layout"] == "lane"
    assert len({convert.digest(tmp_path / name).model.sha256 for name in ("hf", "lane", "relaid", "again")}) == 1
