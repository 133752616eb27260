"""A shell completes options, and what stands behind them, with the words of the tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

OFFERED = {
    "--pre": {"--prefuse"},
    "--prefuse a b --layout per": {"per-shard"},
    "--prefuse a b --family qwen3_v": {"qwen3_vl_moe"},
    "--split a b --source-layout fused-in-": {"fused-in-out", "fused-in-mlp"},
    "--split a b --source-layout conc": {"concat"},
    "--verify a b --family-b mixt": {"mixtral"},
    "--help ver": {"verify", "version"},
    "--families qwen3_v": {"qwen3_vl_moe"},
    "--prefuse ck": {"ckpt/"},
    "--to ": {"hf", "orbax"},
}
"""What stands there -> what may follow."""


CHILD = """
import io, json, os, sys

import argcomplete

from convert.arguments import parser


class Done(Exception):
    pass


def done(code):
    raise Done


found = {}
for line in json.load(sys.stdin):
    out, whole = io.StringIO(), f"convert {line}"
    os.environ |= {"_ARGCOMPLETE": "1", "COMP_LINE": whole, "COMP_POINT": str(len(whole))}
    try:
        argcomplete.CompletionFinder()(parser(), exit_method=done, output_stream=out)
    except Done:
        found[line] = out.getvalue().split()
print(json.dumps(found))
"""
"""A process of its own, because argcomplete writes to open descriptors."""


def test_a_shell_completes_what_there_is(tmp_path):
    pytest.importorskip("argcomplete")
    (tmp_path / "ckpt").mkdir()
    lines, path = json.dumps(list(OFFERED)), os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(
        command, input=lines, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert {line: {*words} for line, words in json.loads(done.stdout).items()} == OFFERED
