"""Checkpoints that transformers itself wrote come back byte for byte; users do not have them, `test_cli.py` makes its own."""

import re
from pathlib import Path

import pytest

from convert.cli import main
from tests.tiny import times, tree

SHARED = Path(__file__).parents[2] / "shared" / "checkpoints"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the maintainers' checkpoints are not here ({SHARED})")


EVERY = ("deepseek_v3_fp8", "gpt_oss", "granitemoe", "llama4_text", "mixtral", "qwen3_moe", "qwen3_moe_square_tied")


@pytest.mark.parametrize("layout", ["concat", "transformers", "vllm", "flashinfer", "per-shard", "gmm-ep", "fused-moe"])
@pytest.mark.parametrize("name", EVERY)
def test_real_checkpoints_return_byte_for_byte(name, layout, tmp_path, capsys):
    source = SHARED / name
    before = tree(source), times(source)
    status = main(["--prefuse", str(source), str(tmp_path / "fused"), "--layout", layout, "--quiet"])
    assert (tree(source), times(source)) == before
    if status == 4:
        assert re.search("nothing to prefuse|lie across|does not fit", capsys.readouterr().err)
        assert not list(tmp_path.iterdir())
        return
    assert status == 0
    assert main(["--split", str(tmp_path / "fused"), str(tmp_path / "back"), "--quiet"]) == 0
    back = tree(tmp_path / "back")
    assert back.pop("convert_manifest.json")
    assert back == before[0]
