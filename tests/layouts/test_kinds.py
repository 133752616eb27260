"""Experts of two kinds in one layer, numbered through: ERNIE 4.5 VL, by hand."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import convert
from convert.errors import ConvertError
from convert.options import Choices
from convert.planning.planner import make_plan
from convert.verifier.bits.logical import blocks
from layouts.checkpoint import open_checkpoint
from layouts.language.template import Template
from layouts.matching.describe import describe
from tests.layouts.by_hand import weights
from tests.layouts.by_hand.styles import out_in, projections
from tests.tiny import MemoryReader, checkpoint, run, same, tree

AT = "model.layers.{}.mlp"
TEXT, IMAGES = f"{AT}.text_moe", f"{AT}.vision_moe"


def of(layer, kind, e=5, n=None):
    """Gate, up and down of text experts (N = 4), or of those for images (N = 2)."""
    return weights(layer + 20 * kind, e, 6, n or (4, 2)[kind])


def published(layers=(1, 2), counts=(5, 5), widths=(4, 2), beside=()):
    found = {"lm_head.weight": np.arange(5, dtype="u4")}
    for layer in layers:
        found[f"{AT.format(layer)}.gate.weight"] = np.arange(6 * counts[0], dtype="u4").reshape(6, -1)
        found[f"{AT.format(layer)}.gate.weight_1"] = np.arange(6 * counts[1], dtype="u4").reshape(6, -1)
        for kind in (0, 1):
            made = projections(AT.format(layer), *of(layer, kind, counts[kind], widths[kind]))
            for name, array in made.items():
                *place, e, word, weight = name.split(".")
                found[".".join([*place, str(int(e) + kind * counts[0]), word, weight])] = array
    for name, array in list(found.items()):
        if ".experts." in name:
            found |= {f"{name}_{word}": array[:, :1] + 1 for word in beside}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def config(counts=(5, 5), kind="ernie4_5_moe_vl", **more):
    """As published: flat, a number for each kind; transformers writes one number into a part."""
    if isinstance(counts, tuple):
        return {"model_type": kind, "moe_num_experts": list(counts), "moe_intermediate_size": [4, 2], **more}
    return {"model_type": "ernie4_5_vl_moe", "text_config": {"model_type": kind, "moe_num_experts": counts}, **more}


@pytest.mark.parametrize(
    ("stated", "widths"), [(config(), (4, 2)), (config(5, "ernie4_5_vl_moe_text"), (6, 6)), (config((5, 3)), (4, 4))]
)
def test_each_kind_becomes_a_block_of_its_own(stated, widths):
    counts = tuple(stated.get("moe_num_experts", (5, 5)))
    source = MemoryReader(published(counts=counts, widths=widths, beside=["scale"]), config=stated)
    concat, held = run(source, "prefuse"), run(source, "prefuse", layout="transformers")
    for layer in (1, 2):
        for kind, place in enumerate((TEXT, IMAGES)):
            gate, up, down = of(layer, kind, counts[kind], widths[kind])
            at = place.format(layer)
            assert np.array_equal(concat.arrays[f"{at}.experts.wi"], np.concatenate((gate, up), -1))
            assert np.array_equal(concat.arrays[f"{at}.experts.wo"], down)
            assert same({n: held.arrays[n] for n in out_in(at, gate, up, down)}, out_in(at, gate, up, down))
    assert same(run(source, "prefuse", source_layout="per-expert-kinds").arrays, concat.arrays)
    for fused in (concat, run(held, "prefuse", layout="per-shard", shards=2)):
        assert same(run(fused, "split").arrays, source.arrays)


def without(*lost):
    return {name: array for name, array in published().items() if not any(f".experts.{e}." in name for e in lost)}


def test_what_transformers_holds_is_known_and_complete():
    source = MemoryReader({**run(MemoryReader(published(), config=config()), "prefuse", layout="transformers").arrays},
                          config=config(5, "ernie4_5_vl_moe_text"))  # fmt: skip
    assert same(run(run(source, "prefuse"), "split").arrays, source.arrays)
    for word in ("text_moe", "vision_moe"):
        arrays = {name: array for name, array in source.arrays.items() if f".2.mlp.{word}" not in name}
        with pytest.raises(ConvertError, match="its layer has none of kind"):
            make_plan(MemoryReader(arrays, config=source.config), Path("out"), "prefuse")


@pytest.mark.parametrize(
    ("arrays", "stated", "said"),
    [
        (published(), {"model_type": "ernie4_5_moe_vl"}, "4 .*does not say how many of each: state moe_num_experts"),
        (published(), config(x={"moe_num_experts": 4}), "4 .*does not say how many"),
        (published(), config((5, 5, 5)), "4 .*does not say how many of each"),
        (published(), config((5, 0)), "4 .*does not say how many of each"),
        (published(), config((5, True)), "3 .*moe_num_experts is True"),
        (published(), config((4, 6)), "4 .*experts of one layer must be alike"),
        (published(), config((6, 4)), "4 .*experts of one layer must be alike"),
        (published(widths=(4, 4)), config((4, 4)), "3 .*experts.4.down_proj.weight is of 6 experts, but config.json says 4"),
        (published(widths=(4, 4)), config((4, 6)), "3 .*is one of 4 experts, but the router .*gate.weight .*is for 5"),
        (published(widths=(4, 4)), config((10, 10)), "3 .*its layer has none of kind 1"),
        (published(widths=(4, 4)), config((6, 6)), "3 .*experts.10.down_proj.weight is missing"),
        (published(widths=(4, 4)), config((5, 6)), "3 .*is one of 5 experts of kind 1, but config.json says 6"),
        (published(), config((5, 3)), "3 .*of kind 1, but config.json says 3"),
        (published(counts=(5, 3)), config(), "3 .*experts.8.down_proj.weight is missing"),
        (without(*range(5, 10)), config(), "3 .*its layer has none of kind 1"),
        (without(*range(5)), config(), "3 .*its layer has none of kind 0"),
        (without(3), config(), "3 .*experts.3.down_proj.weight is missing"),
        (without(9), config(), "3 .*experts.9.down_proj.weight is missing"),
        (without(4), config() | {"num_experts": 4}, "3 .*is one of 4 experts of kind 0, but config.json says 5"),
        (published() | published(layers=(3,), counts=(5, 0)), config(), "3 .*its layer has none of kind 1"),
    ],
)  # fmt: skip
def test_numbers_that_disagree_with_names_are_refused(arrays, stated, said):
    with pytest.raises(ConvertError) as error:
        make_plan(MemoryReader(arrays, config=stated), Path("out"), "prefuse")
    assert re.match(said, f"{error.value.exit_code} {error.value}"), error.value


def test_files_there_and_back(tmp_path):
    source, out = checkpoint(tmp_path / "in", published(), config()), tmp_path / "out"
    convert.prefuse(source, out)
    convert.split(out, tmp_path / "back")
    assert tree(source).items() <= tree(tmp_path / "back").items()
    found = [blocks(reader, describe(reader)) for reader in map(open_checkpoint, (source, out))]
    assert found[0].keys() == found[1].keys()
    convert.save(convert.load(source, layout="concat"), tmp_path / "saved", like=source, layout="concat")
    assert tree(source).items() <= tree(tmp_path / "saved").items()
    assert {block.label for block in found[0].values()} == {f"layer {layer} kind {kind}" for layer in (1, 2) for kind in (0, 1)}


def test_a_layout_whose_names_say_no_kind_is_refused():
    arrays = {f"model.layers.1.moe.experts.{word}": np.zeros((5, 4, 6), "u4") for word in ("w1", "w3")}
    arrays["model.layers.1.moe.experts.w2"] = np.zeros((5, 6, 4), "u4")
    with pytest.raises(ConvertError, match="its layer has none of kind 1"):
        make_plan(MemoryReader(arrays, config=config()), Path("out"), "prefuse", Choices(source_layout="torchtitan"))


def test_in_memory_names_of_transformers_tell_the_kinds():
    """Arrays have no `config.json`: for names that are numbered through see `tests/memory/test_layouts.py`."""
    source = MemoryReader(published(), config=config())
    held, concat = run(source, "prefuse", layout="transformers").arrays, run(source, "prefuse").arrays
    fused = convert.prefuse_params(held, family="ernie4_5_vl_moe")
    assert same({name: np.asarray(array) for name, array in fused.items()}, concat)


@pytest.mark.slow
def test_the_verifier_looks_at_both_kinds(tmp_path):
    """One bit of either is seen."""
    source, out = checkpoint(tmp_path / "in", published(), config()), tmp_path / "out"
    convert.prefuse(source, out)
    assert convert.verify(source, out).equal
    for name in (f"{TEXT.format(2)}.experts.wi", f"{IMAGES.format(2)}.experts.wo"):
        file = next(file for file in out.glob("*.safetensors") if name in load_file(file))
        changed, before = load_file(file), file.read_bytes()
        changed[name].view("u4").reshape(-1)[-1] ^= 1
        save_file(changed, file, safe_open(file, "np").metadata())
        assert not convert.verify(source, out).equal
        file.write_bytes(before)


@pytest.mark.parametrize(
    ("text", "kinds"), [("{kind*64+e:2}", {0: (0, 0), 63: (0, 63), 64: (1, 0), 127: (1, 63), 500: (1, 436)}),
                        ("{kind*4+e:3}", {3: (0, 3), 4: (1, 0), 8: (2, 0), 13: (2, 5)}), ("{kind*first+e:2}", {})])  # fmt: skip
def test_the_word_of_the_language(text, kinds):
    key = Template(f"a.{text}.b")
    found = {number: key.parse(f"a.{number}.b") for number in (0, 3, 4, 8, 13, 63, 64, 127, 500)}
    assert {number: found[number] for number in kinds} == {n: {"kind": k, "e": e} for n, (k, e) in kinds.items()}
    assert all(key.render(index) == f"a.{number}.b" for number, index in found.items() if index)
    assert bool(kinds) == any(found.values())
    assert not key.parse("a.064.b")


@pytest.mark.parametrize("text", ["{kind*1+e:2}", "{kind*4+e:x}", "{kind*4+1:2}"])
def test_kinds_without_numbers_are_no_template(text):
    with pytest.raises(ValueError, match=r"needs a factor|a choice needs two words"):
        Template(text)


def paddle(arrays):
    """As Paddle saves them: (in, out), gate and up in one."""
    found = {}
    for name, array in arrays.items():
        if ".experts." not in name:
            found[name] = array
        elif "gate_proj" in name:
            up = arrays[name.replace("gate_proj", "up_proj")]
            found[name.replace("gate_proj", "up_gate_proj")] = np.concatenate([array.T, up.T], 1)
        elif "down_proj" in name:
            found[name] = np.ascontiguousarray(array.T)
    return found


def test_paddle_numbers_them_through_too():
    source, wanted = MemoryReader(paddle(published()), config=config()), MemoryReader(published(), config=config())
    assert same(run(source, "prefuse").arrays, run(wanted, "prefuse").arrays)
    assert same(run(run(source, "prefuse"), "split").arrays, source.arrays)


@pytest.mark.parametrize("widths", [(4, 2), (4, 4)])
def test_names_of_one_way_and_shapes_of_the_other_are_refused(widths):
    """Paddle saves gate and up apart and (in, out), too, under the names that others give (out, in)."""
    arrays = {n: np.ascontiguousarray(a.T) if ".experts." in n else a for n, a in published(widths=widths).items()}
    with pytest.raises(ConvertError, match="the other way round"):
        make_plan(MemoryReader(arrays, config=config(hidden_size=6)), Path("out"), "prefuse")
    make_plan(MemoryReader(published(widths=widths), config=config(hidden_size=6)), Path("out"), "prefuse")


def test_what_is_published_is_called_so(tmp_path):
    found = convert.inspect(checkpoint(tmp_path / "in", published(), config())).to_dict()
    assert {block["layout"] for block in found["blocks"]} == {"per-expert-kinds"}
