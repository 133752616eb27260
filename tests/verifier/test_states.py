"""A level is equal only if it ran and compared something; else it says why it did not."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.errors import UsageError
from convert.options import Verification
from convert.options.option import named
from convert.verifier.page import page
from convert.verifier.verdict import Level, Verdict
from scripts.make_checkpoint import make_checkpoint

E, LAYERS = 4, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("states")
    make_checkpoint(root / "in", family="qwen3_moe", experts=E, embed=8, mlp=4, layers=LAYERS, values="normal")
    convert.prefuse(root / "in", root / "out")
    convert.reformat(root / "in", root / "tree", to="orbax")
    return root


def level(verdict: Verdict, name: str) -> Level:
    return next(level for level in verdict.levels if level.name == name)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": "7"}, "layers: there is no MoE layer 7; there are layers 0-2"),
        ({"layers": "1,5-6"}, "layers: there is no MoE layer 5-6; there are layers 0-2"),
        ({"layers": []}, "layers: none is given; there are layers 0-2"),
        ({"experts": [99]}, "experts: there is no expert 99; there are experts 0-3"),
        ({"experts": [0, 4], "layers": [1]}, "experts: there is no expert 4; there are experts 0-3"),
    ],
)
@pytest.mark.parametrize("other", ["out", "tree"])
def test_what_is_not_there_is_an_error_that_says_what_is(root, options, told, other):
    with pytest.raises(UsageError, match=f"^{re.escape(told)}$"):
        convert.verify(root / "in", root / other, gemm=False, **options)


def test_the_command_and_the_estimate_refuse_it_too(root, capsys):
    arguments = ["--verify", str(root / "in"), str(root / "out"), "--layers", "7", "--quiet"]
    assert main([*arguments, "--no-gemm"]) == 2
    assert main([*arguments, "--no-gemm", "--dry-run"]) == 2
    assert capsys.readouterr().err.count("there are layers 0-2") == 2
    assert main(["--verify", str(root / "out"), "--layers", "7", "--quiet"]) == 2
    assert "--layers is for two checkpoints: the digests of one are compared as a whole" in capsys.readouterr().err


@pytest.mark.parametrize("each", [each for each in named(Verification) if each.option.of], ids=lambda each: each.name)
def test_an_option_for_another_number_of_checkpoints_is_refused(root, each):
    """The table of options says it, in one place; a value that is the default is refused like any other."""
    value = {"layers": [0], "experts": [0], "mesh": {"expert": 1}, "tokens": 1, "family_b": "x", "source_layout_b": "x"}
    paths = [root / "out"] * (3 - each.option.of)
    with pytest.raises(UsageError, match=f"^{each.name}=(True)? is for (one checkpoint|two checkpoints): "):
        convert.verify(*paths, **{each.name: value.get(each.name, each.default or True)})


def test_a_narrowed_verdict_says_so(root, capsys):
    arguments = ["--verify", str(root / "in"), str(root / "out"), "--no-gemm", "--quiet"]
    assert main([*arguments, "--layers", "1-2", "--experts", "0,2-3"]) == 0
    assert capsys.readouterr().out.endswith("\nEQUAL (layers 1-2 of 3, experts 0, 2-3 of 4)\n")
    assert main([*arguments, "--layers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["verdict"] == "EQUAL (layers 1 of 3)"


def damaged(root: Path, out: Path, change: Any) -> Path:
    make_checkpoint(out, family="qwen3_moe", experts=E, embed=8, mlp=4, layers=LAYERS, values="normal")
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
    return out


def test_gradients_are_not_equal_where_they_were_skipped(root, tmp_path):
    def zero(tensors):
        for name in tensors:
            if "experts" in name and "down_proj" in name:
                tensors[name][:] = 0

    verdict = convert.verify(root / "in", damaged(root, tmp_path / "zero", zero))
    assert level(verdict, "gemm").state == "DIFFERENT"
    gradients = level(verdict, "gradients")
    assert (gradients.state, gradients.why) == ("not run", "gemm differs")
    assert "gradients not run    (gemm differs)" in str(verdict)
    shown = page(verdict).partition("gradients</th>")[2].partition("</tr>")[0]
    assert "<span class='state incomplete'>○ not run</span>" in shown
    assert "<td data-of=coverage>(gemm differs)</td>" in shown
    entry = next(each for each in json.loads(verdict.json())["levels"] if each["name"] == "gradients")
    assert (entry["state"], entry["equal"], entry["why"]) == ("not run", False, "gemm differs")


def test_outputs_that_are_all_infinite_or_nan_prove_nothing(tmp_path):
    def poison(tensors):
        for name in tensors:
            if "experts" in name:
                tensors[name][:] = np.float32("nan")

    root = damaged(tmp_path, tmp_path / "nan", poison)
    verdict = convert.verify(root, root, layers=[0])
    states = {each.name: each.state for each in verdict.levels}
    assert states == dict.fromkeys(("identity", "gemm", "gradients", "layer"), "not run") | {
        "exact": "equal",
        "others": "equal",
        "files": "equal",
    }
    assert "no output is a finite number" in level(verdict, "gemm").why
    assert verdict.equal  # the bits say it


def packed(path: Path) -> Path:
    """Experts of a type that no GEMM takes."""
    make_checkpoint(path, family="qwen3_moe", experts=2, embed=8, mlp=4, layers=1, values="normal")
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        halves = {name: t.view(np.uint8)[..., : t.shape[-1] // 2].copy() for name, t in tensors.items() if "experts" in name}
        found = tensors | halves  # two values to a byte
        save_file(found, file, {"format": "pt"})
    return path


def test_a_level_that_was_asked_for_and_cannot_run_is_no_success(tmp_path, capsys):
    path = packed(tmp_path / "packed")
    arguments = ["--verify", str(path), str(path), "--quiet"]
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "gemm      not run    (no GEMM here takes the type of these experts" in text
    assert text.endswith("INCOMPLETE (not run: identity, gemm, gradients, layer)\n")
    assert main([*arguments, "--allow-not-run"]) == 0
    assert capsys.readouterr().out.endswith("EQUAL (not run: identity, gemm, gradients, layer)\n")
    assert main([*arguments, "--no-gemm"]) == 0


def test_a_mesh_that_the_backend_cannot_use_is_not_run(root):
    both = root / "in", root / "out"
    verdict = convert.verify(*both, backend="moegemm", mesh="expert=2", layers=[0])
    assert (level(verdict, "mesh").state, verdict.outcome) == ("not run", "INCOMPLETE")
    assert level(verdict, "mesh").why == "JAX does not run moegemm"


def test_a_backend_that_nobody_named_may_be_missing():
    levels = (
        Level(name="gemm", covered="all", compared=1),
        Level(name="gemm/tokamax", covered="", compared=0, not_run="not installed", asked=False),
    )
    verdict = Verdict(subject="a", levels=levels)
    assert verdict.equal
    assert "gemm/tokamax not run    (not installed)" in str(verdict)


def test_nothing_compared_is_never_equal():
    nothing = Level(name="exact", covered="0 MoE layers x 0 experts", compared=0)
    assert (nothing.state, nothing.why) == ("not run", "there was nothing to compare")
    for allow in (False, True):
        verdict = Verdict(subject="a & b", levels=(nothing,), allow_not_run=allow)
        assert not verdict.equal
        assert html.escape("a & b") in page(verdict)
        assert "INCOMPLETE" in page(verdict)
        assert "state equal" not in page(verdict)
    assert not Verdict(subject="", levels=()).equal
