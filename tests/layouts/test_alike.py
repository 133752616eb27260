"""Names by their form: what is found of columns is what is found name by name."""

import itertools
import random
import re

import pytest

from layouts.language.alike import NUMBER, alike
from layouts.language.template import Template
from layouts.matching.refusal import Refusal
from layouts.tables.families import FAMILIES
from tests.tiny import MemoryReader

PARTS = ["a", "0", "00", "7", "12", "012", "1234567890", "123456789", "w1", "1x", "é", "३", "", "\udcff"]


def by_names(names):
    """The same, one name at a time."""
    found: dict[str, list[tuple[int, list[int]]]] = {}
    for row, name in enumerate(names):
        found.setdefault(NUMBER.sub("#", name), []).append((row, [int(number) for number in NUMBER.findall(name)]))
    return list(found.values())


@pytest.mark.parametrize("odd", [[], ["a.\0.1", "\0"]])
def test_forms_and_numbers_are_those_of_each_name(odd):
    rng = random.Random(0)
    names = [".".join(rng.choice(PARTS) for _ in range(rng.randint(1, 5))) for _ in range(5_000)] + odd
    found = [list(zip(each.rows.tolist(), each.numbers.tolist(), strict=True)) for each in alike(names)]
    if odd:  # each is a form of its own
        assert sorted(itertools.chain(*found)) == sorted(itertools.chain(*by_names(names)))
    else:
        assert found == by_names(names)


@pytest.mark.parametrize("names", [[], [""], ["1"], ["a"], ["1.2", "3.4"]])
def test_few_names(names):
    assert [each.numbers.tolist() for each in alike(names)] == [[numbers for _, numbers in each] for each in by_names(names)]


def test_names_that_share_some_numbers():
    (names,) = alike([f"l.{layer}.e.{expert}" for layer in (3, 1) for expert in range(12)])
    assert [some.numbers[:, 0].tolist() for some in names.by([0])] == [[1] * 12, [3] * 12]
    assert [some.rows.tolist() for some in names.by([])] == [list(range(24))]
    assert len(list(names.by([0, 1]))) == 24


@pytest.mark.parametrize(
    ("text", "uniform"),
    [
        ("{path}.{l}.mlp.experts.{e}.{g:w1,w3}.weight", True),
        ("{path}.wi_{g:0,1}", True),
        ("{path}.layers.0.{e}", False),
        ("{path}.{g:0,1}.x", False),
        ("0.{e}", False),
        ("{path}_{e}.1", False),
    ],
)
def test_a_template_with_a_number_of_its_own_is_asked_of_each_name(text, uniform):
    assert Template(text).uniform == uniform


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_is_refused_depends_on_no_number(family):
    """So one name of a form is enough, in `layouts.matching.sorting`."""
    refusal = Refusal(MemoryReader({}), family)
    assert all(key.uniform for key in (*(key for _, key in refusal.fused), *refusal.others, *refusal.stems))
    assert not re.search(r"\.\d+\.", family.experts)
