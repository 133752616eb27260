"""Options are defined once: signatures, the command line and type checkers say the same."""

import inspect
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

import convert
from convert.arguments import ACTIONS, parser
from convert.cli import main
from convert.options import Choices, Running, Verification
from convert.options.keywords import (
    Digesting,
    Loading,
    Merging,
    Planning,
    Prefusing,
    Reformatting,
    Saving,
    Splitting,
    Syncing,
    Verifying,
    options_of,
)
from convert.options.option import complete, named
from convert.run import check
from convert.version import TOOL

ROOT = Path(__file__).parents[1]
WORDS = {"memory", "max_shard_size", "layers", "experts", "mesh", "base", "sharding"}
"""Options that take a word, such as `2GiB`, besides what they become; or a path besides its words."""
CLIENT = """
from pathlib import Path

import jax
import numpy as np

import convert

report = convert.prefuse("in", "out", layout="per-shard", shards=8, memory="2GiB")
report = convert.split(source="in", out="out", keep_chunks=True)
report = convert.merge("adapter", Path("out"), base=Path("base"), from_writer="peft-0.18")
report = convert.reformat("in", "out", to="orbax", scan_axis=0)
verdict = convert.verify("in", "out", layers=[0, 3], gemm=False)
print(report.seconds + 1, verdict.equal, report.to_dict()["plan"], verdict.to_dict()["levels"])
plan = convert.plan("in", "out", prefuse=True, dequantize="bf16")
print(plan.nbytes + 1, plan.to_dict()["tensors"], convert.__version__.split("."))
found = convert.inspect("in", family="mixtral")
print([block.experts + 1 for block in found.blocks], found.problem and found.problem.exit_code, found.to_dict())
print(convert.digest("in").model.sha256.upper(), convert.digest("in", memory="1GiB").to_dict())
params = convert.load("in", layout="concat", names="maxtext", dtype=np.float32, memory=2 << 30)
params = convert.load("in", names=("hf", str.upper))
params = convert.load(Path("in"), layout=None, names=str.upper, lazy=True, progress=lambda done: None)
saved = convert.save(params, "new", like="in", layout="concat", overwrite=True)
level: convert.Level = verdict.levels[0]
written: convert.Report = saved
print(written.written, level.state, {**params}.keys())
sync = convert.sync_plan(params, params, layout="per-shard", shards=8, source_names="hf", config={"model_type": "mixtral"})
served: dict[str, jax.Array] = sync(params)
step = sync.jitted(donate=True)
fused = convert.prefuse_params(params, layout="concat", names={"wi_0": "gate"}, donate=True)
apart = convert.split_params(fused, convert.layout_of(params, layout="concat"), sizes={"e": 8})
try:
    convert.load("in")
except convert.ConvertError as error:
    print(error.exit_code + 1)
"""
WRONG = {
    "convert.prefuse('in', 'out', sharts=8)": 'Unexpected keyword argument "sharts"',
    "convert.prefuse('in', 'out', shards='eight')": 'incompatible type "str"',
    "convert.prefuse(3, 'out')": 'incompatible type "int"; expected "str | Path"',
    "convert.split('in', 'out', layout='concat')": 'Unexpected keyword argument "layout"',
    "convert.reformat('in', 'out')": 'Missing named argument "to"',
    "convert.reformat('in', 'out', to='gguf')": "expected \"Literal['hf', 'orbax']\"",
    "convert.merge('in', 'out')": 'Missing named argument "base"',
    "convert.merge('in', 'out', base='b', layout='concat')": 'Unexpected keyword argument "layout"',
    "convert.verify('in', 'out', overwrite=True)": 'Unexpected keyword argument "overwrite"',
    "convert.inspect('in', memory=1)": 'Unexpected keyword argument "memory"',
    "convert.load('in', names='torch')": 'Argument "names" to "load" has incompatible type',
    "convert.load('in', overwrite=True)": 'Unexpected keyword argument "overwrite"',
    "convert.save({}, 'out')": 'Missing named argument "like"',
    "convert.save({}, 'out', like='in', dequantize='bf16')": 'Unexpected keyword argument "dequantize"',
    "convert.sync_plan({}, {}, source_names='torch')": "expected \"Literal['hf', 'maxtext']\"",
    "print(saved.sekonds)": 'has no attribute "sekonds"',
}


