"""What checkpoints hold: each by the names of Hugging Face where it can be, else by its own.

In: open checkpoints, what the user says of them. Out: `Content` of each. It never writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert.errors import InputError, PlanError, readable
from convert.options import Verification
from convert.progress import Progress, ignore
from convert.verifier.bits.logical import blocks
from convert.verifier.content.hashing import HUGGING_FACE, OWN, Content, Unit, digest_of, hashed
from convert.verifier.content.tensors import expert_units, other_units, place_in
from convert.verifier.content.tree import model_units
from convert.verifier.sides import said_of
from layouts.checkpoint import open_checkpoint
from layouts.matching.candidates import ORIGIN, record_of
from layouts.matching.describe import Description, describe
from layouts.reader import Reader
from layouts.tables.families import families_of
from layouts.tables.maxtext import ROOT


def contents(*readers: Reader, options: Verification, progress: Progress = ignore) -> list[Content]:
    """Of one checkpoint, or of several that are compared: all in the same terms, and what one does not say, others do.

    Raises:
        InputError, PlanError: one cannot be read or described.
    """
    sides = []
    for at, reader in enumerate(readers):
        with readable(reader.path):
            beside = [record_of(other) for other in readers if other is not reader]
            sides.append(_side(reader, said_alone(options, at), beside))
    alike = len({reader.format for reader in readers}) == 1
    why = next((side.why for side in sides if side.why), "") if alike else ""
    return [_content(side, why or side.why, options.memory, progress) for side in sides]


def said_alone(options: Verification, at: int) -> Verification:
    """The options with what the user says of this one of two sides, as if it were alone."""
    said = said_of(options)[at]
    return replace(options, family=said.family, source_layout=said.layout, family_b=None, source_layout_b=None)


def lines_of(reader: Reader, other: Reader, wanted: Callable[[Unit], bool], options: Verification) -> list[str]:
    """The lines of some units of a checkpoint that is compared with another one, sorted; `options` are what is said of it."""
    side = _side(reader, options, [record_of(other)])
    units = side.own("") if side.why or reader.format != "orbax" else [*side.units, *side.own(ROOT)]
    return sorted(line for unit in units if wanted(unit) for line in hashed(unit)[0])


def described(reader: Reader, options: Verification, beside: list[Mapping[str, Any]]) -> Description:
    """By its record, else in the layout that the user names, else in what the records `beside` say, else by the tables."""
    axis = _axis(reader, options.scan_axis, beside)
    said = [options.source_layout, *(record.get(ORIGIN, {}).get("layout") for record in beside)]
    family = options.family or (None if reader.format == "orbax" else _family(beside))
    if "layout" not in record_of(reader):
        for layout in filter(None, said):
            with suppress(PlanError):
                return describe(reader, family=family, source_layout=layout, scan_axis=axis)
        for record in beside:
            if "layout" in record:
                with suppress(PlanError):
                    return describe(reader, family=family, like=record, scan_axis=axis)
    return describe(reader, family=family, scan_axis=axis)


def _family(beside: list[Mapping[str, Any]]) -> str | None:
    """What the record of another side says of a Hugging Face checkpoint: a tree says of which family it was made."""
    known = {family.name for family in families_of("hf")}
    said = (name for record in beside for name in (record.get("family"), record.get(ORIGIN, {}).get("family")))
    return next((name for name in said if name in known), None)


def _axis(reader: Reader, asked: int | None, beside: list[Mapping[str, Any]]) -> int | None:
    """Along which axis the layers of a tree are stacked, if it does not say so itself."""
    if asked is not None or reader.format != "orbax" or record_of(reader).get("family"):
        return asked
    trees = {family.name: family.scan_axis for family in families_of("orbax")}
    return next((trees[name] for record in beside if (name := record.get("family")) in trees), None)


def _side(reader: Reader, options: Verification, beside: list[Mapping[str, Any]]) -> _Side:
    description, units, why = described(reader, options, beside), list[Unit](), ""
    if reader.format == "orbax":
        try:
            units = model_units(reader, options)
        except (InputError, PlanError) as error:
            why = str(error)
    return _Side(reader=reader, description=description, units=units, why=why)


def _content(side: _Side, why: str, memory: int, progress: Progress) -> Content:
    """In the terms of Hugging Face, but for a reason not to."""
    if side.reader.format != "orbax" or why:
        model = digest_of(side.reader, side.own(""), memory, progress)
        return Content(model=model, terms=OWN if why else HUGGING_FACE, why=why)
    model = digest_of(side.reader, side.units, memory, progress)
    state = side.own(ROOT)
    found = digest_of(side.reader, state, memory, progress) if state else None
    return Content(model=model, terms=HUGGING_FACE, state=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """A checkpoint and, of a tree, its units in the terms of Hugging Face, or `why` there are none."""

    reader: Reader
    description: Description
    units: list[Unit]
    why: str

    def own(self, but: str) -> list[Unit]:
        """Tensors under the names that they have here, `but` those below a place."""
        every = blocks(self.reader, self.description).values()
        names = [name for name in self.description.verbatim if not (but and name.startswith(but))]
        chosen = [b for b in every if not (but and next(iter(b.groups.values())).names[0].startswith(but))]
        return [unit for b in chosen for unit in expert_units(place_in(b), b)] + list(other_units(self.reader, names))


def content_of(path: Path, options: Verification, progress: Progress = ignore) -> Content:
    """What a checkpoint holds, by itself.

    Raises:
        InputError, PlanError: it cannot be read or described.
    """
    with readable(path), closing(open_checkpoint(path)) as reader:
        return contents(reader, options=options, progress=progress)[0]
