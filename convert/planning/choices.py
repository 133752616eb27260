"""Whether the choices of one conversion go together.

In: choices (`convert.options`). Out: nothing, or a `UsageError` that lists what there is. It never looks at a checkpoint.
"""

from __future__ import annotations

from convert.errors import UsageError, did_you_mean
from convert.options import Choices


def check(choices: Choices) -> None:
    """See that the layouts exist and take these options.

    Raises:
        UsageError: they do not; the message lists what there is.
    """
    from layouts.tables.natives import SOURCES  # not for `convert --help`
    from layouts.tables.targets import BLOCK, TARGETS

    for name in ("from_writer", "base"):
        if getattr(choices, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for LoRA adapters, and this is a checkpoint")
    cuts = [f"--{name}" for name in ("mesh", "sharding") if getattr(choices, name)]
    if len(cuts) > 1:
        raise UsageError("--sharding says what the mesh is; give it or --mesh")
    if cuts and choices.keep_chunks:
        raise UsageError(f"{cuts[0]} cuts chunks anew, and --keep-chunks keeps them as they are; give one of them")
    source = (choices.source_layout or choices.layout).partition(":")[0]
    for name, known in ((choices.layout, TARGETS), (source, {**TARGETS, **SOURCES})):
        if name not in known:
            raise UsageError(f"no layout is called {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    if choices.glu_block != BLOCK and "{block}" not in TARGETS[choices.layout]["wi"].pattern:
        raise UsageError(f"layout {choices.layout!r} has no blocks whose size can be chosen; did you mean --layout=glu?")
    if choices.shards > 1 and "{shards}" not in TARGETS[choices.layout]["wi"].pattern:
        raise UsageError(f"layout {choices.layout!r} is not cut into shards; did you mean --layout=per-shard?")