@pytest.mark.parametrize(
    ("kinds", "keywords"),
    [
        ((Choices, Running), Prefusing),
        ((Choices,), Planning),
        ((Verification,), Verifying),
    ],
)
def test_keywords_have_the_names_and_types_of_the_definitions(kinds, keywords):
    wanted = {field.name: get_type_hints(kind)[field.name] for kind in kinds for field in fields(kind)}
    found = get_type_hints(keywords)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name] == wanted[name] or (name in WORDS and set(get_args(found[name])) >= {str}), name


def test_what_only_some_functions_take_is_a_part_of_it():
    everything = get_type_hints(Prefusing)
    for keywords in (Splitting, Merging, Reformatting, Loading, Saving, Syncing):
        assert get_type_hints(keywords).items() <= everything.items()
    assert get_type_hints(Digesting).items() <= get_type_hints(Verifying).items()


@pytest.mark.parametrize(
    "function",
    [
        convert.plan,
        convert.prefuse,
        convert.split,
        convert.merge,
        convert.reformat,
        convert.verify,
        convert.digest,
        convert.load,
        convert.save,
    ],
)
def test_help_shows_every_option_with_its_default_and_sentence(function):
    keywords = {
        "plan": Planning,
        "prefuse": Prefusing,
        "split": Splitting,
        "merge": Merging,
        "reformat": Reformatting,
        "verify": Verifying,
        "digest": Digesting,
        "load": Loading,
        "save": Saving,
        "sync_plan": Syncing,
    }
    parameters = inspect.signature(function).parameters
    for each in options_of(keywords[function.__name__]):
        assert parameters[each.name].default == each.default
        assert f"{each.name}: {each.sentence}." in inspect.getdoc(function)


def test_the_command_line_has_every_option_once():
    lines = [line.strip() for line in parser().format_help().partition("\ndo:")[2].partition("\nexit codes:")[0].splitlines()]
    for keywords in ACTIONS.values():
        for each in options_of(keywords):
            assert sum(each.flag in line.split("  ")[0].replace(",", "").split() for line in lines) == 1, each.flag


def test_defaults_are_what_the_options_take():
    for kind in (Choices, Running, Verification):
        assert complete(kind, {each.name: each.default for each in named(kind)}) == kind()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"shards": 0}, "shards: 0 is not a positive whole number"),
        ({"shards": True}, "shards: True is not a positive whole number"),
        ({"align": "128x"}, "align: '128x' is not a positive whole number"),
        ({"align": "maxtext-pow3"}, "align: 'maxtext-pow3' is not a positive whole number"),
        ({"layout": 3}, "layout: 3 is not a word"),
        ({"scan": "no"}, "scan: 'no' is neither True nor False"),
        ({"to": "gguf"}, "to: 'gguf' is none of hf, orbax"),
        ({"dequantize": "fp32"}, "dequantize: 'fp32' is none of bf16"),
        ({"memory": "2 lots"}, "memory: '2 lots' is not a size such as 512MiB or 5GB"),
        ({"memory": -1}, "memory: -1 is no size above zero"),
        ({"scan_axis": 2}, "scan_axis: 2 is neither 0 nor 1"),
        ({"jobs": 1.5}, "jobs: 1.5 is not a positive whole number"),
        ({"memory": None}, "memory: None is not a size such as 512MiB or 5GB"),
    ],
)
def test_a_wrong_value_is_named_with_its_argument(given, words):
    with pytest.raises(convert.UsageError) as caught:
        convert.prefuse("in", "out", **given)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: convert.prefuse(3, "out"), "source: 3 is not a path"),
        (lambda: convert.split("in", b"out"), "out: b'out' is not a path"),
        (lambda: convert.reformat("in", None, to="orbax"), "out: None is not a path"),
        (lambda: convert.merge("in", "out", base=3), "base: 3 is not a path"),
        (lambda: convert.prefuse("in", "out", base=3), "base: 3 is not a path"),
        (lambda: convert.plan("in", "out", prefuse="yes"), "prefuse: 'yes' is neither True nor False"),
        (lambda: convert.verify("a", 3), "b: 3 is not a path"),
        (lambda: convert.digest(["a"]), "path: ['a'] is not a path"),
        (lambda: convert.inspect(None), "path: None is not a path"),
        (lambda: convert.load(3), "path: 3 is not a path"),
        (lambda: convert.load("in", layout=3), "layout: 3 is not a word"),
        (lambda: convert.save({}, "out", like=None), "like: None is not a path"),
        (lambda: convert.prefuse("in", "out", progress="bar"), "progress: 'bar' is not a function"),
        (lambda: convert.verify("in", "out", processes=2), "processes: 2 is not what convert.connect gives"),
        (lambda: convert.prefuse_params({}, names="hf"), "names: 'hf' is not a mapping"),
        (lambda: convert.split_params({}, "concat", sizes=8), "sizes: 8 is not a mapping"),
        (lambda: convert.sync_plan({}, {}, config="config.json"), "config: 'config.json' is not a mapping"),
    ],
)
def test_what_is_no_option_is_named_too_if_it_is_of_a_wrong_type(call, words):
    with pytest.raises(convert.UsageError) as caught:
        call()
    assert str(caught.value) == words


