"""What an installation is: which packages a conversion needs, whose packages `convert` and `layouts` are, completion."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import moe_convert
import pytest

from scripts.make_checkpoint import make_checkpoint

ROOT = Path(__file__).parents[2]
LIGHT = ("einops", "ml_dtypes", "numpy", "safetensors", "tqdm", "xxhash")
"""What a machine needs that only converts, inspects and hashes safetensors."""
ORBAX = ("tensorstore", "zstandard")
"""What it needs besides for Orbax checkpoints and stores."""
EXTRAS = ("completion", "s3", "tokamax")
WITH_THEM = {"absl", "botocore", "flax"}
"""What is imported where somebody has installed an extra, with what comes along, or has arrays of flax."""
ONLY = """
import importlib.metadata, sys
from importlib.machinery import PathFinder
allowed = set(sys.argv.pop(1).split(","))
class Only:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if path is None else None
        installed = spec and spec.origin and "site-packages" in spec.origin
        if installed and name not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Only)
from moe_convert import main
sys.exit(main())
"""
"""A Python that has no other packages installed than those that are named first."""


def light(folder: Path, packages: tuple[str, ...], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ONLY, ",".join(packages), *words]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'convert' / 'entry'}"},
    )


def test_to_convert_safetensors_takes_few_packages(tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=4, layers=1)
    for words in (
        ["--inspect", "in"],
        ["--prefuse", "in", "fused", "--progress", "bar"],
        ["--split", "fused", "back"],
        ["--digest", "in", "fused"],
        ["--verify", "fused"],
        ["--verify", "in", "fused", "--no-gemm"],
    ):
        done = light(tmp_path, LIGHT, *words)
        assert done.returncode == 0, (words, done.stderr)
    done = light(tmp_path, LIGHT, "--to", "orbax", "in", "tree")
    before, problem = done.stderr.splitlines()
    assert (done.returncode, before.endswith(" free")) == (2, True)
    assert problem.startswith("convert: this needs the package tensorstore, which is not installed here")
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "in" / "config.json").read_bytes()


@pytest.mark.slow
def test_a_light_install_is_as_the_guide_says(tmp_path):
    """A new environment with the two commands of the guide, and nothing else in it: metadata of others is missing, too."""
    guide = (ROOT / "convert" / "README.md").read_text().partition("## A light install")[2]
    command = next(line.strip() for line in guide.splitlines() if line.startswith("    pip install"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "light"], check=True)
    shutil.copytree(
        ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".git", "__pycache__", "tests", "build", ".*_cache")
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = f"{tmp_path / 'light' / 'bin'}:{env['PATH']}"
    subprocess.run(["bash", "-ec", command], cwd=tmp_path / "source", env=env, check=True, capture_output=True)
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=4, layers=1)
    for words in (
        "--inspect in",
        "--prefuse in fused",
        "--split fused back",
        "--verify in back --no-gemm",
        "--verify in fused --no-gemm --json",
        "--verify fused",
        "--digest in fused",
    ):
        done = subprocess.run(["convert", *words.split()], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.slow
def test_to_convert_to_orbax_takes_two_more(tmp_path):
    make_checkpoint(tmp_path / "in", family="qwen3_moe", experts=4, layers=1)
    for words in (["--to", "orbax", "in", "tree"], ["--prefuse", "tree", "fused"], ["--to", "hf", "tree", "back"]):
        done = light(tmp_path, (*LIGHT, *ORBAX), *words)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("name", ["convert", "layouts"])
@pytest.mark.parametrize("how", ["overwritten", "before ours"])
def test_a_foreign_package_of_our_name_is_one_sentence(tmp_path, name, how):
    for part in ("convert", "layouts"):
        shutil.copytree(ROOT / part, tmp_path / "ours" / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "convert" / "entry" / "moe_convert", tmp_path / "ours" / "moe_convert")
    home = tmp_path / ("ours" if how == "overwritten" else "theirs")
    (home / name).mkdir(parents=True, exist_ok=True)
    (home / name / "__init__.py").write_text("print 'python 2'\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'theirs'}:{tmp_path / 'ours'}"}
    code = "import moe_convert, sys; sys.exit(moe_convert.main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--version"], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"convert: {home / name / '__init__.py'} is of another package that is called {name!r}")
    assert "\n" not in done.stderr.strip()


def test_what_is_required_is_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {
        name: project["dependencies"] if name == "" else project["optional-dependencies"][name] for name in ("", *EXTRAS)
    }
    named = {name: {re.match(r"[\w-]+", each)[0].replace("-", "_") for each in those} for name, those in packages.items()}
    text = "\n".join(file.read_text() for folder in ("convert", "layouts") for file in (ROOT / folder).rglob("*.py"))
    found = {one or other for one, other in re.findall(r"^\s*(?:import (\w+)|from (\w+)[\w.]* import)", text, re.M)}
    found -= {*sys.stdlib_module_names, "convert", "layouts", "moe_convert"}
    assert found - named[""] == set().union(*(named[name] for name in EXTRAS)) | WITH_THEM
    assert named[""] <= found


def test_our_own_packages_are_ours():
    assert moe_convert.shadowed() is None


def test_completion_offers_options_and_the_words_of_tables(tmp_path):
    pytest.importorskip("argcomplete", reason="pip install moe-convert[completion]")
    for line, wanted in (("convert --pref", "--prefuse"), ("convert --prefuse a b --layout per", "per-shard")):
        out = tmp_path / "out"
        env = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'convert' / 'entry'}:{os.environ.get('PYTHONPATH', '')}",
            "_ARGCOMPLETE": "1",
            "COMP_TYPE": "9",
            "_ARGCOMPLETE_IFS": "\n",
        }
        env |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
        subprocess.run(
            [sys.executable, "-c", "import moe_convert, sys; sys.exit(moe_convert.main())"],
            env=env,
            check=True,
            capture_output=True,
        )
        assert wanted in out.read_text()
