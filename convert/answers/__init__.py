"""Questions about a checkpoint and about this tool, answered without reading data: `--inspect`, `--families`, `--layouts`.

In: a path, or a name. Out: what a program or a person reads. Nothing here prints, writes, or reads more than headers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from convert.options.calls import documented
from convert.options.keywords import Inspecting

if TYPE_CHECKING:
    from convert.answers.inspection import Inspection


@documented(Inspecting)
def inspect(path: str | Path, **options: Unpack[Inspecting]) -> Inspection:
    """What a checkpoint is, and what `prefuse` and `split` would do with it, from its headers alone.

    Where its experts cannot be told, `Inspection.problem` says why, and the rest is there all the same. `str` of it is for
    people, `Inspection.to_dict()` for programs.

    Raises:
        InputError: there is no checkpoint, or it is corrupt or not complete.
        UsageError: an option that does not exist.
    """
    from convert.answers.looking import inspected
    from convert.options import Choices
    from convert.options.option import complete
    from convert.planning.choices import check

    choices = complete(Choices, options)
    check(choices)
    return inspected(path, choices)
