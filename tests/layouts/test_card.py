"""A section of a model card goes in and out again to the byte, and only one that is ours goes."""

import pytest

from layouts.card import MOST, add, alike, strip, takes_section

FOREIGN = b"<!-- moe-convert 00000000000000000000000000000000 -->\nours?\n<!-- /moe-convert -->\n"
CARDS = {
    "none": None,
    "empty": b"",
    "front matter": b"---\nlicense: mit\n---\n# A model\n",
    "front matter alone": b"---\nlicense: mit\n---",
    "no final newline": b"# A model",
    "many final newlines": b"# A model\n\n\n",
    "CRLF": b"---\r\nlicense: mit\r\n---\r\n# A model\r\n",
    "BOM": b"\xef\xbb\xbf---\nlicense: mit\n---\n# A model\n",
    "rules in the body": b"---\nlicense: mit\n---\n# A model\n\n---\nmore\n---\n",
    "front matter that is no YAML": b"---\nlicense: [mit\n---\n",
    "front matter without an end": b"---\nlicense: mit\n",
    "an unfinished comment": b"<!-- moe-convert ",
    "a foreign section": b"text\n\n" + FOREIGN,
    "nothing but a foreign section": FOREIGN,
    "a section that was copied from a fused one": add(b"# Another\n", "ours\n"),
    "nothing but a section": add(None, "ours\n"),
    "many beginnings": b"\n\n<!-- moe-convert " * 1000,
    "the end alone": b"<!-- /moe-convert -->\n",
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_section_goes_in_and_out(card):
    made = add(card, "## one\n")
    assert b"\n---" not in made[len(card or b"") :], "it would end front matter that has no end"
    assert made.startswith(card or (b"<!-- " if card is None else b"\n\n<!-- "))
    assert b"## one\n" in made
    assert strip(made) == card
    assert add(strip(made), "## other\n") == add(card, "## other\n")
    assert alike(made, card)
    assert alike(card, made)
    assert alike(made, add(card, "## other\n"))


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_an_edit_is_seen_and_stays(card):
    made = add(card, "## one\n")
    glued = [made.replace(b"\n<!-- m", b"<!-- m")] if card is not None else []
    for edited in (b"x" + made, made.replace(b"## one", b"## two"), *glued):
        assert not alike(edited, card), edited
    assert strip(made + b"more\n") == (card or b"") + b"more\n"
    assert not alike(made + b"more\n", card)


def test_what_takes_a_section():
    assert takes_section(None)
    assert takes_section("é".encode())
    assert takes_section(b" " * MOST)
    assert not takes_section(b" " * (MOST + 1))
    assert not takes_section("é".encode("latin1"))
    assert not takes_section("text".encode("utf-16"))
