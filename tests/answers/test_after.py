"""After a conversion stand the command that proves it, which is run here as it is printed, and how the output is loaded."""

import json
import shlex
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.answers import after
from convert.card import CARD
from convert.cli import main
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.bases import base, weights
from tests.adapters.tiny import adapter, whole
from tests.layouts.test_companion_forms import CASES as QUANTISED
from tests.layouts.test_companion_forms import write

CASES = {
    "prefuse": (["--prefuse", "hf", "OUT"], "hf OUT", "taken from your code by jax.lax.ragged_dot"),
    "transformers": (["--prefuse", "hf", "OUT", "--layout", "transformers"], "hf OUT", "loaded by transformers 5"),
    "a blank": (["--prefuse", "hf", "O UT"], "hf 'O UT'", "convert.load('O UT') in JAX"),
    "a dash": (["--prefuse", "hf", "./-OUT"], "hf ./-OUT", "convert.load('-OUT') in JAX"),
    "family": (
        ["--prefuse", "hf", "OUT", "--family", "qwen3_moe", "--jobs", "1"],
        "hf OUT --family qwen3_moe",
        "convert.load",
    ),
    "split": (["--split", "fused", "OUT"], "fused OUT", "convert.load('OUT') in JAX; loaded by all that load the original"),
    "to a tree": (["--to", "orbax", "hf", "OUT"], "hf OUT", "loaded by MaxText, as a tree"),
    "a fused tree": (["--prefuse", "hf", "OUT", "--to", "orbax"], "hf OUT", "loaded by MaxText, as a tree (CONCAT)"),
    "layers first": (
        ["--to", "orbax", "hf", "OUT", "--scan-axis", "0"],
        "hf OUT --scan-axis 0",
        "loaded by MaxText, as a tree",
    ),
    "state": (["--prefuse", "state", "OUT"], "state OUT", "loaded by MaxText"),
    "less": (["--prefuse", "state", "OUT", "--drop-optimizer"], "OUT", "loaded by MaxText"),
    "adapter": (["--prefuse", "adapter", "OUT"], "adapter OUT", "form packed: PEFT"),
    "merged": (["--merge", "adapter", "OUT", "--base", "base"], "OUT", "loaded by all that load the base"),
}
"""A conversion -> what `convert --verify` is told, and what is said of loading."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("after")
    make_checkpoint(root / "hf", family="qwen3_moe", experts=4, layers=1)
    make_checkpoint(root / "state", family="qwen3_moe", experts=4, layers=1, format="orbax", train_state=True)
    convert.prefuse(root / "hf", root / "fused")
    base(root / "base", weights(np.float32))
    adapter(root / "adapter", whole("per-expert"))
    return root


@pytest.mark.parametrize("case", CASES)
def test_the_command_that_is_printed_proves_it(places, case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for place in places.iterdir():
        (tmp_path / place.name).symlink_to(place)
    words, proof, load = CASES[case]
    assert main([*words, "--quiet"]) == 0
    *_, verify, loading = capsys.readouterr().out.splitlines()
    assert verify == f"verify convert --verify {proof}"
    assert loading.startswith("load   ")
    assert load in loading
    card = tmp_path / shlex.split(proof)[1 if " " in proof else 0] / CARD
    if card.exists() and "Made by moe-convert" in card.read_text():  # it says the same
        assert ("`convert --verify IN OUT`" in card.read_text()) == (" " in proof)
    assert main([*shlex.split(verify)[2:], "--quiet", *["--no-gemm"] * (case != "prefuse")]) == 0
    capsys.readouterr()
    if "convert.load(" in loading:
        assert convert.load(shlex.split(proof)[1 if " " in proof else 0])
    assert main([*words, "--quiet", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["result"]
    assert (again["written"], again["verify"], again["load"]) == (False, verify[7:], loading[7:])


@pytest.mark.parametrize("layout", ["concat", "transformers", "vllm", "interleaved", "gmm-ep"])
def test_what_was_said_of_the_input_is_said_again(places, layout, tmp_path, capsys):
    """A fused checkpoint that does not say so: without manifest, and without a word in config and headers."""
    convert.prefuse(places / "base", tmp_path / "told", layout=layout)
    tensors = {name: array for file in (tmp_path / "told").glob("*.safetensors") for name, array in load_file(file).items()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    shutil.copy(places / "base" / "config.json", tmp_path / "in")
    code = main(["--split", str(tmp_path / "in"), str(tmp_path / "out"), "--source-layout", layout, "--quiet"])
    assert code == 0
    verify = capsys.readouterr().out.splitlines()[-2]
    assert verify == f"verify convert --verify {tmp_path / 'in'} {tmp_path / 'out'} --source-layout {layout}"
    assert main([*shlex.split(verify)[2:], "--quiet", "--no-gemm"]) == 0


@pytest.mark.parametrize("case", ["nvfp4 of modelopt", "int8 with one zero point", "scalars"])
def test_no_gemm_is_asked_for_that_takes_no_such_experts(case, tmp_path, capsys):
    settings, tensors, _ = QUANTISED[case]
    write(tmp_path / "in", {f"model.layers.2.mlp.experts.{name}": entry for name, entry in tensors.items()}, settings)
    assert main(["--prefuse", str(tmp_path / "in"), str(tmp_path / "out"), "--quiet"]) == 0
    verify = capsys.readouterr().out.splitlines()[-2]
    assert verify.endswith(" --no-gemm") == (case != "scalars")
    assert main([*shlex.split(verify)[2:], "--quiet", *["--no-gemm"] * (case == "scalars")]) == 0


def test_without_jax_no_gemm_is_asked_for(places, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(after.importlib.util, "find_spec", lambda _: None)
    assert main(["--prefuse", str(places / "hf"), str(tmp_path / "out"), "--quiet"]) == 0
    assert f"verify convert --verify {places / 'hf'} {tmp_path / 'out'} --no-gemm\n" in capsys.readouterr().out


def test_a_path_of_two_lines_stays_in_its_line(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "a\nverify convert --verify nothing"
    source.symlink_to(places / "hf")
    assert main(["--prefuse", str(source), "OUT", "--quiet"]) == 0
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert found == ["prefuse", "wrote", "content", "verify", "load"]
