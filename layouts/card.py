"""What a model card (`README.md`) says of our conversion: one section, put in and taken out to the byte. Pure.

In: the bytes of a card, the text of a section. Out: bytes. It never opens a file.

The section comes last, so that front matter stays where it is. Its first line holds a digest of the rest: what somebody has
edited, or has written that only begins as ours does, is no section of ours, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

CARD = "README.md"
MOST = 1 << 20
"""Bytes of a card that gets a section; those of models have some 10 kB."""
SECTIONS = 8
"""Sections at most that are looked for in a card; one that is saved again by others and prefused again has two."""
_BEGIN, _CLOSE, _END = b"<!-- moe-convert ", b" -->\n", b"<!-- /moe-convert -->\n"
_BETWEEN = b"\n\n"
"""Stands between a card and the section, however the card ends; a section that is the whole card has nothing before it."""


def add(card: bytes | None, section: str) -> bytes:
    """A card with a section behind it; None is no card at all."""
    body = section.encode()
    before = b"" if card is None else card + _BETWEEN
    return before + _BEGIN + _digest(body) + _CLOSE + body + _END


def strip(card: bytes | None) -> bytes | None:
    """The card without its last section: what `add` was given, and what somebody has put behind it; None if that is nothing."""
    if card is None:
        return None
    stop = len(card)
    while (start := card.rfind(_BEGIN, 0, stop)) >= 0:
        if (end := _end(card, start, stop)) and (not start or card[:start].endswith(_BETWEEN)):
            kept = card[: max(0, start - len(_BETWEEN))] + card[end:]
            return kept if start or kept else None
        stop = start
    return card


def alike(one: bytes | None, other: bytes | None) -> bool:
    """Whether two cards are the same but for sections of ours at their ends."""
    return not set(_stripped(one)).isdisjoint(_stripped(other))


def _stripped(card: bytes | None) -> Iterator[bytes | None]:
    """The card, and what it is without one section, without two, and so on."""
    for _ in range(SECTIONS):
        yield card
        card = strip(card)


def takes_section(card: bytes | None) -> bool:
    """Whether a section may be added: to text of a card's size."""
    try:
        return card is None or (len(card) <= MOST and card.decode() is not None)
    except UnicodeDecodeError:
        return False


def _end(card: bytes, start: int, stop: int) -> int:
    """Where the section that begins at `start` ends, before `stop`; 0 if it is none of ours."""
    body = start + len(_BEGIN) + 32 + len(_CLOSE)
    end = card.find(_END, body, stop)
    head = _BEGIN + _digest(card[body:end]) + _CLOSE if end >= 0 else b""
    return end + len(_END) if head and card[start:body] == head else 0


def _digest(body: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(body).encode()
