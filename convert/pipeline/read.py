"""A checkpoint as a tree: of arrays, or of leaves that are read when somebody asks.

In: a path, and what is wanted. Out: a tree. A checkpoint that changes while it is read as a whole is an error.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from convert.commit.identity import state_of
from convert.engine.reading import in_order
from convert.engine.twins import check_exact, compare_twins, with_computed
from convert.errors import InputError, readable
from convert.options import Choices, Running
from convert.pipeline.kinds import kinds_of
from convert.pipeline.lazy import Lazy
from convert.pipeline.load import Loader
from convert.pipeline.request import Names, held, named_for, opened, request
from convert.progress import Progress, begin


def read(
    path: str | Path,
    layout: str | None,
    names: Names,
    sharding: Any,
    dtype: Any,
    choices: Choices,
    running: Running,
    progress: Progress,
    *,
    lazy: bool,
) -> dict[str, Any]:
    """Read it; see `convert.load` for what it raises."""
    with ExitStack() as until:
        reader = opened(path, choices)
        until.callback(reader.close)
        reader = named_for(names, reader)
        asked = request(reader, layout, names, choices)
        with readable(reader.path):
            compare_twins(asked.plan.twins, reader)
        _, reader = with_computed(asked.plan, reader)
        until.callback(reader.close)
        with readable(reader.path):
            check_exact(asked.plan, reader)
        loader = Loader.make(asked.plan, reader, running)
        kinds = kinds_of({asked.names[each.spec.name]: each for each in in_order(asked.plan.targets, reader)}, sharding, dtype)
        if lazy:
            weakref.finalize(loader, until.pop_all().close)
            return held({name: Lazy(kind, loader) for name, kind in kinds.items()}, nested=asked.nested)
        begin(progress, "loading", sum(kind.nbytes for kind in kinds.values()))
        state = state_of(reader.path, asked.plan.never_copied)
        leaves = loader.leaves(kinds, progress)
        if state_of(reader.path, asked.plan.never_copied).content != state.content:
            raise InputError(f"{reader.path}: it has changed while it was read; load it again once it is at rest")
        return held(leaves, nested=asked.nested)
