"""Peak resident memory of an Orbax conversion stays under the bound that the plan prints, however the source is chunked."""

import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import convert
from convert.cli import main
from scripts.make_checkpoint import make_checkpoint
from tests.tiny import cut, store_again

CHILD = """
import sys, convert, convert.orbax.budget, convert.orbax.keeping.keep, convert.orbax.write
convert.orbax.budget.GRAIN, convert.orbax.write.SYNC = {grain}, {grain} << 10
if {anew}:
    convert.orbax.keeping.keep._is_one = lambda reader, name: True
convert.{action}(sys.argv[1], sys.argv[2], memory=int(sys.argv[3]) << 20, jobs=2, **{others})
assert not {{"jax", "orbax"}} & set(sys.modules)
print(next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tmp_path(disk):
    """These are large, and written past the page cache."""
    return disk


def weights(rng, *shape):
    """Compresses as weights do: to four fifths."""
    part = (rng.standard_normal(min(1 << 21, int(np.prod(shape))), dtype=np.float32) / 50).astype(ml_dtypes.bfloat16)
    return np.resize(part, shape)


def make(path, *, layers, embed, mlp, experts=8, chunk=None, zarr3=True):
    rng = np.random.default_rng(0)
    up, down = (experts, layers, embed, mlp), (experts, layers, mlp, embed)
    moe = {"wi_0": weights(rng, *up), "wi_1": weights(rng, *up), "wo": weights(rng, *down)}
    tree = {"params": {"params": {"decoder": {"layers": {"moe_block": moe}}}}}
    args = ocp.tree.from_flat_dict({k: ocp.SaveArgs(chunk_byte_size=chunk) for k in ocp.tree.to_flat_dict(tree)})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=zarr3)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=args if chunk else None))
    return path


def peak(action, source, out, memory, anew=False, grain=1 << 20, **others):
    child = CHILD.format(action=action, anew=anew, grain=grain, others=others)
    command = [sys.executable, "-c", child, str(source), str(out), str(memory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return int(done.stdout)


def check(tmp_path, memory, *, split=True, anew=False, **sizes):
    """The highest peak; `anew`: chunks that could be kept are decoded and written again."""
    source = make(tmp_path / "in", **sizes)
    peaks = [peak("prefuse", source, tmp_path / "out", memory, anew)]
    if split:
        peaks.append(peak("split", tmp_path / "out", tmp_path / "back", memory, anew))
    assert max(peaks) < memory, peaks
    return max(peaks)


@pytest.mark.parametrize(
    "anew", [pytest.param(False, id="kept"), pytest.param(True, id="written anew", marks=pytest.mark.slow)]
)
def test_many_small_chunks(tmp_path, anew):
    sizes = {"embed": 512, "mlp": 1024, "chunk": 1 << 20, "anew": anew}
    peaks = [check(tmp_path / str(layers), 320, layers=layers, **sizes) for layers in (2, 8)]
    assert peaks[1] < peaks[0] + 96, f"{peaks} MiB, where the larger checkpoint has 145 MB more"


def test_a_leaf_of_one_chunk_is_never_decoded_whole(tmp_path):
    small = check(tmp_path / "small", 256, layers=2, embed=2048, mlp=1024)  # 64 MiB a leaf, and a chunk
    large = check(tmp_path / "large", 256, layers=2, embed=2048, mlp=3072, split=False)  # 192 MiB
    assert large < small + 96, f"{small} and {large} MiB, where a leaf has 128 MiB more"


@pytest.mark.slow
def test_a_leaf_of_one_gigabyte_chunk(tmp_path):
    check(tmp_path, 256, layers=8, embed=2048, mlp=4096)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [pytest.param(0, id="experts"), pytest.param(2, id="rows")])
def test_stacks_that_were_saved_on_many_devices_become_hugging_face(axis, tmp_path):
    make_checkpoint(tmp_path / "hf", family="qwen3_moe", experts=16, layers=16, embed=512, mlp=512, values="normal")
    convert.reformat(tmp_path / "hf", tmp_path / "tree", to="orbax")
    store_again(tmp_path / "tree" / "0" / "items", cut(axis, 16))
    memory = 320
    found = peak("reformat", tmp_path / "tree", tmp_path / "out", memory, to="hf")
    assert found < memory, "where the tree has 400 MB"


@pytest.mark.slow
def test_names_of_300_000_chunks(tmp_path):
    source = make(tmp_path / "in", layers=24, embed=512, mlp=1024)  # 600 MB
    peak("prefuse", source, tmp_path / "out", 2048, anew=True, grain=1 << 11)
    assert peak("split", tmp_path / "out", tmp_path / "back", 256, grain=1 << 11) < 180, (
        "in which all names would take 280 more"
    )


def test_the_plan_prints_the_bound_and_says_what_is_too_little(tmp_path, capsys):
    source = make(tmp_path / "in", layers=1, embed=64, mlp=32)
    command = ["--prefuse", str(source), str(tmp_path / "out"), "--quiet", "--memory"]
    assert main([*command, "300MiB", "--dry-run"]) == 0
    printed = float(re.search(r"memory: at most ([0-9.]+) MB", capsys.readouterr().out)[1])
    assert 100 < printed <= 300 * 1.048576
    assert main([*command, "100MiB"]) == 2
    least = int(re.search(r"=100MiB is too little: (\d+) MiB are needed", capsys.readouterr().err)[1])
    assert not (tmp_path / "out").exists()
    assert main([*command, f"{least - 1}MiB"]) == 2
    assert main([*command, f"{least}MiB"]) == 0


def test_a_chunk_that_must_be_decoded_whole_sets_the_least(tmp_path, capsys, monkeypatch):
    source = make(tmp_path / "in", layers=2, embed=2048, mlp=512)  # 32 MiB a leaf
    monkeypatch.setattr("layouts.orbax.codec.zstd", None)
    monkeypatch.setattr("convert.orbax.keeping.keep.ONE", 1 << 20)  # or the chunks would stay as they are
    command = ["--prefuse", str(source), str(tmp_path / "out"), "--quiet", "--memory"]
    assert main([*command, "256MiB"]) == 2
    found = re.search(r"(\d+) MiB are needed: .*w[io]\S* is stored in chunks", capsys.readouterr().err)
    assert main([*command, f"{found[1]}MiB"]) == 0
