"""Of which Hugging Face checkpoint a MaxText tree was made: the family, and the layout that its experts had.

In: the record of a tree, the user's word. Out: `Origin`, or an error where the two disagree. It never goes by names or shapes.

A tree tells neither by itself: `config.json` may name no family that the table knows, and a family may be stored in several
layouts. Layouts are rows of `SOURCES`, by name, so that nothing that a record says becomes a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layouts.errors import InputError, PlanError
from layouts.matching.candidates import ORIGIN, record_of
from layouts.reader import Reader
from layouts.tables.families import families_of
from layouts.tables.maxtext import RULES
from layouts.tables.maxtext_trees import TREES
from layouts.tables.natives import SOURCES

FIRST = "first"
_WORDS = ("layout", "without", "computed", "aside", "names")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What is known of it: the names of a family and of a row of `SOURCES`, and what was left out on the way (`mtp`).

    `computed` is the rule by which values were made others (`layouts.tables.maxtext.RULES`). `aside` is `first` where layers of
    variables that MaxText does not train are stacked along the first axis, and `names` which ones it had, where it may have had
    others (`layouts.tables.maxtext.Tree`).
    """

    family: str | None = None
    layout: str | None = None
    without: str | None = None
    computed: str | None = None
    aside: str | None = None
    names: str | None = None

    @property
    def words(self) -> dict[str, str]:
        """As it stands in a record; nothing if nothing is known."""
        words = {word: getattr(self, word) for word in ("family", *_WORDS)}
        return {word: value for word, value in words.items() if value}


def origin_of(reader: Reader, family: str | None = None) -> Origin:
    """What the record says, and the user's family where the record is silent; nothing of what is no tree.

    Raises:
        InputError: the record is damaged.
        PlanError: it says another family than the user does.
    """
    if reader.format != "orbax":
        return Origin()
    found = record_of(reader).get(ORIGIN, {})
    said = hf_name(family)
    if not isinstance(found, Mapping) or not _is_known(found):
        raise InputError(f"{reader.path}: the record of the layout is damaged: {ORIGIN} is {found!r}")
    stated = found.get("family")
    if stated and said and hf_name(stated) != said:
        raise PlanError(f"{reader.path}: it was made of a checkpoint of family {stated}; do without --family={family}")
    words = {word: found.get(word) for word in _WORDS}
    return Origin(family=stated or said, **words)


def _is_known(found: Mapping[str, Any]) -> bool:
    family, layout = found.get("family"), found.get("layout")
    known = (family is None or hf_name(family) is not None) and (layout is None or layout in list(SOURCES))
    known = known and found.get("without") in (None, "mtp") and found.get("aside") in (None, FIRST)
    known = known and found.get("names") in [None, *(tree.names for trees in TREES.values() for tree in trees if tree.names)]
    return known and found.get("computed") in [None, *(rule.word for rule in RULES.values())]


def hf_name(family: object) -> str | None:
    """The name of a family of Hugging Face by any of its names; None for what is none."""
    return next((f.name for f in families_of("hf") if family == f.name or family in f.model_types), None)
