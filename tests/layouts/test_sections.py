"""Sections of unequal length, against what NumPy makes of them: cut, reshaped, put side by side."""

import itertools

import numpy as np
import pytest

from layouts.language.sections import ROWS, TENSOR, Sections

QKVZ, BA = "a: a m + a m + b y | b y", "a: b | b"
SIZES = [
    (text, dict(zip("abmy", (a, a * times, m, y), strict=True)))
    for text, a, times, m, y in itertools.product((QKVZ, BA, "a: a + b m | a y | b"), (1, 2, 3), (1, 2), (1, 3), (1, 2))
]


def by_numpy(text: str, sizes: dict[str, int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Each tensor with the numbers of its rows, counted over all tensors, and the joined one with the same."""
    start, tensors, parts = 0, [], []
    for each in text[3:].split(" | "):
        lengths = [int(np.prod([sizes[axis] for axis in section.split()])) for section in each.split(" + ")]
        tensors.append(np.arange(start, start + sum(lengths)))
        parts += [part.reshape(sizes["a"], -1) for part in np.split(tensors[-1], np.cumsum(lengths)[:-1])]
        start += sum(lengths)
    return tensors, np.concatenate(parts, axis=1).ravel()


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_every_row_has_one_place_on_the_other_side(step):
    """For all small sizes, in strips of any length: both ways are what NumPy says, and so inverses of one another."""
    for text, sizes in SIZES:
        turns = Sections(text).of(sizes)
        tensors, joined = by_numpy(text, sizes)
        assert [turns.size(number) for number in range(len(tensors))] == [len(each) for each in tensors]
        assert turns.total == len(joined)
        filled = np.full(len(joined), -1)
        for start in range(0, len(joined), step):
            for target, source in turns.boxes(range(start, min(start + step, len(joined))), None):
                into, of = (slice(box[ROWS].start, box[ROWS].stop) for box in (target, source))
                assert (filled[into] == -1).all()
                filled[into] = tensors[source[TENSOR].start][of]
        assert np.array_equal(filled, joined)
        for number, wanted in enumerate(tensors):
            found = [
                joined[source[ROWS].start : source[ROWS].stop]
                for start in range(0, len(wanted), step)
                for _, source in turns.boxes(range(start, min(start + step, len(wanted))), number)
            ]
            assert np.array_equal(np.concatenate(found), wanted)


def test_the_verifier_finds_the_same_rows_in_its_own_way():
    from convert.verifier.bits.stored import positions, stretches

    for text, sizes in SIZES:
        turns = Sections(text).of(sizes)
        tensors, joined = by_numpy(text, sizes)
        for number, wanted in enumerate(tensors):
            assert np.array_equal(joined[positions(turns, number)], wanted)
            assert np.array_equal(np.concatenate([joined[rows.start : rows.stop] for rows in stretches(turns, number)]), wanted)


@pytest.mark.parametrize("text", ["a: b", "a b | b", "a: b | ", "a: b + | b", "ab: b | b", "a: b c1 | b", ""])
def test_what_is_no_sections(text):
    with pytest.raises(ValueError, match="sections"):
        Sections(text)


@pytest.mark.parametrize("sizes", [{"a": 2, "b": 3}, {"a": 0, "b": 0}, {"a": -1, "b": -1}])
def test_sizes_that_do_not_divide(sizes):
    with pytest.raises(ValueError, match="do not divide"):
        Sections(BA).of(sizes)
