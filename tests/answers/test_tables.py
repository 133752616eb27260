"""The tables of families and layouts: complete, in 100 columns, and one family in full; `--version`, `--help ACTION`."""

import pytest

from convert.arguments import parser
from convert.cli import main
from convert.version import TOOL
from layouts.tables.families import FAMILIES, NOT_GATED
from layouts.tables.natives import SOURCES
from layouts.tables.targets import LOADED_BY, TAKEN_BY, TARGETS


def printed(capsys, *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["--families"], ["--layouts"]])
def test_tables_are_as_wide_as_a_terminal(words, capsys):
    assert max(map(len, printed(capsys, *words).splitlines())) <= 100


def test_every_family_is_there_with_all_its_names(capsys):
    text = printed(capsys, "--families")
    for family in FAMILIES:
        assert f"\n{family.name} " in f"\n{text}"
        assert all(word in text for word in family.model_types)
    assert all(word in text for word in NOT_GATED)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_one_family_is_told_by_any_of_its_names(family, capsys):
    for name in (family.name, *family.model_types):
        text = printed(capsys, "--families", name)
        assert family.experts in text
        assert all(name in text for name, table in SOURCES.items() if table in family.native)
        assert max(map(len, text.splitlines())) <= 100


def test_one_without_a_gate_says_so_and_an_unknown_one_is_near_another(capsys):
    assert "no gate, so nothing to fuse:\ndoge" in printed(capsys, "--families", "doge")
    assert main(["--families", "qwen3_mo"]) == 2
    assert capsys.readouterr().err.startswith("convert: no family is called 'qwen3_mo' (did you mean qwen3_moe?)")


def test_every_layout_is_there_with_its_axes_and_what_it_is_for(capsys):
    text = printed(capsys, "--layouts")
    assert {**LOADED_BY, **TAKEN_BY}.keys() <= TARGETS.keys()
    words = " ".join(text.split())
    assert all(program in words for program in (*(program for _, program in LOADED_BY.values()), *TAKEN_BY.values()))
    for name, table in {**TARGETS, **SOURCES}.items():
        assert f"\n{name} " in f"{text} " or f"\n{name}\n" in text
        assert all(f"'{each.pattern}'" in text for each in table.values())


def test_the_version_is_that_of_the_tool(capsys):
    assert printed(capsys, "--version").startswith(f"moe-convert {TOOL} (Python 3.")


@pytest.mark.parametrize(
    ("action", "has", "lacks"),
    [
        ("verify", ("--backend", "--report", "--memory"), ("--layout", "--overwrite", "--shards")),
        ("--prefuse", ("--layout", "--overwrite", "--coordinator"), ("--backend", "--report", "--decode")),
        ("inspect", ("--family", "--json"), ("--jobs", "--dry-run", "--progress")),
    ],
)
def test_the_help_of_an_action_has_its_options_alone(action, has, lacks, capsys):
    words = [f"--help={action}"] if action.startswith("--") else ["--help", action]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    flags = {word.strip(",") for word in capsys.readouterr().out.partition("\ndo:")[2].split() if word.startswith("--")}
    assert set(has) <= flags
    assert not set(lacks) & flags


def test_the_help_of_no_action_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help", "vrify"])
    assert stopped.value.code == 2
    assert "did you mean --verify?" in capsys.readouterr().err


def test_examples_come_before_options_and_options_are_in_groups():
    text = parser().format_help()
    heads = ["examples:", "do:", "layout:", "formats:", "verify:", "adapters:", "resources:", "several processes:", "output:"]
    assert sorted(heads, key=lambda head: text.index(f"\n{head}")) == heads
    assert "\noptions:" not in text
