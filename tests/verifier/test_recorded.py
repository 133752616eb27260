"""Recorded digests are named where they are, and believed if the user says so and nothing speaks against them."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import convert
from convert.cli import main
from convert.commit import recorded
from convert.commit.manifest import NAME, seal_of
from layouts.hf import HFReader
from scripts.make_checkpoint import make_checkpoint

UNREAD = "EQUAL (bits by recorded digests, not read)"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    make_checkpoint(root / "in", family="qwen3_moe", experts=4, embed=16, mlp=16, layers=2, shard=8_000)
    convert.prefuse(root / "in", root / "fused")
    convert.prefuse(root / "in", root / "shard", layout="per-shard", shards=2, align=8)
    convert.prefuse(root / "in", root / "tree", to="orbax")
    for name in ("again", "other"):
        convert.split(root / "fused", root / name)
    convert.prefuse(root / "again", root / "made", layout="per-shard", shards=2)
    return root


def level(verdict):
    return next((each for each in verdict.levels if each.name == "recorded"), None)


@pytest.mark.parametrize(
    ("names", "says", "read"),
    [
        ("in fused", "the manifest of {fused} has digests of the tensors of {in}, of which it was made: 45 of 45", {"in"}),
        ("fused in", "the manifest of {fused} has digests of the tensors of {in}, of which it was made: 45 of 45", {"in"}),
        ("again made", "the manifest of {made} has digests of the tensors of {again}, of which it was made: 45 of 45", set()),
        ("again other", "both manifests have digests of the same tensors: 45 of 45", set()),
    ],
)
def test_they_are_named_and_believed_if_the_user_says_so(root, monkeypatch, names, says, read):
    paths = [root / name for name in names.split()]
    seen, inner = set(), HFReader.read
    monkeypatch.setattr(HFReader, "read", lambda self, *given: (seen.add(self.path.name), inner(self, *given))[1])
    says = says.format(**{name: root / name for name in ("in", "fused", "made", "again")})
    plain = convert.verify(*paths, gemm=False)
    assert level(plain).state == "not run"
    assert level(plain).why == f"{says}; bytes are compared all the same, unless --trust-digests is given"
    assert (plain.summary, seen) == ("EQUAL", set(names.split()))
    seen.clear()
    found = convert.verify(*paths, gemm=False, trust_digests=True)
    assert level(found).covered.startswith(f"{says}; ")
    assert (found.summary, seen) == (UNREAD, read)
    assert [each.name for each in found.levels if each.state == "equal"] == ["recorded", "files"]
    assert "covered   the manifest" in str(found) or "covered   both manifests" in str(found)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        ("fused shard", "no manifest has digests of the tensors of the other side"),
        ("fused again", "the manifest of .*again has digests of the tensors of .*fused, of which it was made: 21 of 25"),
        ("in tree", "the manifest of .*tree has digests of the tensors of .*in, of which it was made: 0 of"),
        ("fused tree", "no manifest has"),
    ],
)
def test_what_they_do_not_cover_is_compared_bit_for_bit(root, names, why):
    """Also two layouts whose tensors have the same names and shapes."""
    verdict = convert.verify(*(root / name for name in names.split()), gemm=False, trust_digests=True)
    assert verdict.summary == "EQUAL"
    assert [each.state for each in verdict.levels if each.name in ("exact", "others")] == ["equal"] * 2
    assert re.match(why, level(verdict).why)
    assert level(verdict).why.endswith("; bytes are compared")


def test_what_the_user_says_of_a_layout_is_in_no_record(root):
    verdict = convert.verify(root / "in", root / "fused", gemm=False, trust_digests=True, family="qwen3_moe")
    assert level(verdict).why.startswith("no manifest has digests")
    assert verdict.summary == "EQUAL"


def test_without_a_manifest_there_is_no_such_level(root):
    assert level(convert.verify(root / "in", root / "in", gemm=False, trust_digests=True)) is None


def rewritten(change):
    def apply(path):
        found = json.loads((path / NAME).read_text())
        sealed = change(found)
        (path / NAME).write_text(json.dumps({**found, "xxh3_128": seal_of(found)} if sealed else found))

    return apply


def flipped(keep):
    def apply(path):
        for file in sorted(path.glob("*.safetensors")):
            times = os.stat(file)
            data = np.memmap(file, np.uint8, "r+")
            data[-1] ^= 1
            data.flush()
            later = os.stat(path / NAME).st_mtime_ns + 1
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns if keep else later))

    return apply


def edited(path):
    times = os.stat(path / "config.json")
    text = (path / "config.json").read_text().replace("\n", "\n ", 1)
    (path / "config.json").write_text(text)
    os.utime(path / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))


def other_digest(found):
    found["sources"][min(found["sources"])] = "0" * 32
    return True


HOSTILE = {
    "digests that were edited": (rewritten(lambda found: not other_digest(found)), f"{NAME} is not what was written"),
    "digests that were edited, with a new seal": (rewritten(other_digest), "has another digest than the recorded one"),
    "a digest less": (rewritten(lambda found: bool(found["sources"].popitem())), "of which it was made: "),
    "a digest of nothing": (
        rewritten(lambda found: bool(found["sources"].update({min(found["sources"]): {"0:1": "0"}}) or 1)),
        "of which it was made: ",
    ),
    "digests that are none": (rewritten(lambda found: bool(found.update(sources=[3]) or 1)), "not a manifest of this version"),
    "tensors of another type": (
        rewritten(lambda found: bool(found["tensors"][min(found["tensors"])].update(dtype="F64") or 1)),
        "is of other tensors",
    ),
    "a file that was written later": (flipped(keep=False), f"was written after {NAME}"),
    "another size": (edited, "config.json has "),
}

SEEN = ("a file that was written later", "digests that were edited", "digests that are none")
"""Those in which levels meet a difference: weights, or a manifest that is not what was written."""


@pytest.mark.parametrize("case", HOSTILE)
def test_whatever_speaks_against_a_manifest_makes_bytes_decide(root, tmp_path, case):
    change, why = HOSTILE[case]
    shutil.copytree(root / "fused", tmp_path / "out")
    change(tmp_path / "out")
    wanted = convert.verify(root / "in", tmp_path / "out", gemm=False)
    found = convert.verify(root / "in", tmp_path / "out", gemm=False, trust_digests=True)
    assert why in level(found).why
    assert level(found).why.endswith("; bytes are compared")
    assert [each for each in found.levels if each.name != "recorded"] == [
        each for each in wanted.levels if each.name != "recorded"
    ]
    assert found.outcome == ("DIFFERENT" if case in SEEN else "EQUAL")


def test_one_side_that_is_read_is_seen(root, tmp_path):
    """The input has no manifest: it is hashed, whatever its times say; and what differs is told by the bytes."""
    shutil.copytree(root / "in", tmp_path / "in")
    for file in (tmp_path / "in").glob("*.safetensors"):
        data = np.memmap(file, np.uint8, "r+")
        data[-1] ^= 1
    found = convert.verify(tmp_path / "in", root / "fused", gemm=False, trust_digests=True)
    assert "has another digest than the recorded one" in level(found).why
    assert found.outcome == "DIFFERENT"


def test_it_says_no_more_than_that(root, tmp_path, capsys):
    """A bit that fell over on the disk is not seen, for the time of the file is as it was: so it is nowhere called equal."""
    shutil.copytree(root / "fused", tmp_path / "out")
    flipped(keep=True)(tmp_path / "out")
    given = ["--verify", str(root / "in"), str(tmp_path / "out"), "--no-gemm", "--quiet"]
    assert main(given) == 1
    capsys.readouterr()
    assert main([*given, "--trust-digests", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert found["verdict"] == UNREAD
    assert found["not_run"].keys() == {"exact", "others"}
    assert (found["self_test"], found["counts"].endswith(f"{tmp_path / 'out'} was not")) == ([], True)


def test_usage(root, capsys):
    two = [str(root / "in"), str(root / "fused"), "--quiet"]
    assert main(["--verify", *two, "--trust-digests", "--self-test"]) == 2
    assert "has none to flip" in capsys.readouterr().err
    assert main(["--verify", two[1], "--trust-digests", "--quiet"]) == 2
    assert "name a second one" in capsys.readouterr().err


def test_a_manifest_is_read_once_for_all_levels(root, monkeypatch):
    seen, inner = [], recorded.read
    monkeypatch.setattr(recorded, "read", lambda path: (seen.append(path.name), inner(path))[1])
    assert convert.verify(root / "again", root / "other", gemm=False).equal
    assert sorted(seen) == ["again", "other"]
