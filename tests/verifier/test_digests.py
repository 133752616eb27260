"""One checkpoint against its manifest: as many workers as asked for, and what they find is what one finds."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
from layouts.hf import HFReader
from scripts.make_checkpoint import make_checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digests")
    make_checkpoint(root / "in", family="qwen3_moe", experts=4, embed=16, mlp=8, layers=3, shard=8_000)
    for name in ("fused", "damaged"):
        convert.prefuse(root / "in", root / name)
    for file in (root / "damaged").glob("*.safetensors"):
        np.memmap(file, np.uint8, "r+")[-1] ^= 1
    return root


@pytest.mark.parametrize("name", ["fused", "damaged"])
@pytest.mark.parametrize(
    ("words", "workers"), [({"jobs": 1}, 1), ({"jobs": 3}, 3), ({"jobs": 3, "memory": 100 << 20}, 1)], ids=str
)
def test_as_many_workers_as_asked_for_and_memory_holds(root, monkeypatch, name, words, workers):
    """Nobody reads on until as many as wanted do; where there is one, it is this thread, which alone tells progress."""
    read, threads, told = HFReader.read, set(), []
    all_here = threading.Barrier(workers)

    def noted(self, *given):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            all_here.wait(60)
        return read(self, *given)

    def progress(done):
        assert threading.current_thread() is threading.main_thread()
        told.append(done)

    wanted = convert.verify(root / name, jobs=1)
    monkeypatch.setattr(HFReader, "read", noted)
    found = convert.verify(root / name, progress=progress, **words)
    assert found == wanted
    assert found.equal == (name == "fused")
    assert len(threads) == workers
    assert (threading.get_ident() in threads) == (workers == 1)
    files = (root / name).glob("*.safetensors")
    assert sum(told) == sum(array.nbytes for file in files for array in load_file(file).values())


def test_a_tensor_of_another_shape_is_told_once(root, tmp_path):
    shutil.copytree(root / "fused", tmp_path / "other")
    file = min((tmp_path / "other").glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = tensors[name][:-1].copy()
    save_file(tensors, file, {"format": "pt"})
    for jobs in (1, 2):
        digests = next(each for each in convert.verify(tmp_path / "other", jobs=jobs).levels if each.name == "digests")
        assert [line for line in digests.differences if line.startswith(name)] == list(digests.differences)
        assert len(digests.differences) == 1
        assert " and was " in digests.differences[0]
