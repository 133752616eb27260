"""What somebody needs who signs: the document, the page, and the self-test that shows that levels see."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from convert.cli import main
from convert.verifier.bits import exact
from convert.verifier.control.trials import COMPUTED
from convert.verifier.files import manifest
from convert.verifier.page import page
from convert.verifier.verdict import Level, Trial, Verdict
from scripts.make_checkpoint import make_checkpoint

SCHEMA = json.loads((Path(convert.__file__).parent / "answers" / "verdict.schema.json").read_text())
LAYOUTS = {"concat": {}, "per-shard": {"shards": 2}, "flashinfer": {}, "interleaved": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report")
    make_checkpoint(root / "in", family="qwen3_moe", experts=4, embed=16, mlp=8, layers=2, values="normal")
    for layout, choices in LAYOUTS.items():
        convert.prefuse(root / "in", root / layout, layout=layout, **choices)
    convert.reformat(root / "in", root / "tree", to="orbax")
    convert.prefuse(root / "tree", root / "wi")
    return root


def valid(found) -> dict:
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return found


def command(*words, capsys) -> tuple[int, dict]:
    code = main([*map(str, words), "--json", "--quiet"])
    found = json.loads(capsys.readouterr().out)
    assert (found["action"], found["exit_code"], found["error"]) == ("verify", code, None)
    return code, valid(found["result"])


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_document_has_all_that_a_report_needs(root, tmp_path, capsys):
    report = tmp_path / "r.html"
    code, found = command("--verify", root / "in", root / "concat", "--report", report, capsys=capsys)
    assert code == 0
    assert (found["equal"], found["outcome"], set(found["not_run"])) == (True, "EQUAL", {"recorded"})
    assert found["run"]["command"].startswith("convert --verify ")
    assert found["run"]["device"].startswith("8 x cpu")
    assert {"name", "system", "processor", "cores", "memory"} == found["run"]["machine"].keys()
    one, other = found["sides"]
    assert one["path"] == str(root / "in")
    assert one["nbytes"] == sum(file.stat().st_size for file in (root / "in").rglob("*") if file.is_file())
    assert one["digest"] == other["digest"] == f"sha256:{convert.digest(root / 'in').model.sha256}"
    assert other["layout"][0] == "concat, gate and up in one tensor"
    assert "expert x embed x [gate, up; expert mlp]" in other["layout"][-1]
    levels = {level["name"]: level for level in found["levels"]}
    assert [*levels] == ["exact", "others", "identity", "gemm", "gradients", "layer", "files", "recorded", "content"]
    for name in ("gemm", "gradients", "layer"):
        assert 0 <= levels[name]["worst"] < levels[name]["allowed"] < 1e-4
    seen = [trial["seen"] for trial in found["self_test"]]
    assert seen == [["exact", "identity", "gemm", "gradients", "layer", "content"], ["others"]]
    assert not any(trial["untried"] for trial in found["self_test"])
    html = report.read_text()
    for words in (one["digest"], one["path"], found["run"]["command"], "seen by", "Every value as a table"):
        assert words in html


def test_the_estimate_has_the_digests(root, capsys):
    arguments = ["--verify", str(root / "in"), str(root / "concat"), "--no-gemm", "--dry-run"]
    assert main(arguments) == 0
    assert "sha256" not in capsys.readouterr().out
    assert main([*arguments, "--report", "r.html"]) == 0
    assert "digests  about 0.0 s more, at the speed of sha256" in capsys.readouterr().out


def test_both_can_be_left_out(root, capsys):
    switches = ("--no-content", "--no-self-test", "--no-gemm")
    code, found = command("--verify", root / "in", root / "concat", *switches, capsys=capsys)
    assert code == 0
    assert (found["sides"], found["self_test"]) == ([], [])
    assert found["run"]["device"]


@pytest.mark.parametrize("other", [*LAYOUTS, "tree", "wi"])
def test_a_flipped_bit_is_seen_in_every_layout(root, other):
    a = "tree" if other == "wi" else "in"
    gemm = other in ("per-shard", "wi")  # JAX compiles for each layout
    verdict = convert.verify(root / a, root / other, self_test=True, content=True, gemm=gemm)
    first, second = verdict.self_test
    assert verdict.equal
    assert first.seen == (("exact", *COMPUTED[:-1], "content") if gemm else ("exact", "content"))
    assert second.seen == ("others",)
    assert not verdict.blind
    assert not first.untried


@pytest.mark.parametrize("experts", ["0", "1"])  # each has tokens in one of the two rounds alone
def test_a_flipped_bit_is_seen_on_a_mesh(root, experts):
    trial = convert.verify(root / "in", root / "concat", mesh="expert=2", experts=experts, self_test=True).self_test[0]
    assert sorted(trial.seen) == sorted(("exact", *COMPUTED))
    assert (trial.unseen, trial.untried) == ((), {})


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_said_of_one_side_is_said_of_its_digest_and_its_trial(root, tmp_path, turned):
    """A fused side without a record, that only the user's word for it can tell."""
    (tmp_path / "bare").mkdir()
    config = json.loads((root / "concat" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "moe_layout"}))
    for file in (root / "concat").glob("*.safetensors"):
        save_file(load_file(file), tmp_path / "bare" / file.name, {"format": "pt"})
    pair, said = (root / "per-shard", tmp_path / "bare"), {"source_layout_b": "concat"}
    if turned:
        pair, said = pair[::-1], {"source_layout": "concat", "source_layout_b": "per-shard:2"}
    verdict = convert.verify(*pair, **said, gemm=False, content=True, self_test=True)
    assert {level.name: level.state for level in verdict.levels}["content"] == "equal"
    assert [trial.seen for trial in verdict.self_test] == [("exact", "content"), ("others",)]
    assert {side.digest for side in verdict.sides} == {f"sha256:{convert.digest(root / 'in').model.sha256}"}


