"""JSON that is written quickly is what `json.dumps` writes."""

import json

import pytest

from layouts.disk.written import Entries, compact, indented, quoted


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


@pytest.mark.parametrize(
    "values", [[], ["a", '\u00e9"', "c", "d"], [{"0:4": "x", "4:8": "y"}, {}, "c", [1, [2]]], ['null}"', "null", None, "\n  }"]]
)
def test_entries_are_written_like_the_object_that_they_are(values):
    kinds = [{"dtype": "F32", "shape": (2, 3)}, {"dtype": "null}", "shape": []}, {}]
    names, kind = ["m.0", 'n"\u2028', "", "null}"][: len(values)], [0, 2, 1, 0][: len(values)]
    found = Entries(names=names, kind=kind, kinds=kinds, last="digest", values=values)
    plain = {name: {**kinds[at], "digest": value} for name, at, value in zip(names, kind, values, strict=True)}
    for before in ({}, {"b": 1, "c": {"d": []}}):
        assert compact({**before, "e": found, "f": "g"}) == json.dumps({**before, "e": plain, "f": "g"})
        for step in (1, 2):
            assert indented({**before, "e": found, "f": {"g": found}}, step) == json.dumps(
                {**before, "e": plain, "f": {"g": plain}}, indent=step
            )
    assert compact({}) == json.dumps({})
