"""Every tensor that transformers saves of a model with a MaxText tree has a row: there and back gives its files again."""

import pytest

import convert
from layouts.tables.maxtext_trees import TREES

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_models  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

CASES = ["qwen3_moe-sparse", "qwen3_next-cycles", *sorted(TREES.keys() - {"qwen3_moe", "qwen3_next"}), "llama4_text"]
"""MaxText's Qwen3 has experts in every layer, and its Qwen3-Next whole cycles of four."""


def test_every_tree_is_here():
    assert {case.partition("-")[0] for case in CASES} >= set(TREES)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, scan, tmp_path):
    tiny_models.build(case).save_pretrained(tmp_path / "in")
    convert.prefuse(tmp_path / "in", tmp_path / "tree", to="orbax", scan=scan)
    convert.split(tmp_path / "tree", tmp_path / "again", to="hf")
    files = {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    assert any(name.endswith(".safetensors") for name in files)
    assert all((tmp_path / "again" / name).read_bytes() == content for name, content in files.items())
    verdict = convert.verify(tmp_path / "in", tmp_path / "tree")
    assert verdict.equal, verdict
    for layout in ("concat", "flashinfer"):
        convert.prefuse(tmp_path / "in", tmp_path / layout, layout=layout)
        verdict = convert.verify(tmp_path / layout, tmp_path / "tree", gemm=False)
        assert verdict.equal, verdict
