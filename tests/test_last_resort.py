"""Whatever an input makes the code raise is the input's fault, never a bug; control characters do not reach a terminal."""

import pytest

from convert import cli, run
from convert.errors import InputError, printable, readable
from convert.hf import write
from layouts.hf import HFReader
from layouts.tables.families import FAMILIES
from tests.tiny import checkpoint, config, tensors

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, StopIteration, RecursionError, OverflowError])
def test_what_is_left_over_is_exit_3(tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error("odd")

    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))
    monkeypatch.setattr(run, "make_plan", fail)
    assert cli.main(["--prefuse", "--quiet", str(source), str(tmp_path / "out")]) == 3
    assert f"in: cannot be read as a checkpoint: {error.__name__} in fail" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, OverflowError])
@pytest.mark.parametrize(
    "command", ["--prefuse {in} {out}", "--verify {in} {in}", "--verify {in} {in} --dry-run", "--verify {in} {in} --no-gemm"]
)
def test_what_reading_data_raises_is_exit_3(tmp_path, monkeypatch, capsys, error, command):
    def fail(*_):
        raise error("odd")

    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))
    monkeypatch.setattr(HFReader, "read", fail)
    words = command.replace("{in}", str(source)).replace("{out}", str(tmp_path / "out")).split()
    assert cli.main([*words, "--quiet"]) == 3
    assert f"cannot be read as a checkpoint: {error.__name__} in fail" in capsys.readouterr().err


def test_what_reading_an_output_or_planning_its_files_raises_is_exit_3(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("odd")

    source, out = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN)), tmp_path / "out"
    assert cli.main(["--prefuse", "--quiet", str(source), str(out)]) == 0
    monkeypatch.setattr(write, "restore", fail)
    for more in (["--dry-run"], []):
        assert cli.main(["--split", "--quiet", str(out), str(tmp_path / "back"), *more]) == 3
    monkeypatch.setattr(HFReader, "read", fail)
    assert cli.main(["--verify", "--quiet", str(out)]) == 3
    assert capsys.readouterr().err.count("cannot be read as a checkpoint: KeyError in fail") == 3


def test_what_writing_raises_is_our_bug(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise KeyError("odd")

    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))
    monkeypatch.setattr(write, "index_text", fail)
    assert cli.main(["--prefuse", "--quiet", "--max-shard-size", "1kB", str(source), str(tmp_path / "out")]) == 70
    assert "this is a bug" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "command", ["--prefuse {in} {out}", "--verify {in} {in}", "--verify {in} {in} --dry-run", "--verify {in} {in} --no-gemm"]
)
def test_where_memory_is_at_its_end_a_sentence_names_the_tensor(tmp_path, monkeypatch, capsys, command):
    def full(*_, **__):
        raise MemoryError("Unable to allocate 1.00 TiB")

    source = checkpoint(tmp_path / "in", tensors(QWEN), config(QWEN))
    read = HFReader.read
    monkeypatch.setattr(HFReader, "read", lambda reader, name, slices, *_: read(reader, name, slices, full))
    monkeypatch.setattr("layouts.hf.reader.read_block", lambda *_: full())
    monkeypatch.setattr("convert.verifier.bits.together.gather", lambda *_: full())
    words = command.replace("{in}", str(source)).replace("{out}", str(tmp_path / "out")).split()
    assert cli.main([*words, "--quiet"]) == 6
    told = capsys.readouterr().err
    assert told.count("there is not enough memory here (") == 1
    assert "_proj.weight (" in told or command.startswith("--prefuse")
    assert "lower --memory" in told
    assert "Traceback" not in told
