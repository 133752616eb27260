"""Whether the choices of one conversion go together, and with the formats of its input and output.

In: choices (`convert.options`), formats. Out: nothing, or a `UsageError`, which lists what there is. It looks at no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from convert.errors import UsageError, did_you_mean
from convert.options import Choices

_FOR: tuple[tuple[str, Callable[[str, str], bool], str], ...] = (
    ("scan_axis", lambda source, out: "orbax" in (source, out), "MaxText trees"),
    ("scan", lambda source, out: source != out == "orbax", "the way to Orbax (--to=orbax)"),
    ("params_only", lambda source, out: source != out == "hf", "the way to Hugging Face (--to=hf)"),
    ("drop_optimizer", lambda source, _: source == "orbax", "an Orbax input"),
    ("keep_chunks", lambda source, out: source == out == "orbax", "Orbax to Orbax"),
)
"""Options -> the formats of input and output that they have a say in, and what these are."""


def comparable(computed: str | None, choices: Choices) -> bool:
    """Whether a verification finds an output equal to its input: nothing is left out, and what is computed goes by a rule.

    That is what users are told to call; `computed` is what a plan says of values that are not as they were.
    """
    drops = choices.drop_optimizer or choices.drop_mtp or choices.params_only
    return not drops and (not computed or (choices.compute is not None and choices.dequantize is None))


def check(choices: Choices) -> None:
    """See that the layouts exist and take these options.

    Raises:
        UsageError: they do not; the message lists what there is.
    """
    from layouts.tables.targets import BLOCK, TARGETS  # not for `convert --help`

    for name in ("from_writer", "base"):
        if getattr(choices, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is for LoRA adapters, and this is a checkpoint")
    cuts = [f"--{name}" for name in ("mesh", "sharding") if getattr(choices, name)]
    if len(cuts) > 1:
        raise UsageError("--sharding says what the mesh is; give it or --mesh")
    if cuts and choices.keep_chunks:
        raise UsageError(f"{cuts[0]} cuts chunks anew, and --keep-chunks keeps them as they are; give one of them")
    _check_name(choices.layout, TARGETS)
    check_source(choices.source_layout)
    if choices.glu_block != BLOCK and "{block}" not in TARGETS[choices.layout]["wi"].pattern:
        raise UsageError(f"layout {choices.layout!r} has no blocks whose size can be chosen; did you mean --layout=glu?")
    if choices.shards > 1 and "{shards}" not in TARGETS[choices.layout]["wi"].pattern:
        raise UsageError(f"layout {choices.layout!r} is not cut into shards; did you mean --layout=per-shard?")


def check_source(layout: str | None) -> None:
    """See that there is such a layout as a user says an input has: `glu:48` is `glu`.

    Raises:
        UsageError: there is none; the message lists what there is.
    """
    from layouts.tables.natives import SOURCES
    from layouts.tables.targets import TARGETS

    if layout is not None:
        _check_name(layout.partition(":")[0], {**TARGETS, **SOURCES})


def _check_name(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise UsageError(f"no layout is called {name!r}{_nearest(name, known)}; known: {', '.join(known)}")


def _nearest(name: str, known: Collection[str]) -> str:
    """What may have been meant; what `--source-layout` says in one word, `--layout` says in three."""
    layout, colon, shards = name.partition(":")
    if colon and layout in known:
        flag = "--glu-block" if layout == "glu" else "--shards"
        return f" (did you mean --layout={layout} {flag}={shards.partition(':')[0]}?)"
    return did_you_mean(name, known)


def check_formats(choices: Choices, source: str, out: str) -> None:
    """See that each option that was given has something to say where these are the formats of input and output.

    Raises:
        UsageError: one has not, so that it would be dropped in silence.
    """
    usual = Choices()
    for name, applies, what in _FOR:
        if getattr(choices, name) != getattr(usual, name) and not applies(source, out):
            flag = f"--{'no-' if name == 'scan' else ''}{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for {what}; this is {source} to {out}")
    from layouts.tables.targets import TARGETS

    if choices.align is not None and not any(word in TARGETS[choices.layout]["wi"].pattern for word in ("{align}", "{pad}")):
        raise UsageError(f"layout {choices.layout!r} pads no shards; --align is for --layout=per-shard or --layout=lane")
