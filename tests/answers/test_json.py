"""`--json` of every action is one document that its schema takes, and nothing else stands on stdout; errors, too."""

import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path

import jsonschema
import pytest
from referencing import Registry, Resource

import convert
from convert.cli import main
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.bases import base, weights
from tests.adapters.tiny import BF16, adapter, whole

ANSWERS = Path(convert.__file__).parent / "answers"
SCHEMA, VERDICT = (json.loads((ANSWERS / f"{name}.schema.json").read_text()) for name in ("output", "verdict"))
BOTH = Registry().with_resource("verdict.schema.json", Resource.from_contents(VERDICT))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, registry=BOTH)
COMMANDS = {
    "prefuse": (["--prefuse", "hf", "new", "--content"], 0),
    "to": (["--to", "orbax", "hf", "tree"], 0),
    "split": (["--split", "fused", "again"], 0),
    "prefuse again": (["--prefuse", "hf", "fused"], 0),
    "prefuse an adapter": (["--prefuse", "adapter", "adapter-fused"], 0),
    "merge": (["--merge", "adapter", "merged", "--base", "base"], 0),
    "dry-run of a merge": (["--merge", "adapter", "other", "--base", "base", "--dry-run"], 0),
    "dry-run": (["--prefuse", "hf", "other", "--dry-run"], 0),
    "dry-run of an adapter": (["--prefuse", "adapter", "other", "--dry-run"], 0),
    "dry-run of a proof": (["--verify", "hf", "fused", "--dry-run", "--no-gemm"], 0),
    "verify": (["--verify", "hf", "fused", "--no-gemm"], 0),
    "verify what differs": (["--verify", "hf", "other-hf", "--no-gemm", "--no-self-test"], 1),
    "verify alone": (["--verify", "fused"], 0),
    "verify adapters": (["--verify", "adapter", "whole-adapter", "--report", "page.html"], 0),
    "verify an adapter alone": (["--verify", "whole-adapter"], 0),
    "digest": (["--digest", "hf", "orbax"], 0),
    "inspect": (["--inspect", "hf"], 0),
    "inspect a tree": (["--inspect", "orbax"], 0),
    "inspect an adapter": (["--inspect", "adapter"], 0),
    "families": (["--families"], 0),
    "families one": (["--families", "mixtral"], 0),
    "layouts": (["--layouts"], 0),
    "version": (["--version"], 0),
    "prefuse nothing": (["--prefuse", "nowhere", "out"], 3),
    "split nothing": (["--split", "hf", "out"], 4),
    "verify nothing": (["--verify", "hf", "nowhere"], 3),
    "digest nothing": (["--digest", "nowhere"], 3),
    "families none": (["--families", "zigzag"], 2),
    "none": (["a", "b"], 2),
    "prefuse a wrong value": (["--prefuse", "hf", "out", "--jobs", "0"], 2),
    "verify an option that is none": (["--verify", "hf", "hf", "--qqq"], 2),
}
"""What begins with the action that the document names -> the command, and its exit code."""
REFUSED = ("prefuse a wrong value", "verify an option that is none")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("json")
    for kind in ("hf", "orbax"):
        make_checkpoint(root / kind, family="qwen3_moe", format=kind, experts=4, layers=1)
    make_checkpoint(root / "other-hf", family="qwen3_moe", experts=4, layers=1, seed=1)
    convert.prefuse(root / "hf", root / "fused")
    adapter(root / "adapter", whole("per-expert"))
    convert.prefuse(root / "adapter", root / "whole-adapter")
    base(root / "base", weights(BF16))
    return root


