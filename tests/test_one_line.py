"""Names of an input never break a line of what is printed, nor reach a terminal or a page raw."""

from convert import cli
from convert.report import describe_division
from convert.verifier.page import page
from convert.verifier.verdict import Level, Verdict
from layouts.tables.families import FAMILIES
from tests.tiny import checkpoint, config, tensors

QWEN = next(family for family in FAMILIES if family.name == "qwen3_moe")
NAME = "model.odd\nFORGED\x1b[31m"


def lines(text):
    assert "\x1b" not in text
    return [line for line in text.splitlines() if line.startswith("FORGED")]


def test_a_plan_has_no_lines_of_the_input(tmp_path, capsys):
    found = tensors(QWEN) | {NAME: tensors(QWEN)["lm_head.weight"]}
    source = checkpoint(tmp_path / "in", found, config(QWEN), extra=False)
    (source / "side\nFORGED").write_text("x")
    assert cli.main(["--prefuse", "--dry-run", "--quiet", str(source), str(tmp_path / "out")]) in (0, 3)
    text = "".join(capsys.readouterr())
    assert "FORGED" in text
    assert not lines(text)


def test_a_plan_folds_tensors_of_such_names_into_one_line(tmp_path, capsys):
    found = tensors(QWEN) | {NAME: tensors(QWEN)["lm_head.weight"]}
    source = checkpoint(tmp_path / "in", found, config(QWEN), extra=False)
    assert cli.main(["--prefuse", "--dry-run", "--quiet", str(source), str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "model.odd\\nFORGED\\x1b[31m" in text
    assert not lines(text)


def test_a_verdict_its_page_and_a_division_have_none():
    level = Level(
        name="exact", covered=f"all of {NAME}", compared=1, differences=(f"{NAME} differs",), errors={f"{NAME}\ud800": (0.5,)}
    )
    verdict = Verdict(subject=f"in\ud800{NAME}", levels=(level, Level(name="others", covered=NAME, compared=1)))
    for text in (str(verdict), page(verdict), describe_division([(NAME, 3)], 2)):
        assert "FORGED" in text
        assert not lines(text)
        assert text.encode("utf-8")
