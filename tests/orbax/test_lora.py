"""LoRA beside experts in a tree on the disk, or alone: what memory makes of it, back bit for bit, and all of it compared."""

import itertools
import re

import jax
import numpy as np
import pytest

import convert
from convert.cli import main
from convert.errors import InputError, PlanError
from convert.options import Verification
from convert.verifier.adapters.trees import compare_trees
from convert.verifier.content.sides import contents
from layouts.matching.describe import describe
from layouts.windows import Windows
from tests.memory.test_adapters import LAYOUTS, PRODUCTS, asked, same, tree
from tests.tiny import MemoryReader, restore, run, save

HERE = "params.moe."


def model(kind="A for all", scan=1, *, alone=False, n=8):
    """A tree as a training has it, with moments of A and B; `alone` is what MaxText saves of a training of LoRA."""
    params = tree(kind, scan, n=n)
    loras = {"moe": {name: leaf for name, leaf in params["moe"].items() if "lora" in name}}
    return {"params": loras if alone else params, "opt_state": {"mu": loras}, "step": np.ones(1, "i4")}


class Tree(MemoryReader):
    """A tree in memory, which is asked for windows."""

    windows = Windows()

    def unit(self, name):
        return None

    def hold(self, limits, windows):
        assert limits.streams


def flat(params):
    named, _ = jax.tree_util.tree_flatten_with_path(params)
    arrays = {".".join(key.key for key in path): np.asarray(leaf).view("u4") for path, leaf in named}
    return Tree(arrays, format="orbax")


def converted(reader, action, **choices):
    """By the plan of files."""
    made = run(reader, action, **choices)
    return Tree(made.arrays, format="orbax", record=made.record)


def delta(one, other, **said):
    """The level `delta` of two trees in memory."""
    described = describe(one), describe(other, **said)
    return compare_trees((one, other), described, lambda *_: None, 1 << 30)


EVERY = list(itertools.product(PRODUCTS, [None, 0, 1], [False, True], LAYOUTS))
"""Every seventh of them has each kind, place of layers and layout."""


@pytest.mark.parametrize(
    ("kind", "scan", "alone", "layout"),
    [pytest.param(*each, marks=() if number % 7 == 0 else pytest.mark.slow) for number, each in enumerate(EVERY)],
)
def test_it_is_what_memory_makes_of_it_and_comes_back(kind, scan, alone, layout):
    params = model(kind, scan, alone=alone, n={"glu32": 64, "lane": 256}.get(layout[0], 8))
    source = flat(params)
    fused = converted(source, "prefuse", **asked(layout))
    wanted = flat(convert.prefuse_params(params, **asked(layout)))
    assert {name: a.tobytes() for name, a in fused.arrays.items()} == {n: a.tobytes() for n, a in wanted.arrays.items()}
    back, other = (
        converted(fused, "split"),
        converted(fused, "prefuse", layout="interleaved" if layout[0] == "concat" else "concat"),
    )
    assert {name: a.tobytes() for name, a in back.arrays.items()} == {n: a.tobytes() for n, a in source.arrays.items()}
    for each in (fused, back, other):
        found = delta(source, each)
        assert found.state == "equal"
        assert "in 2 blocks, A and B to the bit; alpha" in found.covered


@pytest.mark.parametrize(("kind", "alone"), [("A for all", False), ("B for all", True), ("batched", False)])
def test_the_content_is_the_same_however_it_lies(kind, alone):
    source = flat(model(kind, alone=alone))
    made = [converted(source, "prefuse", **asked(layout)) for layout in [("concat",), ("per-shard", 2, 3)]]
    for each in made:
        one, other = contents(source, each, options=Verification())
        assert (one.terms, one.model) == ("the tree's own names and axes", other.model)
    b_of(made[0])[0, 2, 1] += 1
    assert contents(made[0], options=Verification())[0].model != one.model


def b_of(fused):
    return fused.arrays["params.moe.wi_lora_b"].view("f4")  # (rank, layer, expert, columns)


def turned(b, at, axis=-1):
    b[:] = np.roll(b, at, axis)


