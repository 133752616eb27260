"""Rows that take turns, as array operations: what the planner's block copies make of them, in every library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.memory.turns import apart, joined
from layouts.language.sections import ROWS, TENSOR, Sections

SIZES = {"a": 2, "m": 3, "b": 4, "y": 2}
TEXTS = ["a: a m + a m + b y | b y", "a: b | b", "b: b y | b m + b | b"]
LIBRARIES = {"numpy": (np, np.asarray), "jax": (jnp, jnp.asarray)}


def by_boxes(arrays, turns, at):
    """The joined array, row by row as files are written."""
    found = np.empty((*arrays[0].shape[:at], turns.total, *arrays[0].shape[at + 1 :]), "i8")
    for into, out_of in turns.boxes(range(turns.total), None):
        rows = [(slice(None),) * at + (slice(box[ROWS].start, box[ROWS].stop),) for box in (into, out_of)]
        found[rows[0]] = arrays[out_of[TENSOR].start][rows[1]]
    return found


@pytest.mark.parametrize("library", ["numpy", pytest.param("jax", marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(text, at, library):
    turns = Sections(text).of(SIZES)
    shapes = [[turns.size(t) if axis == at else size for axis, size in enumerate((2, 3, 5))] for t in range(len(turns.parts))]
    arrays = [1000 * t + np.arange(np.prod(shape)).reshape(shape) for t, shape in enumerate(shapes)]
    ours, made = LIBRARIES[library]
    found = joined([made(array) for array in arrays], turns, at, ours)
    assert np.array_equal(np.asarray(found), by_boxes(arrays, turns, at))
    for t, array in enumerate(arrays):
        assert np.array_equal(np.asarray(apart(found, turns, t, at, ours)), array)


def test_within_one_program():
    turns = Sections(TEXTS[0]).of(SIZES)
    arrays = [np.arange(turns.size(t) * 3.0, dtype="f4").reshape(-1, 3) for t in range(2)]
    found = jax.jit(lambda *each: joined(each, turns, 0, jnp))(*arrays)
    assert np.array_equal(found, by_boxes(arrays, turns, 0))
