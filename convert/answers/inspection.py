"""What an inspection found, for people and for programs.

In: facts. Out: text of 100 columns or so many as are asked for, or JSON. It never looks at a checkpoint.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from convert.errors import ConvertError, one_line
from convert.options.values import counted
from convert.options.values import in_units as size
from layouts.checkpoint import FORMATS

WIDTH, INDENT = 100, 13
_TIED = "\u00a0"
"""A space at which no line is broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """MoE blocks that are alike: L `layers` of E `experts`, each of which takes K `embed` numbers to N `mlp` and back.

    `names` and `axes` are the key and the pattern in which gate and up are stored. `packed` weights hold several values in an
    element, and their sizes are those that are stored.
    """

    layout: str
    names: str
    axes: str
    layers: int
    experts: int
    embed: int
    mlp: int
    dtype: str
    companions: tuple[str, ...]
    packed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """The answer to `--inspect`; sizes are in bytes."""

    path: str
    format: str
    files: int
    tensors: int
    nbytes: int
    dtypes: Mapping[str, int]
    """Bytes of each element type, by safetensors' words."""
    family: str | None
    told_by: str
    layout: str | None
    recorded: tuple[str, ...]
    """Where the layout is written down; nowhere in what was published so."""
    blocks: tuple[Blocks, ...]
    quantisation: str | None
    indexed: bool
    """Whether an index, or Orbax' metadata, names the tensors that have to be there."""
    prefuse: str
    split: str
    made_for: str | None
    side_files: Mapping[str, int]
    """Of how many bytes the files are that a conversion carries over."""
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]
    problem: ConvertError | None = None
    """Why the experts cannot be told."""

    def to_dict(self) -> dict[str, Any]:
        """For programs, as `--json` has it."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {
            **{name: list(found[name]) for name in ("recorded", "left_out", "remarks")},
            "dtypes": dict(self.dtypes),
            "side_files": dict(self.side_files),
            "blocks": [asdict(each) | {"companions": list(each.companions)} for each in self.blocks],
            "problem": None if self.problem is None else {"text": str(self.problem), "exit_code": self.problem.exit_code},
        }

    def __str__(self) -> str:
        return self.told()

    def told(self, width: int = WIDTH) -> str:
        """For people, in so many columns."""
        return "\n".join(line for word, text in self._lines() for line in _wrapped(word, one_line(text), width))

    def _lines(self) -> Iterator[tuple[str, str]]:
        """What there is to say, each with its word."""
        kinds = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in self.dtypes.items())
        yield "checkpoint", self.path
        yield "format", FORMATS[self.format].title + (f", {counted(self.files, 'file')}" if self.files else "")
        yield "tensors", f"{self.tensors:,}, {size(self.nbytes)}: {kinds}"
        yield "family", f"{self.family}, told by {self.told_by}" if self.family else "not told"
        if self.layout:
            where = ", ".join(self.recorded)
            yield (
                "layout",
                f"{self.layout}, recorded in {where}" if where else f"{self.layout}, as published; nothing records it",
            )
        for each in self.blocks:
            yield "experts", _told(each)
        if self.quantisation or not self.problem:
            yield "quantised", self.quantisation or "no"
        yield "complete", self._complete()
        nbytes = sum(self.side_files.values())  # which a store does not tell
        carried = counted(len(self.side_files), "file") + (f", {size(nbytes)}" if nbytes else "")
        yield "beside", carried + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")
        yield "--prefuse", self.prefuse
        yield "--split", self.split
        if self.made_for:
            yield "made for", self.made_for
        yield from (("note", remark) for remark in self.remarks)

    def _complete(self) -> str:
        lists = FORMATS[self.format].names
        named = f"each that {lists} names is there" if self.indexed else "there is no index that names them"
        whole = "" if self.problem else ", and every MoE layer has all its experts"
        return f"{named}{whole} (headers were read, weights were not)"


def _told(each: Blocks) -> str:
    beside = f", with {', '.join(each.companions)}" if each.companions else ""
    stored = " as packed" if each.packed else ""
    return (
        f"L={counted(each.layers, 'layer')}, E={each.experts}, K={each.embed}, N={each.mlp}{stored}, {each.dtype}{beside}; "
        f"gate and up: {each.names} '{each.axes}'"
    )


def _wrapped(word: str, text: str, width: int) -> Iterator[str]:
    """Lines of a word and its text; axes stay in one."""
    text = re.sub(r"'[^']*'$", lambda axes: axes[0].replace(" ", _TIED), text) if word == "experts" else text
    lines = textwrap.wrap(f"{word:<{INDENT}}{text}", width, subsequent_indent=" " * INDENT, break_on_hyphens=False)
    return (line.replace(_TIED, " ") for line in lines)
