"""JSON that is written quickly is what `json.dumps` writes."""

import json

import pytest

from layouts.disk.written import indented, quoted


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "found",
    [
        {},
        [],
        "",
        0,
        None,
        True,
        1.5,
        {"a": {}, "b": [], "c": (), "d": None, "e": False, "f": -1, "g": 2.5e-7, "h": '\u00e9\u2028\U0001f600"\\\n\x7f'},
        {'"k\n\u00df': [[1, [2, {"x": [3]}]], {}, {"y": {"z": "{[,]}"}}], "t": (1, "2")},
        {"tensors": {f"m.{i}": {"dtype": "BF16", "shape": [i, 2], "xxh3_128": f"{i:032x}"} for i in range(3)}, "n": 10**30},
    ],
)
def test_it_is_the_text_of_the_standard_library(found, step):
    assert indented(found, step) == json.dumps(found, indent=step)


@pytest.mark.parametrize("text", ["", "plain", '"\\/\b\f\n\r\t\x00\x1f\x7f', "\u00e9\u2028\U0001f600\ud800"])
def test_a_text_is_quoted_as_the_standard_library_does(text):
    assert quoted(text) == json.dumps(text)
