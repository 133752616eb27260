"""What README and the guides say can be done: every command is run, every link leads somewhere, every option is one."""

import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

from convert.arguments import parser
from convert.cli import main
from scripts.make_checkpoint import make_checkpoint
from tests.adapters.bases import base, weights
from tests.adapters.tiny import adapter, whole

ROOT = Path(__file__).parent.parent
FOLDERS = (
    "",
    "convert/",
    "convert/adapters/",
    "convert/memory/",
    "convert/orbax/",
    "convert/pipeline/",
    "convert/verifier/",
    "layouts/",
    "scripts/",
)
PAGES = {f"{folder}README.md": (ROOT / folder / "README.md").read_text() for folder in FOLDERS}
PAGES["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text()
ELSEWHERE = ("--coordinator", "--distributed", "s3://", "gs://", "FILE.html")
"""Words of commands that need several hosts or a store. They have tests of their own; here they are parsed."""
PLACEHOLDERS = {"--shards S": "--shards 2", "--layout FORM": "--layout fused", "--process-id $I": "--process-id 0", " ...": ""}
FOREIGN = {"--no-deps"}
"""Options of other programs in the pages."""
PATHLESS = ("--families", "--layouts", "--version")
HF = ("hf_dir", "ckpt_in", "ckpt", "ckpt_a", "A", "IN", "CKPT", "in")
FUSED = ("ckpt_b", "B", "OUT", "ckpt_fused", "in_fused")
"""What the pages call a checkpoint of Hugging Face, and what was made of it."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def _blocks(page: str) -> Iterator[str]:
    """Lines of code and spans of it, joined where they are continued; alignment and the words behind a command are gone."""
    text = re.sub(r" &&(?: \\\n)? *", "\n    ", PAGES[page].replace("\\\n", "&\\\n").replace("&\\", "\\"))
    for line in re.findall(r"^ {4,}(.*)$", text, re.M):
        close = re.sub(r"^((?:python -m )?convert --(?!families|layouts)\w+) +", r"\1 ", line.strip())
        yield re.split(r" {2,}", close)[0]
    yield from (re.sub(r"\s+", " ", span) for span in re.findall(r"(?<!`)`([^`]+)`", text))


def _commands(page: str) -> list[str]:
    """Commands that are whole: an action with its paths."""
    found = []
    for block in _blocks(page):
        command = block.removeprefix("python -m ")
        for placeholder, value in PLACEHOLDERS.items():
            command = command.replace(placeholder, value)
        alone = command.startswith("python scripts/make_checkpoint.py") or command.removeprefix("convert ") in PATHLESS
        if alone or _has_paths(command):
            found.append(command)
    return found


def _has_paths(command: str) -> bool:
    words = shlex.split(command)[1:] if command.startswith("convert --") else []
    return len(words) > 1 and bool(parser().parse_args(words).paths)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with what the pages read, under the names that they have for it."""
    root = tmp_path_factory.mktemp("pages")
    with chdir(root):
        for name in HF:
            make_checkpoint(Path(name), family="qwen3_moe", experts=4, layers=1)
        make_checkpoint(Path("mixtral_dir"), family="mixtral", experts=4, layers=1)
        for name in FUSED:
            assert main(["--prefuse", "hf_dir", name, "--quiet"]) == 0
        for name in ("adapter_in", "adapter_a"):
            adapter(Path(name), whole("per-expert"))
        base(Path("base_dir"), weights("float32"))
        for name in ("adapter_b", "adapter_fused"):
            assert main(["--prefuse", "adapter_in", name, "--quiet"]) == 0
        assert main(["--to", "orbax", "hf_dir", "maxtext_dir", "--quiet"]) == 0
    return root


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of it for each page."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "page"))
    return tmp_path / "page"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_taken(page, place, monkeypatch, capsys):
    for command in dict.fromkeys(_commands(page)):
        words = shlex.split(command.replace("/tmp/", f"{place}/"))[1:]
        if any(word in command for word in ELSEWHERE):
            parser().parse_args(words)
            continue
        if words[0].endswith(".py"):
            monkeypatch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            continue
        given = parser().parse_args(words)
        if given.paths and (given.prefuse or given.split or given.merge or getattr(given, "to", None)) and not given.dry_run:
            shutil.rmtree(given.paths[1], ignore_errors=True)
        assert main([*words, "--quiet"]) == 0, f"{command}: {capsys.readouterr()}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", PAGES[page]):
        assert not target or target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]*)\)", PAGES[page]):
        text = (ROOT / page).parent.joinpath(target).read_text() if target else PAGES[page]
        headings = [
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in re.findall(r"^#+ .*", text, re.M)
        ]
        assert anchor in headings, (target, anchor)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CONTRIBUTING.md"])
def test_every_option_of_a_page_is_one(page):
    ours = set(parser()._option_string_actions)
    scripts = "".join(script.read_text() for script in (ROOT / "scripts").glob("*.py"))
    for option in set(OPTION.findall(PAGES[page])) - FOREIGN:
        assert option in ours or f'"{option}"' in scripts, option
