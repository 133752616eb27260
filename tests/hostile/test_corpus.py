"""Whatever a checkpoint holds: a documented exit code, in time and in little memory, and nothing touched but the output."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts._forked import Forks
from scripts._sandbox import room, trial
from scripts._sandbox_bases import shared_bases
from tests.hostile.corpus import Batch, batches, variants


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Path:
    """The sound checkpoints, made once for all workers of a run."""
    shared = tmp_path_factory.getbasetemp()
    return shared_bases(shared.parent if shared.name.startswith("popen-") else shared)


@pytest.fixture(scope="session")
def work() -> Iterator[Path]:
    with room() as folder:
        yield folder


def _judge(batch: Batch, forks: Forks, bases: Path, work: Path) -> None:
    found = []
    for variant, command in batch.cases:
        outcome = trial(forks, work / "box", bases / variant.base, variant.change, command, variant.codes)
        found += [f"{variant.name}: {command}: {problem}" for problem in outcome.problems]
    assert not found, "\n".join([f"{len(found)} problems in {len(batch.cases)} cases", *found])


@pytest.mark.parametrize("batch", batches(slow=False), ids=lambda batch: batch.name)
def test_hostile(batch, forks, bases, work):
    _judge(batch, forks, bases, work)


@pytest.mark.slow
@pytest.mark.parametrize("batch", batches(slow=True), ids=lambda batch: batch.name)
def test_hostile_at_length(batch, forks, bases, work):
    _judge(batch, forks, bases, work)


def test_the_corpus_is_large():
    found = variants()
    assert len(found) > 500
    assert len({variant.base for variant in found}) > 10
