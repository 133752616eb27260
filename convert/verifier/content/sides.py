"""What checkpoints hold: each by the names of Hugging Face where it can be, else by its own.

In: open checkpoints, what the user says of them. Out: `Content` of each. It never writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from convert.commit.processes import ALONE, Processes
from convert.errors import InputError, PlanError, readable
from convert.options import Verification
from convert.planning.across.rooted import rooted
from convert.progress import Progress, ignore
from convert.verifier.bits.logical import blocks
from convert.verifier.content.hashing import HUGGING_FACE, OWN, Content, Digest, Unit, digest_of, hashed
from convert.verifier.content.loras import lora_units
from convert.verifier.content.tensors import expert_units, other_units, place_in
from convert.verifier.content.tree import model_units
from convert.verifier.sides import check_said, described, said_alone
from layouts.checkpoint import open_checkpoint
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description
from layouts.reader import Reader
from layouts.tables.maxtext import ROOT


def contents(
    *readers: Reader, options: Verification, progress: Progress = ignore, processes: Processes = ALONE
) -> list[Content]:
    """Of one checkpoint, or of several that are compared: all in the same terms, and what one does not say, others do.

    Several `processes` hash a part of each.

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
    digest = partial(digest_of, memory=options.memory, progress=progress, processes=processes)
    return [_content(side, why or side.why, digest) for side in sides]


def lines_of(reader: Reader, other: Reader, wanted: Callable[[Unit], bool], options: Verification) -> list[str]:
    """The lines of some units of a checkpoint that is compared with another one, sorted; `options` are what is said of it."""
    side = _side(reader, options, [record_of(other)])
    units = side.own("") if side.units is None else [*side.units, *side.own(ROOT)]
    return sorted(line for unit in units if wanted(unit) for line in hashed(unit)[0])


def _side(reader: Reader, options: Verification, beside: list[Mapping[str, Any]]) -> _Side:
    stored, reader, units, why = reader, rooted(reader), None, ""
    description = described(reader, options, beside)
    if description.loras:
        why = f"{reader.path}: {description.loras[0]} is LoRA, for which Hugging Face has no names"
    elif description.family.by_structure:
        try:
            units = model_units(reader, options)
        except (InputError, PlanError) as error:
            why = str(error)
    if why and reader is not stored:  # by its own names
        reader, description = stored, described(stored, options, beside)
    return _Side(reader=reader, description=description, units=units, why=why, beside=beside)


def _content(side: _Side, why: str, digest: Callable[[Reader, list[Unit]], Digest]) -> Content:
    """In the terms of Hugging Face, but for a reason not to."""
    if side.units is None or why:
        model = digest(side.reader, side.own(""))
        return Content(model=model, terms=OWN if why else HUGGING_FACE, why=why)
    model = digest(side.reader, side.units)
    state = side.own(ROOT)
    found = digest(side.reader, state) if state else None
    return Content(model=model, terms=HUGGING_FACE, state=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """A checkpoint and, of a tree, its units in the terms of Hugging Face, or `why` there are none; others have these names."""

    reader: Reader
    description: Description
    units: list[Unit] | None
    why: str
    beside: list[Mapping[str, Any]]

    def own(self, but: str) -> list[Unit]:
        """Tensors under the names that they have here, `but` those below a place."""
        every = blocks(self.reader, self.description).values()
        names = [name for name in self.description.verbatim if not (but and name.startswith(but))]
        chosen = [b for b in every if not (but and next(iter(b.groups.values())).names[0].startswith(but))]
        experts = [unit for b in chosen for unit in expert_units(place_in(b), b)]
        loras = lora_units(self.reader, self.description, self.beside)
        return [*experts, *loras, *other_units(self.reader, names)]


def content_of(path: Path, options: Verification, progress: Progress = ignore, *, checked: bool = False) -> Content:
    """What a checkpoint holds, by itself; `checked` is that what is said is true of this one or of another (`check_places`).

    Raises:
        InputError, PlanError, UsageError: it cannot be read or described.
    """
    with readable(path), closing(open_checkpoint(path)) as reader:
        if not checked:
            check_said((reader,), options)
        return contents(reader, options=options, progress=progress)[0]