def test_paths_may_be_anything_that_stands_for_one(tmp_path):
    class Folder:
        def __fspath__(self):
            return str(tmp_path / "nowhere")

    for path in (Folder(), Path(Folder()), str(tmp_path / "nowhere")):
        with pytest.raises(convert.InputError, match="nowhere: no such directory"):
            convert.prefuse(path, tmp_path / "out")
        assert complete(Choices, {"base": path}).base == str(tmp_path / "nowhere")


def test_the_version_is_that_of_the_package_and_of_manifests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert convert.__version__ == project["version"] == TOOL


def test_sizes_are_words_in_python_too():
    assert complete(Running, {"memory": "2GiB"}).memory == 2 << 30
    assert complete(Verification, {"layers": "0,3-5"}).layers == {0, 3, 4, 5}
    assert complete(Verification, {"mesh": {"expert": 4}}).mesh == {"expert": 4}


def test_numbers_of_numpy_are_numbers():
    assert complete(Choices, {"shards": np.int64(8)}).shards == 8
    assert complete(Verification, {"layers": np.arange(2)}).layers == {0, 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--split", "a", "b", "--layout", "concat"],
            "--layout is for --prefuse, not for --split. Did you mean --source-layout?",
        ),
        (["--prefuse", "a", "b", "--report", "x"], "--report is for --verify, not for --prefuse"),
        (["--inspect", "a", "--jobs", "2"], "--jobs is for --prefuse, --split, --merge, --to and --verify, not for --inspect"),
        (
            ["--layouts", "--progress", "bar"],
            "--progress is for --prefuse, --split, --merge, --to, --verify and --digest, not for --layouts",
        ),
        (
            ["--families", "--num-processes", "4"],
            "--num-processes is for --prefuse, --split, --merge, --to and --verify, not for --families",
        ),
        (
            ["--verify", "a", "b", "--dry-run", "--num-processes", "4"],
            "--verify --dry-run tells what one process takes; leave out what is said of several",
        ),
        (
            ["--verify", "a", "b", "--num-processes", "4"],
            "--num-processes and --process-id go with --coordinator HOST:PORT, or with --dry-run",
        ),
        (["--to", "hf", "a", "b", "--shards", "2"], "--shards is for --prefuse, not for --to"),
        (["--families", "--jobs", "2"], "--jobs is for --prefuse, --split, --merge, --to and --verify, not for --families"),
    ],
)
def test_an_option_of_another_action_is_refused(words, said, capsys):
    assert main(words) == 2
    assert capsys.readouterr().err == f"convert: {said}\n"


def test_an_unknown_keyword_is_an_error_of_python():
    with pytest.raises(TypeError, match="sharts"):
        convert.prefuse("in", "out", sharts=8)  # type: ignore[call-arg]


def test_choices_that_do_not_go_together_are_refused():
    with pytest.raises(convert.UsageError, match="did you mean --layout=per-shard"):
        check(Choices(shards=2))


def test_type_checkers_see_the_options(tmp_path):
    client = tmp_path / "client.py"
    client.write_text(CLIENT + "".join(f"{call}\n" for call in WRONG))
    command = [sys.executable, "-m", "mypy", "--strict", str(client)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    first = CLIENT.count("\n") + 1
    assert len(errors) == len(WRONG), done.stdout
    for number, words in enumerate(WRONG.values()):
        assert f"client.py:{first + number}: error: " in errors[number]
        assert words in errors[number]


@pytest.mark.parametrize("name", ["Plan", "Report", "Verdict", "Level"])
def test_what_calls_give_has_a_public_name(name):
    assert getattr(convert, name).__name__ == name
    assert name in convert.__all__
