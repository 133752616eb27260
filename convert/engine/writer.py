"""What an output is to the rest of the tool: the `Writer` protocol.

In: a plan, an open input, a memory budget. Out: a filled staging directory. `convert.run` chooses the writer by the format.
`Writer` and `Reader` (`layouts.reader`) are the only two seams where formats differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from convert.commit.processes import Processes
from convert.commit.recorded import Manifest
from convert.commit.stage import AnyStage
from convert.engine.again import Remade
from convert.planning.targets import Target
from convert.progress import Progress


class Bounds(Protocol):
    """What a budget promises."""

    @property
    def peak(self) -> int:
        """The bound on resident memory that the plan prints, in bytes."""

    @property
    def jobs(self) -> int:
        """How many workers there are."""


class Written(NamedTuple):
    """What the user should know, and the content digest as the manifest has it, where one was made."""

    notes: tuple[str, ...] = ()
    content: Mapping[str, Any] | None = None


class Writer(Protocol):
    """Writes one plan within a memory budget."""

    @property
    def budget(self) -> Bounds:
        """The budget."""

    def pieces(self) -> list[tuple[str, int]]:
        """What processes share, each piece written by one of them: files or batches of arrays, with their bytes."""

    def write(self, stage: AnyStage, progress: Progress, processes: Processes) -> Written:
        """Fill the staging directory; everything in it is durable on return.

        Raises:
            OSError: the disk is full or failing.
            InputError: data of the input cannot be read.
        """

    def finished(self, done: Collection[str]) -> int:
        """How many tensors are whole in a journal that has these keys; it has those of parts, and of sources, too."""

    def unlike(self, found: Manifest) -> str | None:
        """Why an output with this manifest is not written as this writer would write it, as far as the plan does not say."""

    def again(self, targets: Sequence[Target], found: Manifest, progress: Progress) -> Iterator[Remade]:
        """The digests of these targets, made from the input again and written nowhere, beside those of an earlier output.

        Raises:
            InputError: data of the input cannot be read.
        """
