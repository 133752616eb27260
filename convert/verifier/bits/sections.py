"""Where the rows of several tensors are in the one that holds them in turns, written once more for the verifier.

In: the sizes of sections. Out: positions. It never reads, and does not use the code that converts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.language.sections import Turns


def positions(turns: Turns, tensor: int) -> NDArray[Any]:
    """For each row of a tensor its place in the joined one: this is laid out as (groups, rows of a group) and cut apart."""
    lengths = [length for part in turns.parts for length in part]
    every = np.arange(turns.groups * sum(lengths)).reshape(turns.groups, -1)
    sections = iter(np.split(every, np.cumsum(lengths)[:-1], axis=1))
    own = [[next(sections).ravel() for _ in part] for part in turns.parts]
    return np.concatenate(own[tensor])


def stretches(turns: Turns, tensor: int) -> list[range]:
    """The same, as ranges that follow one another in the tensor."""
    places = positions(turns, tensor)
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [range(int(run[0]), int(run[-1]) + 1) for run in runs]
