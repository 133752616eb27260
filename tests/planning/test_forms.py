"""What is counted by forms is what is counted target by target, and targets are in the order of what they are read from."""

import itertools
from collections import Counter
from pathlib import Path

import pytest

from convert.options import Choices
from convert.planning.forms import Targets
from convert.planning.planner import make_plan, plan_as_stored
from layouts.tables.families import families_of
from tests import tiny

FAMILIES = {family.name: family for family in families_of("hf")}


def of(name: str):
    reader = tiny.memory(FAMILIES[name])
    fused = tiny.run(reader, "prefuse", layout="per-shard", shards=2, align=8)
    yield "prefuse", reader, make_plan(reader, Path("out"), "prefuse", Choices(layout="per-shard", shards=2, align=8))
    yield "split", fused, make_plan(fused, Path("out"), "split")
    yield "as stored", reader, plan_as_stored(reader, Choices())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_forms_are_all_targets_counted_once(name):
    for action, _, plan in of(name):
        assert isinstance(plan.targets, Targets), action
        told = Counter({(t.role, t.part, t.spec.dtype, t.spec.shape): 0 for t, _ in plan.targets.forms})
        for first, number in plan.targets.forms:
            told[first.role, first.part, first.spec.dtype, first.spec.shape] += number
        assert told == Counter((t.role, t.part, t.spec.dtype, t.spec.shape) for t in plan.targets), action
        assert plan.nbytes == sum(target.spec.nbytes for target in plan.targets)
        firsts = [first.spec.name for first, _ in plan.targets.forms]
        assert firsts == sorted(firsts, key=[target.spec.name for target in plan.targets].index), action


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_targets_are_in_the_order_of_their_first_sources(name):
    for action, reader, plan in itertools.islice(of(name), 2):
        order = list(reader.tensors)
        assert list(plan.targets) == sorted(plan.targets, key=lambda t: (order.index(t.first_source), t.spec.name)), action
