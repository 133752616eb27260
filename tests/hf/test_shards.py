"""Files are made again from a header of any form that is right, and from none that is not."""

import json

import pytest

from convert.hf.shards import file_of, restore
from layouts.tensors import TensorSpec

SPECS = [TensorSpec(name="a.0", dtype="F32", shape=(2, 3)), TensorSpec(name="a.1", dtype="U8", shape=())]
FILE = file_of("model.safetensors", SPECS, {"format": "pt"})
USUAL = FILE.head[8:].decode()
ENTRIES = json.loads(USUAL)
FIRST, SECOND = ENTRIES["a.0"], ENTRIES["a.1"]


@pytest.mark.parametrize(
    "header",
    [USUAL, json.dumps(ENTRIES), json.dumps(dict(reversed(ENTRIES.items()))), USUAL.replace("a.0", "a\\u002e0"), USUAL + "  "],
    ids=["usual", "spaces", "other order", "escapes", "padding"],
)
def test_a_header_of_any_form_is_kept_to_the_byte(header):
    (file,) = restore({FILE.name: header}, SPECS) or ()
    data = 8 + len(header)
    assert file.head == len(header).to_bytes(8, "little") + header.encode()
    assert (file.offsets, file.size) == ({"a.0": data, "a.1": data + 24}, data + 25)


@pytest.mark.parametrize(
    "changed",
    [
        {"a.0": {**FIRST, "dtype": "I32"}},
        {"a.0": {**FIRST, "shape": [3, 2]}},
        {"a.1": {**SECOND, "data_offsets": [25, 26]}},
        {"a.1": {**SECOND, "shape": [1]}},
        {"a.2": {**SECOND, "data_offsets": [25, 26]}},
        {"a.1": None},
    ],
)
@pytest.mark.parametrize("form", [(",", ":"), (", ", ": ")])
def test_a_header_of_other_tensors_restores_nothing(changed, form):
    entries = {name: entry for name, entry in {**ENTRIES, **changed}.items() if entry}
    assert restore({FILE.name: json.dumps(entries, separators=form)}, SPECS) is None


@pytest.mark.parametrize("header", ["", "[]", "{", USUAL[:-9], "\x00"])
def test_what_is_no_header_restores_nothing(header):
    assert restore({FILE.name: header}, SPECS) is None


def test_a_tensor_in_two_files_restores_nothing():
    assert restore({"a.safetensors": USUAL, "b.safetensors": USUAL}, SPECS) is None
