"""Whatever an input makes the code raise is the input's fault, never a bug; control characters do not reach a terminal."""

import pytest

from convert import cli, run
from convert.errors import InputError, printable, readable
from layouts.tables.families import FAMILIES
from tests.tiny import checkpoint, config, tensors

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, StopIteration, RecursionError, MemoryError, OverflowError])
def test_what_is_left_over_is_exit_3(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error("odd")

    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))
    monkeypatch.setattr(run, "make_plan", fail)
    assert cli.main(["--prefuse", "--quiet", str(source), str(tmp_path / "out")]) == 3
    assert f"in: cannot be read as a checkpoint: {error.__name__} in fail" in capsys.readouterr().err


def test_our_own_errors_pass():
    with pytest.raises(InputError, match=r"^mine$"), readable("in"):
        raise InputError("mine")


@pytest.mark.parametrize("size", ["k", "n"])
def test_experts_of_size_0(tmp_path, size, capsys):
    source = checkpoint(tmp_path / "in", tensors(QWEN, **{size: 0}), config(QWEN))
    assert cli.main(["--prefuse", "--quiet", str(source), str(tmp_path / "out")]) in (3, 4)
    assert "has no elements" in capsys.readouterr().err


def test_control_characters_are_escaped():
    assert printable("a\x1b[2J\r\x07\x9b ä\n\ud800") == "a\\x1b[2J\\r\\x07\\x9b ä\n\\ud800"