def test_a_narrowed_verdict_is_tried_within_its_scope(root):
    verdict = convert.verify(root / "in", root / "concat", layers="1", experts="2", self_test=True, gemm=False)
    assert "layers.1." in verdict.self_test[0].flipped
    assert re.search(r"\.w[io]\[2, ", verdict.self_test[0].flipped)
    assert verdict.outcome == "EQUAL"


def test_one_checkpoint_is_tried_against_its_manifest(root, tmp_path, capsys):
    code, found = command("--verify", root / "concat", "--report", tmp_path / "r.html", capsys=capsys)
    assert code == 0
    assert found["self_test"][0]["seen"] == ["digests"]
    assert found["sides"][0]["digest"] == f"sha256:{convert.digest(root / 'in').model.sha256}"
    assert found["sides"][0]["digest"] in (tmp_path / "r.html").read_text()


def test_stored_chunks_are_not_tried_and_say_so(root, capsys):
    code, found = command("--verify", root / "wi", capsys=capsys)
    assert code == 0
    assert "chunks as they are stored" in found["self_test"][0]["untried"]["digests"]


def blind_experts(*arguments):
    return Level(name="exact", covered="everything", compared=1)


def test_a_blind_level_makes_the_verdict_incomplete(root, monkeypatch, capsys):
    monkeypatch.setattr(exact, "compare_experts", blind_experts)
    code, found = command("--verify", root / "in", root / "concat", "--no-gemm", capsys=capsys)
    assert code == 1
    assert found["verdict"] == "INCOMPLETE (the self-test was not seen by: exact)"
    assert found["self_test"][0]["unseen"] == ["exact"]
    monkeypatch.setattr(manifest, "digest_of", lambda reader, name, *_: _wanted(root, name))
    code, found = command("--verify", root / "concat", capsys=capsys)
    assert (code, found["self_test"][0]["unseen"]) == (1, ["digests"])


def _wanted(root: Path, name: str) -> str:
    return json.loads((root / "concat" / "convert_manifest.json").read_text())["tensors"][name]["xxh3_128"]


def test_the_input_is_not_written_to(root):
    before = {file: file.read_bytes() for side in ("in", "concat") for file in (root / side).rglob("*") if file.is_file()}
    convert.verify(root / "in", root / "concat", self_test=True, gemm=False)
    assert all(file.read_bytes() == data for file, data in before.items())


def test_dead_weights_are_not_asked_of_levels_that_cannot_see_them(root, tmp_path):
    """Experts of zeros: outputs depend on no single bit of theirs."""
    shutil.copytree(root / "in", tmp_path / "in")
    zeroed(tmp_path / "in")
    convert.prefuse(tmp_path / "in", tmp_path / "out")
    trial = convert.verify(tmp_path / "in", tmp_path / "out", self_test=True).self_test[0]
    assert trial.seen == ("exact",)
    assert not trial.unseen
    assert set(trial.untried.values()) == {"no output depends on it"}


def zeroed(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        tensors = {name: array * 0 if "experts" in name else array for name, array in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


def test_different_contents_are_a_difference(root, tmp_path):
    shutil.copytree(root / "in", tmp_path / "b")
    zeroed(tmp_path / "b")
    verdict = convert.verify(root / "in", tmp_path / "b", gemm=False, content=True, self_test=True)
    assert verdict.self_test[0].untried.keys() == {"exact"}
    level = next(level for level in verdict.levels if level.name == "content")
    assert level.state == "DIFFERENT"
    assert level.differences[0].count("sha256:") == 2


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def large() -> Verdict:
    rng = np.random.default_rng(0)
    errors = {f"layer {n}": tuple(rng.random(128) * 1e-7 * (rng.random(128) > 0.5)) for n in range(48)}
    errors["layer 3"] = (*errors["layer 3"][:5], 0.25, math.inf, *errors["layer 3"][7:])
    level = Level(name="gemm", covered="c", compared=1, errors=errors, bound=1e-5, worst=0.25, differences=("d",))
    return Verdict(subject="a", levels=(level,), self_test=(Trial(flipped="f", seen=(), unseen=("gemm",)),))


def test_values_of_the_map_stand_in_words_and_the_page_loads_nothing():
    html = page(large())
    tags = Tags()
    tags.feed(html)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags.found}
    assert not any({"href", "src", "title"} & attributes.keys() for _, attributes in tags.found)
    assert html.count("<li>2.5e-01 (5)") == 0
    assert html.count("inf (6)") == 1  # the largest of its row
    assert "MORE than is allowed: 2 experts" in html
    table = html.partition("<details>")[2]
    assert table.count("<td>") == 48 * 128
    assert "<td>2.5e-01" in table
    assert "✗ gemm" in html
    cells = sum(int(a["width"]) for tag, a in tags.found if tag == "rect" and a.get("class") == "v4" and a["width"] != "1")
    assert cells == 2  # neighbours are one rectangle
    assert "prefers-color-scheme: dark" in html


def test_errors_that_are_no_numbers_can_be_written():
    found = valid(json.loads(large().json()))
    assert found["levels"][0]["errors"]["layer 3"][6] > 1e300
