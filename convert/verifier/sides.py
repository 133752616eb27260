"""What each of two checkpoints is: by what the user says of it, by its own record, by the other one's, else by the tables.

In: paths, options. Out: open readers and descriptions. It never compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.errors import PlanError, readable
from convert.options import Verification
from layouts.checkpoint import open_checkpoint
from layouts.matching.candidates import record_of
from layouts.matching.describe import Description, describe
from layouts.matching.origin import hf_name, origin_of
from layouts.reader import Reader
from layouts.tables.families import maxtext


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the user says of one side: a family, a layout; whether these are its `own`, or said of both at once."""

    family: str | None = None
    layout: str | None = None
    own: bool = False


def said_of(options: Verification) -> tuple[Said, Said]:
    """What is said of either side. What is said of the first stands for both, where nothing else is said of the second."""
    own = options.source_layout_b is not None
    second = options.source_layout_b if own else options.source_layout
    return (
        Said(family=options.family, layout=options.source_layout, own=own),
        Said(family=options.family_b or options.family, layout=second, own=own),
    )


@contextmanager
def opened(*paths: Path) -> Iterator[tuple[Reader, Reader]]:
    """Two checkpoints, open."""
    a, b = paths
    with closing(_opened(a)) as one, closing(_opened(b)) as other:
        yield one, other


def _opened(path: Path) -> Reader:
    with readable(path):
        return open_checkpoint(path)


def described_alike(one: Reader, other: Reader, options: Verification) -> tuple[Description, Description]:
    """Two in one format; what one does not say of itself, the record of what was made from it says, or its maker's."""
    records = [record_of(reader) for reader in (one, other)]
    said = said_of(options)
    families = [each.family for each in said]
    if one.format == "orbax":
        for at, reader in enumerate((one, other)):
            if hf_name(families[at]):  # the model's, which both have to be made of; their trees are their own
                origin_of(reader, families[at])
                families[at] = None
    stated = [family or record.get("family") for family, record in zip(families, records, strict=True)]
    usual = None
    if one.format == "orbax":
        usual = next(filter(None, stated), None) if options.scan_axis is None else maxtext(options.scan_axis).name
    return (
        _described(one, stated[0] or usual, said[0], records[1]),
        _described(other, stated[1] or usual, said[1], records[0]),
    )


def _described(reader: Reader, family: str | None, said: Said, beside: Mapping[str, Any]) -> Description:
    """By its record, else in the layout that was named, else in what the other's record says it was, else by the table.

    What was said comes before the table: layouts may have names and shapes in common.
    """
    with readable(reader.path):
        if said.own and said.layout:
            return describe(reader, family=family, source_layout=said.layout)
        if "layout" not in record_of(reader):
            if said.layout:
                with suppress(PlanError):
                    return describe(reader, family=family, source_layout=said.layout)
            if "layout" in beside:
                with suppress(PlanError):
                    return describe(reader, family=family or str(beside["family"]), like=beside)
        return describe(reader, family=family)


def described_as(reader: Reader, family: str, said: Said, layouts: Sequence[str | None] = ()) -> Description:
    """A Hugging Face checkpoint in what is said of it, else in the first of these `layouts` that fits, else as it says."""
    with readable(reader.path):
        if said.own and said.layout:
            return describe(reader, family=family, source_layout=said.layout)
        for layout in filter(None, (said.layout, *layouts)):
            with suppress(PlanError):
                return describe(reader, family=family, source_layout=layout)
        return describe(reader, family=family)
