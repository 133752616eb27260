"""The probes must not be vacuous: a kernel that reads a layout wrong is caught, and so is a gradient that goes astray."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.cli import main
from convert.verifier.bits.logical import blocks
from convert.verifier.control.choice import of_expert
from convert.verifier.gemms.backends import BACKENDS, keeps_apart
from convert.verifier.gemms.layer import Arrays, Form, jitted_read
from convert.verifier.gemms.operands import Weights, load
from convert.verifier.gemms.probes import Setting, answered, gradients, identity, outputs, skewed, stored
from convert.verifier.gemms.rows import ask, most_of, rows_of
from layouts.checkpoint import open_checkpoint
from layouts.matching.describe import describe
from scripts.make_checkpoint import make_checkpoint
from tests.planning.models import reader as tiny_model

LAYOUTS = {
    "concat": {},
    "vllm": {},
    "flashinfer": {},
    "interleaved": {},
    "fused-moe": {},
    "per-shard": {"shards": 4, "align": 3},
}
EXPERTS = range(4, 12)
SETTING = Setting(backend=BACKENDS["ragged_dot"])


def answer(weights, rows, setting):
    return answered(weights.read(rows.x, rows.hot, rows.sizes, setting.backend, setting.activation), rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("probes")
    make_checkpoint(root / "in", family="qwen3_moe", experts=12, embed=32, mlp=16, layers=2, values="normal")
    for layout, choices in LAYOUTS.items():
        convert.prefuse(root / "in", root / layout, layout=layout, **choices)
    return root


def block(path: Path):
    reader = open_checkpoint(path)
    return list(blocks(reader, describe(reader)).values())[1]


def read_back(one, other, weights, setting=SETTING) -> list[str]:
    wanted = stored(load(one, EXPERTS), rows_of(one, setting.tokens))
    answers = answer(weights, ask(other, EXPERTS, setting.tokens), setting)
    return list(identity(wanted, answers, weights, other, EXPERTS))


def random(a, b, one, setting=SETTING):
    """Random rows beside those that read weights, and random rows alone in skewed groups: both have to see it."""
    rows = ask(one, EXPERTS, setting.tokens)
    found = outputs((answer(a, rows, setting), answer(b, rows, setting)), one, EXPERTS)
    alone = skewed(a, b, one, EXPERTS, setting)
    assert found[1] == alone[1]
    return found


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize(
    ("layout", "backend"),
    [
        *((one, each) for one in LAYOUTS for each in ("ragged_dot", "moegemm")),
        pytest.param("vllm", "megablox", marks=pytest.mark.slow),
    ],
)
def test_every_layout_passes_all_probes(folder, layout, backend):
    setting = Setting(backend=BACKENDS[backend])
    one, other = block(folder / "in"), block(folder / layout)
    weights = load(one, EXPERTS), load(other, EXPERTS)
    for side, loaded in zip((one, other), weights, strict=True):
        assert not read_back(one, side, loaded, setting)
    found, problems = random(*weights, one, setting)
    assert not problems
    assert found.relative.max() < 1e-5
    if setting.backend.traced:
        assert not list(gradients(*weights, one, EXPERTS, setting))


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("layout", ["concat", "vllm", "interleaved", "per-shard"])
def test_a_kernel_that_takes_up_for_gate_is_caught(folder, layout):
    """By all three: what the one-hot tokens read, what random ones give, and where gradients go."""
    one, other = block(folder / "in"), block(folder / layout)
    weights = load(one, EXPERTS), load(other, EXPERTS)
    wrong = replace(weights[1].wi, columns=tuple((n, s, t, n == "g") for n, s, t, _ in weights[1].wi.columns))
    turned = replace(weights[1], wi=wrong)
    found = read_back(one, other, turned)
    assert len(found) == 2 * len(EXPERTS)
    assert all("one-hot tokens do not read" in line for line in found)
    assert len(random(weights[0], turned, one)[1]) == len(EXPERTS)
    assert any("gate" in line for line in gradients(weights[0], turned, one, EXPERTS, SETTING))


def changed(weights: Weights, role: str, change) -> Weights:
    operand = getattr(weights, role)
    array = change(operand.array)
    return replace(weights, **{role: replace(operand, array=array, host=np.asarray(array))})


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_one_wrong_weight_of_one_expert_is_caught_and_named(folder):
    one, other = block(folder / "in"), block(folder / "concat")
    weights = load(one, EXPERTS), load(other, EXPERTS)
    broken = changed(weights[1], "wo", lambda wo: wo.at[3, 5, 7].add(1))
    assert random(weights[0], broken, one)[1] == ["layer 1, expert 7: outputs of the two differ"]
    found = [line for line in gradients(weights[0], broken, one, EXPERTS, SETTING) if "expert " in line]
    assert {line.split(",")[1] for line in found} >= {" expert 7"}


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_no_expert_is_left_out(folder):
    """An expert that is all zeros, and that random tokens may pass by, is seen by the one-hot ones."""
    one, other = block(folder / "in"), block(folder / "concat")
    weights = load(other, EXPERTS)
    for at, e in enumerate(EXPERTS):
        idle = changed(weights, "wi", lambda wi, at=at: wi.at[at].set(0))
        assert {re.search(r"expert (\d+)", line)[1] for line in read_back(one, other, idle)} == {str(e)}


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("apart", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_infinities_hide_no_other_expert_where_experts_run_apart(folder, apart):
    one, other = block(folder / "in"), block(folder / "concat")
    both = changed(load(other, EXPERTS), "wi", lambda wi: wi.at[3, 0, 0].set(np.inf).at[5, 0, 0].add(1))
    rows, most = ask(other, EXPERTS, 1), most_of(other, len(EXPERTS)) if apart else 0
    answers = answered(both.read(rows.x, rows.hot, rows.sizes, SETTING.backend, SETTING.activation, most), rows)
    unread: set[int] = set()
    wanted = stored(load(one, EXPERTS), rows_of(one, 1))
    found = list(identity(wanted, answers, both, other, EXPERTS, unread, apart=keeps_apart(SETTING.backend.gmm, most)))
    said = ["layer 1, expert 9, gate (wi_0): one-hot tokens do not read the stored weights back"]
    assert (found, unread) == ((said, {7}) if apart else ([], set(EXPERTS)))


@pytest.mark.filterwarnings("ignore:unclosed file")
def test_more_tokens_read_more_rows(folder):
    one, other = block(folder / "in"), block(folder / "concat")
    last = changed(load(other, EXPERTS), "wi", lambda wi: wi.at[0, 1, 0].add(1))  # row 1 is not among the usual 16 of 32
    assert not read_back(one, other, last)
    assert len(read_back(one, other, last, replace(SETTING, tokens=2))) == 1


def test_the_verdict_narrows_down_and_is_json(folder, capsys):
    arguments = ["--verify", str(folder / "in"), str(folder / "vllm"), "--quiet", "--json"]
    assert main([*arguments, "--layers", "1", "--experts", "0,8-9"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert found["equal"]
    levels = {level["name"]: level for level in found["levels"]}
    assert list(levels) == ["exact", "others", "identity", "gemm", "gradients", "layer", "files", "recorded", "content"]
    assert levels["exact"]["covered"].startswith("1 MoE layer x 3 experts")
    assert set(levels["gemm"]["errors"]) == {"layer 1"}


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "1,,2"])
def test_numbers_that_are_none_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--verify", "a", "b", f"--layers={text}"])
    assert stopped.value.code == 2
    assert "is not a list of numbers" in capsys.readouterr().err


def test_the_report_is_one_page_that_loads_nothing(folder, tmp_path, capsys):
    assert main(["--verify", str(folder / "in"), str(folder / "concat"), "--quiet", "--report", str(tmp_path / "a.html")]) == 0
    text = (tmp_path / "a.html").read_text()
    assert "EQUAL" in text
    assert text.partition("class=values")[2].partition("</table>")[0].count("<td>") == 2 * 12
    assert not re.search(r"https?://|<script|src=|<link", text)


def test_the_report_names_what_differs(folder, tmp_path, capsys):
    make_checkpoint(tmp_path / "other", family="qwen3_moe", experts=12, embed=32, mlp=16, layers=2, values="normal", seed=1)
    assert (
        main(["--verify", str(folder / "concat"), str(tmp_path / "other"), "--quiet", "--report", str(tmp_path / "a.html")])
        == 1
    )
    text = (tmp_path / "a.html").read_text()
    assert "DIFFERENT" in text
    assert "layer 1, expert 11, gate (wi_0): " in text
    values = re.findall(r"<td>([\d.e+-]+)(?=<)", text.partition("<details>")[2].partition("</details>")[0])
    assert len(values) == 2 * 12
    assert np.isfinite(list(map(float, values))).all()


def test_xla_gives_what_we_say_of_it():
    """The activation and the two grouped GEMMs against plain NumPy, group by group."""
    rng = np.random.default_rng(0)
    x, wi, wo = rng.standard_normal((6, 8)), rng.standard_normal((3, 8, 10)), rng.standard_normal((3, 5, 8))
    sizes = np.array([2, 0, 4], np.int32)
    form = Form(columns=(("g", 2, 2, False), ("n", 5, 5, False)))
    none = np.full(len(x), -1, np.int32)
    found = jitted_read(x.astype("f4"), (none, none), Arrays(wi.astype("f4"), wo.astype("f4")), sizes, form=form).down
    wanted = []
    for row, e in zip(x, np.repeat(np.arange(3), sizes), strict=True):
        gate, up = np.split(row @ wi[e], 2)
        wanted.append((gate / (1 + np.exp(-gate)) * up) @ wo[e])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_bit_to_flip_is_chosen_among_the_largest_numbers_without_a_warning():
    reader = tiny_model("qwen3_moe")
    reader.unit = lambda _: None
    for array in reader.arrays.values():
        array[...] = np.float32(3e38).view("u4")
    block = next(iter(blocks(reader, describe(reader)).values()))
    flip, _ = of_expert(block, 0, np.arange(4))
    assert flip.name.endswith("experts.0.down_proj.weight")
