"""What each of two checkpoints is: by what the user says of it, by its own record, by the other one's, else by the tables.

In: paths, options. Out: open readers and descriptions. It never compares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from convert.errors import PlanError, UsageError, readable
from convert.options import Verification
from convert.planning.across.rooted import rooted
from convert.planning.choices import check_source
from layouts.checkpoint import open_checkpoint
from layouts.matching.candidates import ORIGIN, record_of
from layouts.matching.describe import Description, describe
from layouts.reader import Reader
from layouts.tables.families import families_of


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
    """Two checkpoints, open; of two formats, in the names that the tables have."""
    a, b = paths
    with closing(_opened(a)) as one, closing(_opened(b)) as other:
        yield (one, other) if one.format == other.format else (rooted(one), rooted(other))


def _opened(path: Path) -> Reader:
    with readable(path):
        return open_checkpoint(path)


def said_alone(options: Verification, at: int) -> Verification:
    """The options with what the user says of this one of several sides, as if it were alone."""
    said = said_of(options)[min(at, 1)]
    return replace(options, family=said.family, source_layout=said.layout, family_b=None, source_layout_b=None)


def check_places(paths: Sequence[Path], options: Verification) -> None:
    """The same of checkpoints that are not open.

    Raises:
        UsageError, PlanError: see `check_said`.
        InputError: one cannot be read.
    """
    if not (options.family or options.source_layout or options.scan_axis is not None):
        return  # nothing is said
    with ExitStack() as stack:
        check_said([stack.enter_context(closing(_opened(path))) for path in paths], options)


def check_said(readers: Sequence[Reader], options: Verification) -> None:
    """See that what is said of all sides at once is true of one of them at least, or it would be dropped in silence.

    What is said of one alone has to be true of it.

    Raises:
        UsageError: there is no such layout, or none of the sides is a tree of MaxText, whose layers have an axis.
        PlanError: a layout or a family that none is in.
    """
    for layout in (options.source_layout, options.source_layout_b):
        check_source(layout)
    said = [name for name in ("family", "source_layout", "scan_axis") if getattr(options, name) is not None]
    if said and (adapter := next((reader for reader in readers if reader.format == "adapter"), None)):
        raise UsageError(f"--{said[0].replace('_', '-')} is for checkpoints, and {adapter.path} is an adapter")
    if options.scan_axis is not None and all(reader.format != "orbax" for reader in readers):
        raise UsageError(f"--scan-axis is for MaxText trees, and none is one of {', '.join(str(r.path) for r in readers)}")
    alone = len(readers) == 1 and (options.family or options.scan_axis is not None)
    if not (alone or (options.source_layout and options.source_layout_b is None)):
        return
    problems = []
    for at, reader in enumerate(readers):
        told = replace(said_alone(options, at), source_layout_b=options.source_layout)
        try:
            described(reader, told, [record_of(other) for other in readers if other is not reader])
            return
        except PlanError as problem:
            problems.append(str(problem))
    raise PlanError("; ".join(dict.fromkeys(problems)))


def described_alike(one: Reader, other: Reader, options: Verification) -> tuple[Description, Description]:
    """Two in one format; what one does not say of itself, the record of what was made from it says, or its maker's."""
    return described(one, options, [record_of(other)], 0), described(other, options, [record_of(one)], 1)


def described(reader: Reader, options: Verification, beside: Sequence[Mapping[str, Any]], at: int = 0) -> Description:
    """By its record, else in the layout that the user names, else in what the records `beside` say, else by the tables.

    What was said comes before the tables: layouts may have names and shapes in common. A layout that is said of this side
    alone has to fit. `at` is which side it is of those that the options tell apart.
    """
    with readable(reader.path):
        said = said_of(options)[at]
        family = said.family or _family(reader, options, beside)
        how = partial(describe, reader, family=family, scan_axis=options.scan_axis)
        if said.own and said.layout:
            return how(source_layout=said.layout)
        if "layout" not in record_of(reader):
            for layout in filter(None, (said.layout, *(record.get(ORIGIN, {}).get("layout") for record in beside))):
                with suppress(PlanError):
                    return how(source_layout=layout)
            for record in beside:
                if "layout" in record:
                    with suppress(PlanError):
                        return how(like=record)
        if family != said.family:
            with suppress(PlanError):
                return how()
        return how(family=said.family)  # another model, of which the records beside say nothing


def _family(reader: Reader, options: Verification, beside: Sequence[Mapping[str, Any]]) -> str | None:
    """What the records of others say of a side that says nothing itself: a tree's record has the family that it was made of.

    The axis along which the layers of a tree are stacked is part of its family; what the user says of it goes first.
    """
    if record_of(reader).get("family"):
        return None
    known = {family.name: family for family in families_of(reader.format)}
    said = (name for record in beside for name in (record.get("family"), record.get(ORIGIN, {}).get("family")))
    found = next((known[name] for name in said if name in known), None)
    return None if found is None or (found.by_structure and options.scan_axis is not None) else found.name


def described_as(reader: Reader, family: str, said: Said, layouts: Sequence[str | None] = ()) -> Description:
    """A Hugging Face checkpoint in what is said of it, else in the first of these `layouts` that fits, else as it says."""
    with readable(reader.path):
        if said.own and said.layout:
            return describe(reader, family=family, source_layout=said.layout)
        for layout in filter(None, (said.layout, *layouts)):
            with suppress(PlanError):
                return describe(reader, family=family, source_layout=layout)
        return describe(reader, family=family)
