"""Kill -9 before and after each named step of the engine, and at random moments: see `scripts/crash_loop.py`."""

import random
from pathlib import Path

import pytest

from scripts.crash_loop import STEPS, Case, Point, check, make_cases, named_points


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> list[Case]:
    return make_cases(tmp_path_factory.mktemp("cases"))


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_named_step_of_an_overwriting_prefuse(forks, cases, tmp_path, step):
    overwriting = cases[2]
    assert overwriting.old
    exchange = step != "os.rename"
    struck = [
        check(forks, overwriting, tmp_path / when, [Point(step=step, when=when, exchange=exchange)])
        for when in ("before", "after")
    ]
    assert all(struck), "the step is not one that a run goes through"


@pytest.mark.slow
def test_killed_between_the_two_renames_where_names_cannot_be_exchanged(forks, cases, tmp_path):
    for overwriting in cases[2:]:
        points = [Point(step="os.rename", when=when, number=n, exchange=False) for n in (1, 2) for when in ("before", "after")]
        for number, point in enumerate(points):
            assert check(forks, overwriting, tmp_path / f"{overwriting.action}{number}", [point])


@pytest.mark.slow
def test_killed_at_random_moments(forks, cases, tmp_path):
    dice = random.Random(7)
    for number in range(6):
        moments = [Point(delay=dice.uniform(0.001, 0.15)) for _ in range(dice.choice((1, 2)))]
        check(forks, dice.choice(cases), tmp_path / str(number), moments)


@pytest.mark.slow
def test_killed_two_hundred_times_at_random_and_at_every_step(forks, cases, tmp_path: Path):
    dice = random.Random()
    seed = dice.randrange(1 << 30)
    dice.seed(seed)
    killed = 0
    work = [(case, [point]) for case in cases for point in named_points()]
    work += [(dice.choice(cases), [Point(delay=dice.uniform(0.001, 0.15))]) for _ in range(200)]
    for number, (case, points) in enumerate(work):
        killed += check(forks, case, tmp_path / str(number), points)
    assert killed > 200, seed
