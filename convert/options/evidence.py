"""What is known of an adapter beside its tensors: family, sizes of the base, who wrote it.

In: an open adapter, its settings, its record, what the user said. Out: `Known`. It opens the base for names and shapes alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from convert.errors import PlanError, UsageError
from convert.options import Choices, Verification
from layouts.adapters.forms import FORMS
from layouts.adapters.packed import Known
from layouts.adapters.writers import STAMP, Evidence, said, written
from layouts.checkpoint import open_checkpoint
from layouts.disk.files import read_object
from layouts.matching.describe import Description, describe
from layouts.reader import Reader
from layouts.tables.families import FAMILIES

_LIBRARY = re.compile(r"transformers\.models\.([a-z0-9_]+)(?:\..*)?")


def known_of(
    reader: Reader,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    choices: Choices | Verification,
    model: Description | None = None,
) -> Known:
    """Gather what is known; what the user said goes before what the file tells, and must not contradict its record.

    `model` is the base, where it has been opened already.

    Raises:
        UsageError, PlanError: an unknown writer or family, or contradictions.
        InputError: the base cannot be read.
    """
    sizes, of_base = _sizes(model) if model else _base(choices.base) if choices.base else ({}, None)
    stated = {
        "--family": _family(choices.family),
        "--base": of_base,
        "its record": _family(record.get("family")),
        "auto_mapping": _by_class(config),
    }
    found = {who: name for who, name in stated.items() if name}
    if len(set(found.values())) > 1:
        words = ", ".join(f"{who} says {name}" for who, name in found.items())
        raise PlanError(f"{reader.path}: {words}; one of them is not of this adapter")
    family = next(iter(found.values()), None)
    stamp = read_object(reader.path / STAMP) if (reader.path / STAMP).is_file() else {}
    told = written(config, stamp, family)
    user = said(choices.from_writer, family) if choices.from_writer else Evidence()
    form = FORMS.get(str(record.get("layout")))
    if form is not None and form.wrapped and form.rank == 2:
        told = Evidence(grouped=form.grouped, reversed=form.reversed, why="our own record")
        for each in ("grouped", "reversed"):
            if getattr(user, each) not in (None, getattr(told, each)):
                raise PlanError(f"{reader.path}: {user.why} contradicts its record (form {form.name}); leave it out")
        user = Evidence()
    return Known(family=family, sizes=sizes, said=user, told=told)


def _base(path: str) -> tuple[dict[str, int], str]:
    """E, K and N of the base, and its family."""
    with closing(open_checkpoint(path)) as reader:
        if reader.format not in ("hf", "orbax"):
            raise UsageError(f"{path} is an adapter itself; give --base the checkpoint that this one is for")
        return _sizes(describe(reader))


def _sizes(model: Description) -> tuple[dict[str, int], str]:
    """Of the first of its weights; an entirely quantised base has none that tell."""
    group = next((group for group in model.groups if not group.part), None)
    sizes = {axis: group.total(axis) if axis != "e" else group.sizes["e"] for axis in "ekn"} if group else {}
    return sizes, model.family.name


def _family(name: object) -> str | None:
    """The name in the table of what somebody called a family.

    Raises:
        PlanError: it is not in the table.
    """
    if name is None:
        return None
    words = {word: family.name for family in FAMILIES for word in (family.name, *family.model_types)}
    if not isinstance(name, str) or name not in words:
        near = ", ".join(difflib.get_close_matches(str(name), words, 3)) or "see convert --families"
        raise PlanError(f"no family is called {name!r}; nearest: {near}")
    return words[name]


def _by_class(config: Mapping[str, Any]) -> str | None:
    """The family by the module of the base's class, which PEFT writes where the task is not known."""
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    found = _LIBRARY.fullmatch(library) if isinstance(library, str) else None
    words = {word: family.name for family in FAMILIES for word in (family.name, *family.model_types)}
    return words.get(found[1]) if found else None
