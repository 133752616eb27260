"""The verdict says how much was compared, with config.json as the witness for how much there is."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import convert
from convert.verifier.bits.counts import expert_words, layer_words
from scripts.make_checkpoint import make_checkpoint

SAID = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 8}
SILENT = {"num_hidden_layers": 4, "num_local_experts": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("counts")
    make_checkpoint(root / "in", family="deepseek_v3", experts=4, embed=8, mlp=4, layers=3, values="normal")
    convert.prefuse(root / "in", root / "padded", layout="per-shard", shards=2, align=3)
    convert.reformat(root / "in", root / "tree", to="orbax")
    return root


def nbytes(root: Path) -> str:
    found = (array.nbytes for file in (root / "in").glob("*.safetensors") for array in load_file(file).values())
    return f"{sum(found) / 1000:.1f} kB"


@pytest.mark.parametrize(("a", "b"), [("in", "padded"), ("padded", "in"), ("in", "tree"), ("tree", "in")])
def test_everything_is_counted_without_its_padding(root, a, b):
    verdict = convert.verify(root / a, root / b, gemm=False)
    all_of_it = f"2 of 2 MoE layers, 4 of 4 experts, {nbytes(root)} of {nbytes(root)}, 0 skipped"
    assert verdict.counts == all_of_it
    assert f"covered   {all_of_it}\nEQUAL" in str(verdict)
    assert json.loads(verdict.json())["counts"] == all_of_it


def test_a_narrowed_verdict_counts_what_it_left_out(root):
    counts = convert.verify(root / "in", root / "padded", gemm=False, layers=[1], experts=[0, 2]).counts
    assert counts.startswith("1 of 2 MoE layers, 2 of 4 experts, ")
    assert counts.endswith(f" of {nbytes(root)}, 1 MoE layers skipped")


@pytest.mark.parametrize(
    ("numbers", "count", "config", "told"),
    [
        ([1, 2, 3], 3, SAID, "3 of 3 MoE layers"),
        ([1, 3], 2, SAID, "2 of 3 MoE layers"),
        ([1, 2, 3, 4], 4, SAID, "3 of 3 MoE layers and 1 more"),  # MTP
        (None, 9, SAID, "3 of 3 MoE layers and 6 more"),  # moments of an optimizer
        ([0, 1, 2, 3], 4, SILENT, "4 of 4 MoE layers"),
        ([1, 3], 2, SILENT, "2 of ? (config.json does not say) MoE layers"),
        ([0], 1, {}, "1 of ? (config.json does not say) MoE layers"),
    ],
)
def test_layers(numbers, count, config, told):
    assert layer_words(numbers, count, config) == told


@pytest.mark.parametrize(
    ("compared", "config", "told"),
    [
        ([8, 8], SAID, "8 of 8 experts"),
        ([4, 4], SAID, "4 of 8 experts"),
        ([6, 8], SAID, "6-8 of 8 experts"),
        ([4], {"thinker": {"num_experts": 8}, "talker": {"num_experts": 4}}, "4 of 4 experts"),
        ([4], {}, "4 of ? (config.json does not say) experts"),
        ([], SAID, "0 of 8 experts"),
    ],
)
def test_experts(compared, config, told):
    assert expert_words(compared, config) == told