@pytest.mark.parametrize("what", COMMANDS)
def test_every_answer_is_one_document_of_the_schema(places, what, monkeypatch, capsys):
    monkeypatch.chdir(places)
    words, code = COMMANDS[what]
    refused = pytest.raises(SystemExit) if what in REFUSED else nullcontext()  # by argparse
    with refused:
        assert main([*words, "--json"]) == code
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    VALIDATOR.validate(found)
    assert (found["action"], found["exit_code"]) == (what.split(" ")[0], code)
    assert (found["error"] is None) == (code < 2)
    if code < 2:
        begins = "convert: compare " if what in ("verify", "verify what differs") else ""
        ends = " free\n" if (found["result"] or {}).get("written") else begins and "here\n"
        assert printed.err.startswith(begins)
        assert printed.err.endswith(ends)
        assert printed.err.count("\n") == bool(ends)
    else:
        assert printed.err == f"convert: {found['error']}\n"


def test_a_run_that_is_interrupted_has_a_document(places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    monkeypatch.setattr("convert.cli.act", lambda _: signal.raise_signal(signal.SIGTERM))
    assert main(["--prefuse", "hf", "new", "--json"]) == 143
    found = json.loads(capsys.readouterr().out)
    VALIDATOR.validate(found)
    assert (found["action"], found["exit_code"]) == ("prefuse", 143)
    assert found["error"] == "interrupted; run the same command again to go on (signal 15)"


def test_what_is_written_is_in_numbers(places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    assert main(["--prefuse", "hf", "counted", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert result["written"] is True
    assert result["plan"]["nbytes"] == convert.plan("hf", "x", prefuse=True).nbytes
    assert main(["--prefuse", "hf", "counted", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["result"]
    assert (again["written"], again["plan"]) == (False, result["plan"])
    assert again["proof"]


def test_in_python_the_same_is_a_dictionary(places, monkeypatch, capsys):
    monkeypatch.chdir(places)

    def printed(*words):
        main([*words, "--json"])
        return json.loads(capsys.readouterr().out)

    for source in ("hf", "adapter"):
        again = f"{source}-in-python"
        written = convert.prefuse(source, again).to_dict()
        there = convert.prefuse(source, again).to_dict()
        said = printed("--prefuse", source, again)["result"]
        assert there | {"seconds": 0} == {n: v for n, v in said.items() if n not in ("verify", "load")} | {"seconds": 0}
        assert written == there | {"written": True, "proof": None} | {
            name: written[name] for name in ("seconds", "resumed", "content_xxh3")
        }
        plan = convert.plan(source, "other", prefuse=True)
        assert plan.to_dict() == printed("--prefuse", source, "other", "--dry-run")["result"]["plan"]
        assert convert.inspect(source).to_dict() == printed("--inspect", source)["result"]
    assert convert.digest("hf").to_dict() == printed("--digest", "hf")["result"]["digests"]["hf"]
    apart = ("--no-gemm", "--no-content", "--no-self-test")
    verdict = convert.verify("hf", "fused", gemm=False)
    assert verdict.to_dict() == json.loads(verdict.json()) == json.loads(json.dumps(verdict.to_dict()))
    assert verdict.to_dict() == printed("--verify", "hf", "fused", *apart)["result"] | {"run": None}
    levels = [json.loads(json.dumps(level.to_dict())) for level in verdict.levels]
    assert levels == verdict.to_dict()["levels"]


def test_what_is_left_out_is_told_tensor_by_tensor(places, tmp_path):
    make_checkpoint(tmp_path / "tree", family="qwen3_moe", format="orbax", experts=4, layers=1, train_state=True)
    shutil.copy(places / "hf" / "config.json", tmp_path / "tree")
    plan = convert.plan(tmp_path / "tree", tmp_path / "out", to="hf", params_only=True)
    assert plan.to_dict()["left_out"] == plan.left_out
    assert set(plan.left_out.values()) == {"--params-only"}


def test_the_schema_refuses_what_is_none():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    sound = {"schema": "output.schema.json", "version": 1, "action": "version", "exit_code": 0, "error": None}
    wrongs = [{"result": {}}, {"result": None}, {"result": {"tool": "1", "python": "3"}, "version": 2}]
    wrongs += [{"action": "verify", "result": {"equal": True}}, {"action": "digest", "result": {"digests": {"hf": {}}}}]
    for wrong in wrongs:
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate({**sound, **wrong})
