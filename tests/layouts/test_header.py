"""Headers that are read as columns: only such as the format's own parser takes, and with what it finds."""

import itertools
import json
import math
import random
from contextlib import nullcontext

import pytest

from layouts.hf.header import _read, metadata_of, plain
from layouts.tensors import DTYPES, itemsize

ONE = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
TWO = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2,3],"data_offsets":[4,10]}}'
METADATA = '{"__metadata__":{"format":"pt","moe_layout":"{\\"version\\": 1}"},' + TWO[1:]
WORDS = [
    *(
        "0",
        "1",
        "4",
        "10",
        "-",
        "00",
        "18446744073709551616",
        "1.0",
        "1e1",
        "NaN",
        "null",
        "true",
        " ",
        "\n",
        "\0",
        "\x7f",
        "é",
    ),
    *(
        '"',
        "\\",
        "\\u0061",
        "\\ud800",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        "F32",
        "F4",
        "U8",
        '"a"',
        "[0,4]",
        "[4,4]",
        "[]",
        '"x":1,',
    ),
    *('"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', '"__metadata__":{"a":"b"},', '"__metadata__":', '"shape":[1],'),
]
"""What mutations put in the place of a part of a header."""


@pytest.mark.parametrize("text", [ONE, ONE + "     ", TWO, METADATA])
def test_columns_are_what_the_library_writes(text):
    assert plain(text.encode())


def test_every_element_type_is_read_as_the_parser_reads_it(tmp_path):
    shapes, at, entries = [(2, 3), (), (0, 7)], 0, {}
    for code, shape in itertools.product(DTYPES, shapes):
        size = math.prod(shape) * itemsize(code)
        entries[f"{code}.{len(entries)}"] = {"dtype": code, "shape": shape, "data_offsets": [at, at := at + size]}
    assert checked(json.dumps(entries, separators=(",", ":")).encode(), tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", ONE[:-1], ONE.replace("{", "[", 1), ONE + "x", "\ufeff" + ONE, ONE.replace("a", "\u0001")),
        *(ONE.replace("a", "__metadata__"), ONE.replace("F32", "F4"), ONE.replace("[1]", "[01]"), ONE.replace("[1]", "[1,]")),
        *(
            ONE.replace("[0,4]", "[0,8]"),
            ONE.replace("[0,4]", "[0,04]"),
            ONE.replace("[0,4]", "[4,8]"),
            ONE.replace("[1]", "[-1]"),
        ),
        *(
            ONE.replace("[0,4]", "[0, 4]"),
            ONE.replace("[1]", f"[{1 << 41},0]"),
            ONE.replace("[1]", f"[{',1' * 65}]".replace("[,", "[")),
        ),
        *(
            TWO.replace('"b"', '"a"'),
            TWO.replace("[4,10]", "[5,11]"),
            TWO.replace("[2,3]", "[3,3]"),
            TWO.replace('"U8",', '"U8","x":0,'),
        ),
        *(METADATA.replace('"pt"', "1"), METADATA.replace("pt", "\\u0000"), METADATA.replace('"format"', '"moe_layout"')),
        *(TWO[:-1] + ',"__metadata__":{}}', '{"__metadata__":{}}', '{"__metadata__":null,' + ONE[1:]),
    ],
)
def test_all_others_are_left_to_the_parser(text):
    assert plain(text.encode()) is None


def test_what_is_no_utf_8_is_left_to_the_parser():
    assert plain(ONE.encode().replace(b"a", b"\xff")) is None


def checked(text: bytes, tmp_path) -> bool:
    """Whether it is taken as columns; if so, after it was seen that the parser takes it and finds the same."""
    if (got := plain(text)) is None:
        return False
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(got.nbytes))
    known = _read(file, text, nullcontext(file))
    assert list(got.tensors.items()) == list(known.tensors.items())
    assert (got.nbytes, got.metadata, got.begins.tolist()) == (known.nbytes, known.metadata, known.begins.tolist())
    return True


def mutant(rng: random.Random, text: str) -> str:
    """A header with up to three parts cut out, repeated or replaced, most of them where texts and numbers begin or end."""
    for _ in range(rng.choice([1, 1, 2])):
        places = [at for at, letter in enumerate(text) if letter in '"{}[],:'] or [0]
        start = min(len(text), rng.choice(places) + rng.randint(0, 1))
        stop = min(len(text), start + rng.choice([0, 1, 1, 2, 5, 30]))
        new = rng.choice([*WORDS, "", text[start:stop] * 2])
        text = text[:start] + new + text[stop:]
    return text


def test_mutants_that_are_taken_are_those_that_the_parser_takes(tmp_path):
    rng = random.Random(0)
    texts = [mutant(rng, [ONE, TWO, METADATA][number % 3]).encode("utf-8", "surrogatepass") for number in range(5_000)]
    assert sum(checked(text, tmp_path) for text in set(texts)) > 50


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ('{"__metadata__":{"format":"pt"},"a":{}}', {"format": "pt"}),
        ('{"__metadata__":{"format":"p\\u0074","x":"}"} , "a":{}}', {"format": "pt", "x": "}"}),
        ('{"__metadata__": {"format": "pt"}}', {"format": "pt"}),
        ('{ "a":{}, "__metadata__" : {"format":"pt"}}', {"format": "pt"}),
        ('{"a":{},"\\u005f_metadata__":{"format":"pt"}}', {"format": "pt"}),
        ('{"a":{"dtype":"__metadata__"}}', {}),
        ('{"__metadata__":null,"a":{}}', {}),
        ('{"__metadata__":{}}', {}),
        ('{"a\\"__metadata__":{}}', {}),
        ("{}", {}),
    ],
)
def test_what_a_header_says_of_itself_is_found_wherever_it_stands(header, says):
    assert metadata_of(header) == says == (json.loads(header).get("__metadata__") or {})
