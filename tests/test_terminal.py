"""Answers fit the terminal that shows them, and files and pipes have every line as it is."""

import io
import os
import pty
import signal
import subprocess
import sys
import termios
from contextlib import ExitStack

import pytest

from convert.answers.tables import families_text, layouts_text
from convert.arguments import ACTIONS, _made
from convert.cli import main
from convert.progress import Lines
from convert.terminal import at_most, columns, fitted
from scripts.make_checkpoint import make_checkpoint

INTERRUPTED = """
import builtins, os, runpy, signal, sys
def imported(name, *rest, **more):
    if name == "convert.cli":
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *rest, **more)
real, builtins.__import__ = builtins.__import__, imported
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.append("convert/entry")
runpy.run_module("convert", run_name="__main__") if sys.argv[1] == "convert" else real("moe_convert").main()
"""
"""A command that is interrupted while it starts."""
LINES = {
    "short": ["short"],
    "exact     equal      3 MoE layers x 12 experts, gate, up and down": [
        "exact     equal      3 MoE layers x 12 experts,",
        "                     gate, up and down",
    ],
    "  a.wi  'e k (g n)'  BF16 (12, 64, 80)  x3  <- b 'e (g n) k'": [
        "  a.wi  'e k (g n)'  BF16 (12, 64, 80)  x3  <- b",
        "                     'e (g n) k'",
    ],
    "side files: README.md, config.json, tokenizer (7, 868 B)": [
        "side files: README.md, config.json, tokenizer (7,",
        "    868 B)",
    ],
    "note: peft-0.18 has written it, or else megatron-bridge": [
        "note: peft-0.18 has written it, or else",
        "      megatron-bridge",
    ],
    "verify convert --verify /a/long/way/to/input /a/long/way/to/output": [
        "verify convert --verify /a/long/way/to/input /a/long/way/to/output"
    ],
    "    model.layers.{l}.mlp.experts.{e}.{g:gate_proj,up_proj}.weight": [
        "    model.layers.{l}.mlp.experts.{e}.{g:gate_proj,up_proj}.weight"
    ],
}
"""A line -> what is shown of it in 50 columns: words, axes, sizes, names and commands stay whole."""


@pytest.mark.parametrize("line", LINES)
def test_a_line_goes_on_below_its_text(line):
    assert fitted(line, 50).split("\n") == LINES[line]
    assert fitted(f"a\n{line}\n", 50).split("\n") == ["a", *LINES[line], ""]
    assert fitted(line, None) == fitted(line, 20) == fitted(line, 100) == line


@pytest.mark.parametrize(("words", "code"), {"--version": 6, "--version --json": 6, "--inspect nope --json": 3}.items())
def test_a_stream_that_is_full_changes_no_exit_code_but_that_of_an_answer(words, code, monkeypatch):
    for full in (["stdout"], ["stderr"], ["stdout", "stderr"]):
        with monkeypatch.context() as patch, ExitStack() as opened:
            for name in full:
                patch.setattr(sys, name, opened.enter_context(open("/dev/full", "w")))
            assert main(words.split()) == (0 if code == 6 and "stdout" not in full else code)


def test_a_log_that_is_full_ends_no_work():
    with open("/dev/full", "wb", buffering=0) as full:
        lines = Lines("", None, json=True, file=io.TextIOWrapper(full, write_through=True))
        lines.close()


def test_streams_that_are_closed_are_opened(forks):
    code = "import os, sys; from convert.cli import command; [os.close(n) for n in range(3)]; sys.stdout = sys.stderr = None; "
    code += "code = command(); os._exit(code if os.open('/', os.O_RDONLY) > 2 else 1)"
    assert [forks.run(code, *words.split()).returncode for words in ("--version", "--nope", "--inspect nope")] == [0, 2, 3]


def test_a_file_has_no_width():
    assert columns(io.StringIO()) is None
    assert at_most(100, io.StringIO()) == 100


@pytest.mark.parametrize("words", [["--ep-size=4"], ["--layout"], ["--jobs", "0"]])
def test_what_is_wrong_with_words_fits(words, monkeypatch, capsys):
    monkeypatch.setattr("convert.parsing.columns", lambda _: 60)
    with pytest.raises(SystemExit):
        main(["--prefuse", "a", "b", *words])
    said = capsys.readouterr().err
    assert 1 < said.count("\n") == len([line for line in said.splitlines() if len(line) <= 60])


@pytest.mark.parametrize("action", [None, *ACTIONS])
@pytest.mark.parametrize("width", [80, 160])
def test_help_fits_and_cuts_no_word(action, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = _made(action).format_help()
    assert max(map(len, text.splitlines())) <= width
    assert not [line for line in text.splitlines() if line.endswith("-")]


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit(width):
    for text in (families_text(None, width), families_text("glm4_moe", width), layouts_text(width)):
        wide = [line for line in text.splitlines() if len(line) > width]
        assert all(" " not in line.strip() for line in wide)  # a key that has no place to break
        assert len(wide) < 2


def test_a_real_terminal_shows_no_line_that_is_wider(tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=2, embed=8, mlp=8, layers=1)
    shown = [*_in_a_terminal(80, tmp_path, "--inspect", "in"), *_in_a_terminal(80, tmp_path, "--prefuse", "in", "out")]
    assert any(line.startswith("complete  ") for line in shown)
    assert any(line.startswith("prefuse  ") for line in shown)
    assert [line for line in shown if len(line) > 80] == []


def _in_a_terminal(width: int, folder, *words: str) -> list[str]:
    """What is on the screen in the end, line by line: a bar that is drawn over is gone."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, width))
    with subprocess.Popen([sys.executable, "-m", "convert", *words], cwd=folder, stdout=theirs, stderr=theirs):
        os.close(theirs)
        found = b""
        while True:
            try:
                found += os.read(ours, 1 << 16)
            except OSError:  # the last one who had the terminal has left
                break
    os.close(ours)
    return [line.rpartition("\r")[2] for line in found.decode().replace("\r\n", "\n").split("\n")]


@pytest.mark.parametrize("module", ["convert", "moe_convert"])
def test_ctrl_c_before_there_is_anything_to_tidy_up_shows_no_traceback(module, forks):
    ended = forks.run(INTERRUPTED, module)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_what_a_library_in_c_makes_of_an_interruption_is_no_bug(monkeypatch, capsys):
    def act(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise ImportError("initialization failed") from error

    monkeypatch.setattr("convert.cli.act", act)
    assert main(["--version"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "convert: interrupted; run the same command again to go on (signal 15)\n"