MUTANTS = {
    "experts exchanged": lambda f: turned(b_of(f), 1, 2),
    "layers exchanged": lambda f: turned(b_of(f), 1, 1),
    "gate and up exchanged": lambda f: turned(b_of(f), 8),
    "ranks exchanged": lambda f: turned(b_of(f), 1, 0),
    "roles of A exchanged": lambda f: turned(f.arrays["params.moe.wi_lora_a"], 2),
    "one bit": lambda f: np.bitwise_xor(f.arrays["params.moe.wi_lora_b"][:1], 1, out=f.arrays["params.moe.wi_lora_b"][:1]),
    "beside the diagonal": lambda f: b_of(f)[0, 2, 1].__setitem__(15, 3),
    "scale": lambda f: np.multiply(b_of(f), np.float32(2**0.5), out=b_of(f)),
    "a moment": lambda f: turned(f.arrays["opt_state.mu.moe.wi_lora_b"], 8),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_verification_sees(name):
    source = flat(model())
    fused = converted(source, "prefuse")
    MUTANTS[name](fused)
    found = delta(source, fused)
    assert found.state == "DIFFERENT"
    assert ("layer" in found.differences[0]) == ("expert" in found.differences[0])
    if name == "beside the diagonal":
        assert "params.moe, layer 2, expert 1, up (wi_1): 4 of 32 elements of delta W differ" in found.differences[0]
        with pytest.raises(InputError, match=r"wi_lora_b .* should hold zeros where the ranks of gate meet the columns of up"):
            converted(fused, "split")


def test_what_was_trained_fused_is_compared_by_its_products():
    source = flat(model())
    fused = converted(source, "prefuse")
    a, b = fused.arrays["params.moe.wi_lora_a"].view("f4"), b_of(fused)
    a[..., 0] += a[..., 2]  # gate's first rank with some of up's, and that taken away again
    b[2] -= b[0]
    found = delta(source, fused)
    assert found.state == "equal"
    assert "30 of them by their products in float64" in found.covered


@pytest.mark.parametrize(("layout", "align"), [("per-shard", 3), ("lane", 128)])
def test_padding_that_holds_something_is_seen(layout, align):
    source = flat(model())
    fused = converted(source, "prefuse", layout=layout, shards=2, align=align)
    assert delta(source, fused).state == "equal"
    b_of(fused)[0, 0, 0, 4] = 1
    assert "params.moe, layer 0, expert 0: there is more than zeros behind" in delta(source, fused).differences[0]
    with pytest.raises(InputError, match="zeros behind"):
        converted(fused, "split")


@pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_self_test_flips_a_bit_of_it(tmp_path, alone):
    """Of B where B @ A is not zero: A of a training that has not begun stands beside zeros."""
    params = model(alone=alone)
    moe = params["params"]["moe"]
    moe["wi_0_lora_b"] = moe["wi_0_lora_b"] * np.float32(0)
    save(tmp_path / "in", params)
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    verdict = convert.verify(tmp_path / "in", tmp_path / "out", gemm=False, self_test=True, content=True)
    assert verdict.equal
    experts = [] if alone else [("exact", "content")]
    assert [trial.seen for trial in verdict.self_test] == [*experts, ("delta", "content"), ("others",)]
    assert not any(trial.untried for trial in verdict.self_test)


def test_the_self_test_says_that_there_is_nothing_to_flip(tmp_path):
    params = {"params": {"moe": {name: np.zeros_like(leaf) for name, leaf in model(alone=True)["params"]["moe"].items()}}}
    save(tmp_path / "in", params)
    verdict = convert.verify(tmp_path / "in", tmp_path / "in", gemm=False, self_test=True)
    assert [trial.seen for trial in verdict.self_test] == [("others",), ()]
    assert verdict.self_test[1].untried == {"delta": "B @ A is zero everywhere"}


def without(params, *names):
    return {**params, "params": {"moe": {n: leaf for n, leaf in params["params"]["moe"].items() if n not in names}}}


def both_ways(params):
    fused = convert.prefuse_params(params)["params"]["moe"]
    return {**params, "params": {"moe": params["params"]["moe"] | {name: fused[name] for name in ("wi_lora_a", "wi_lora_b")}}}


REFUSED = {
    "no partner": (lambda: converted(flat(without(model(), "wi_1_lora_b")), "prefuse"), PlanError, "no partner"),
    "no place": (lambda: converted(flat(model(scan=None)), "prefuse", layout="fused-moe"), PlanError, "has no place for it"),
    "nobody says": (lambda: converted(flat(convert.prefuse_params(model(alone=True))), "split"), PlanError, "name it with"),
    "twice": (lambda: delta(flat(model()), flat(both_ways(model()))), PlanError, "twice, apart and fused"),
    "fused already": (lambda: converted(converted(flat(model()), "prefuse"), "prefuse"), PlanError, "nothing to prefuse"),
    "another E": (
        lambda: converted(flat({"params": {"moe": model()["params"]["moe"] | tree(scan=1, n=16)["moe"] | {
            name: leaf for name, leaf in model()["params"]["moe"].items() if name in ("wi_0", "wi_1", "wo")}}}), "prefuse"),
        InputError,
        "is no B of rank 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("kind", "scan", "layout", "alone"),
    [
        ("A for all", 1, ("per-shard", 2, 3), False),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("B for all", None, ("concat",), True),
                ("batched", 0, ("interleaved",), False),
                ("A for all", 0, ("concat",), True),
            )
        ),
    ],
)
def test_on_the_disk(tmp_path, capsys, kind, scan, layout, alone):
    params = model(kind, scan, alone=alone)
    save(tmp_path / "in", params)
    report = convert.prefuse(tmp_path / "in", tmp_path / "out", **asked(layout))
    assert "alpha, which has to be twice, too" in str(report)
    same(jax.tree.map(np.asarray, restore(tmp_path / "out")), convert.prefuse_params(params, **asked(layout)))
    convert.split(tmp_path / "out", tmp_path / "back")
    same(jax.tree.map(np.asarray, restore(tmp_path / "back")), params)
    assert main(["--verify", str(tmp_path / "in"), str(tmp_path / "out"), "--no-gemm", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "delta     equal" in out
    one, other = re.search(r"([\d.]+ k?B) of ([\d.]+ k?B), 0 skipped", out).groups()
    assert one == other
