"""Runs that are found once for all tensors of a way are those that each tensor has by itself."""

from pathlib import Path

import pytest

from convert.engine.runs import Runs, runs
from convert.options import Choices
from convert.planning.planner import make_plan
from layouts.tables.families import FAMILIES
from tests.tiny import memory, run

FORMS = {family.name: family for family in FAMILIES if family.name in ("qwen3_moe", "mixtral", "gpt_oss", "llama4", "maxtext")}
LAYOUTS = ["concat", "transformers", "vllm", "flashinfer", "interleaved", "per-shard", "fused-moe"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_found_once_is_what_each_tensor_has(name, layout):
    source, choices = memory(FORMS[name], n=8), Choices(layout=layout, shards=2)
    plans = [make_plan(source, Path("out"), "prefuse", choices, idle=True)]
    if any(target.moved for target in plans[0].targets):
        plans.append(make_plan(run(source, "prefuse", layout=layout, shards=2), Path("out"), "split", Choices()))
    for plan in plans:
        kept = Runs()
        for target in plan.targets:
            assert kept.of(target, target.way.whole) == runs(target, target.way.whole), target.spec.name


def test_layers_that_are_alike_share_a_way_and_lie_in_its_source_one_behind_the_other():
    reader = run(memory(FORMS["mixtral"], layers=(0, 1)), "prefuse", layout="vllm")
    plan = make_plan(reader, Path("out"), "split", Choices())
    wi = [target for target in plan.targets if target.role == "wi"]
    kept = Runs()
    found = [each for target in wi for each in kept.of(target, target.way.whole) or ()]
    assert len({id(target.way) for target in wi}) == 1
    assert len(found) == len(wi) == 48
    for source in {each.source for each in found}:
        starts = sorted(each.start for each in found if each.source == source)
        assert starts == [number * wi[0].spec.nbytes for number in range(24)]
