"""Checkpoints that transformers itself wrote come back byte for byte; users do not have them, `test_cli.py` makes its own."""

from pathlib import Path

import pytest

from convert.cli import main
from layouts.targets import TARGETS
from tests.tiny import times, tree

SHARED = Path(__file__).parents[2] / "shared" / "checkpoints"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the maintainers' checkpoints are not here ({SHARED})")


@pytest.mark.parametrize("layout", TARGETS)
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe_square_tied"])
def test_real_checkpoints_return_byte_for_byte(name, layout, tmp_path):
    source = SHARED / name
    before = tree(source), times(source)
    assert main(["--prefuse", str(source), str(tmp_path / "fused"), "--layout", layout, "--quiet"]) == 0
    assert main(["--split", str(tmp_path / "fused"), str(tmp_path / "back"), "--quiet"]) == 0
    back = tree(tmp_path / "back")
    assert back.pop("convert_manifest.json")
    assert back == before[0]
    assert (tree(source), times(source)) == before


@pytest.mark.parametrize("name", ["deepseek_v3_fp8", "gpt_oss", "granitemoe", "llama4_text"])
def test_what_the_tables_do_not_know_yet_is_refused(name, tmp_path, capsys):
    assert main(["--prefuse", str(SHARED / name), str(tmp_path / "out"), "--quiet"]) == 4
    message = capsys.readouterr().err
    assert message.startswith(f"convert: {SHARED / name}")
    assert not list(tmp_path.iterdir())
