"""Every tensor that transformers saves of a model with a MaxText tree has a row: there and back gives its files again."""

import pytest

import convert
from layouts.tables.maxtext_trees import TREES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.clients import tiny_models  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

PARTLY = {"qwen3_omni_moe": "252 tensors have no place on the other side, first code2wav"}
"""Models of which MaxText has a part alone, and what is said of the rest."""
SPECIAL = (
    "qwen3_moe-sparse",
    "qwen3_next-cycles",
    "qwen3_5_moe-cycles",
    "gemma4-cycles",
    "gemma4_text-cycles",
    "deepseek_v4-cycles",
)
"""MaxText's Qwen3 has experts in every layer, its Qwen3-Next and Qwen3.5 whole cycles of four, its Gemma 4 of six.

Of its DeepSeek-V4, layers behind the first ones take turns.
"""
CASES = [*SPECIAL, *sorted(TREES.keys() - {case.partition("-")[0] for case in SPECIAL} - PARTLY.keys()), "llama4_text"]
COMPUTED = {
    "mixtral": "query-scale",
    "gemma4-cycles": "embedding-scale",
    "gemma4_text-cycles": "embedding-scale",
    "deepseek_v4-cycles": "exact-values",
}


def test_every_tree_is_here():
    assert {case.partition("-")[0] for case in (*CASES, *PARTLY)} >= set(TREES)


@pytest.mark.parametrize("case", PARTLY)
def test_what_has_no_place_is_named(case, tmp_path):
    tiny_models.build(case).save_pretrained(tmp_path / "in")
    with pytest.raises(convert.PlanError, match=PARTLY[case]):
        convert.prefuse(tmp_path / "in", tmp_path / "tree", to="orbax")


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, scan, tmp_path):
    tiny_models.build(case).save_pretrained(tmp_path / "in")
    convert.prefuse(tmp_path / "in", tmp_path / "tree", to="orbax", scan=scan, compute=COMPUTED.get(case))
    convert.split(tmp_path / "tree", tmp_path / "again", to="hf", compute=COMPUTED.get(case))
    files = {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    assert any(name.endswith(".safetensors") for name in files)
    assert all((tmp_path / "again" / name).read_bytes() == content for name, content in files.items())
    verdict = convert.verify(tmp_path / "in", tmp_path / "tree")
    assert verdict.equal, verdict
    for layout in ("concat", "flashinfer"):
        convert.prefuse(tmp_path / "in", tmp_path / layout, layout=layout)
        verdict = convert.verify(tmp_path / layout, tmp_path / "tree", gemm=False)
        assert verdict.equal, verdict
